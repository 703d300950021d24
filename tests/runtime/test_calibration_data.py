"""Calibration data: every form that users have becomes the same complete feeds; what does not fit is said."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import planish
import pytest
import torch
from planish.ir.errors import InputError
from planish.ir.signature import Signature
from planish.runtime.calibration import CalibrationData
from planish.runtime.calibration.data import fitted, token_mask

DECODER = """
<ir_version: 10, opset_import: ["" : 23]>
decoder (
  int64[batch, sequence] input_ids, int64[batch, total] attention_mask, int64[batch, sequence] position_ids,
  float[batch, 2, past, 4] past_key_values_0_key, float[batch, 2, past, 4] past_key_values_0_value
) => (int64[batch, sequence] y) {
  y = Add (input_ids, position_ids)
}
"""
IDS = np.arange(6, dtype=np.int64).reshape(2, 3)


def parse(text: str) -> ir.Model:
    model = ir.from_proto(onnx.parser.parse_model(text))
    for value in model.graph.inputs:
        value.name = value.name.replace("_0_", ".0.")  # the text form has no dots in names
    return model


def two_inputs() -> ir.Model:
    return parse(
        '<ir_version: 10, opset_import: ["" : 23]> g (float[n, 3] a, float[n, 3] b) => (float[n, 3] y)'
        "{ y = Add (a, b) }"
    )


def features() -> ir.Model:
    return parse(
        '<ir_version: 10, opset_import: ["" : 23]> g (float[n, 3] x) => (float[n, 3] y) { y = Relu (x) }'
    )


class Reader:
    """As onnxruntime's CalibrationDataReader."""

    def __init__(self, items):
        self._items = iter(items)

    def get_next(self):
        return next(self._items, None)


ROWS = [np.full((1, 3), index, np.float32) for index in range(4)]


@pytest.mark.parametrize(
    "source",
    [
        [{"x": row} for row in ROWS],
        ({"x": row} for row in ROWS),
        Reader([{"x": row} for row in ROWS]),
        ROWS,
        [torch.from_numpy(row) for row in ROWS],
        [(row,) for row in ROWS],
        [np.concatenate(ROWS)],
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.from_numpy(np.concatenate(ROWS)))),
    ],
    ids=["dicts", "generator", "get_next", "arrays", "tensors", "tuples", "one-batch", "DataLoader"],
)
def test_every_form_gives_the_same_feeds(source):
    data = CalibrationData.read(source, features())
    assert np.concatenate([feeds["x"] for feeds in data]).tolist() == np.concatenate(ROWS).tolist()


def test_a_decoder_s_mask_positions_and_cache_may_be_left_out():
    (feeds,) = CalibrationData.read([{"input_ids": IDS}], parse(DECODER))
    assert feeds["attention_mask"].tolist() == [[1, 1, 1]] * 2
    assert feeds["position_ids"].tolist() == [[0, 1, 2]] * 2
    assert feeds["past_key_values.0.key"].shape == (2, 2, 0, 4)


def test_positions_count_attended_tokens():
    mask = np.array([[0, 1, 1], [1, 1, 1]])
    (feeds,) = CalibrationData.read([{"input_ids": IDS, "attention_mask": mask}], parse(DECODER))
    assert feeds["position_ids"].tolist() == [[0, 0, 1], [0, 1, 2]]
    assert token_mask(feeds).tolist() == mask.astype(bool).tolist()


def test_items_may_be_spelled_as_the_module_s_arguments():
    signature = Signature(
        input_names=("a", "b"),
        output_names=("y",),
        input_paths=(("first",), ("second",)),
        parameters=("first", "second"),
    )
    by_name = CalibrationData.read([{"first": ROWS[0], "second": ROWS[1]}], two_inputs(), signature)
    by_position = CalibrationData.read([(ROWS[0], ROWS[1])], two_inputs(), signature)
    for data in (by_name, by_position):
        assert data[0]["a"].tolist() == ROWS[0].tolist()
        assert data[0]["b"].tolist() == ROWS[1].tolist()


def test_samples_are_regrouped_and_keep_their_order():
    samples = [np.full((1, 3), index, np.float32) for index in range(1500)]
    data = CalibrationData.read(samples, features())
    assert 1 < len(data) < 10
    assert np.concatenate([feeds["x"] for feeds in data])[:, 0].tolist() == list(range(1500))


def test_samples_of_different_shape_stay_apart():
    lengths = [2, 2, 3, 2]
    items = [{"input_ids": np.zeros((1, length), np.int64)} for length in lengths]
    data = CalibrationData.read(items, parse(DECODER))
    assert [feeds["input_ids"].shape for feeds in data] == [(2, 2), (1, 3), (1, 2)]


def test_batches_without_a_common_batch_axis_stay_as_they_are():
    model = parse(
        '<ir_version: 10, opset_import: ["" : 23]> g (float[n, 3] a, float[m, 3] b) => (float[n, 3] y)'
        "{ y = Add (a, b) }"
    )
    item = {"a": np.zeros((2, 3), np.float32), "b": np.zeros((2, 3), np.float32)}
    assert len(CalibrationData.read([item, item], model)) == 2


def test_integers_of_another_width_are_converted():
    (feeds,) = CalibrationData.read([{"input_ids": IDS.astype(np.int32)}], parse(DECODER))
    assert feeds["input_ids"].dtype == np.int64


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "empty"),
        (iter(()), "empty"),
        (Reader([]), "empty"),
        (7, "expected an iterable"),
        ({"x": ROWS[0]}, "expected an iterable"),
        ([{"y": ROWS[0]}], r"item 0: expected the inputs \['x'\], found \['y'\]"),
        ([ROWS[0], np.zeros((1, 4), np.float32)], "item 1: input 'x': expected shape"),
        ([np.zeros((1, 3), np.complex64)], "expected float32"),
        ([np.full((1, 3), np.nan, np.float32)], "NaN"),
        ([np.zeros((0, 3), np.float32)], "is empty"),
        ([(ROWS[0], ROWS[1])], "2 tensors were given"),
        (["text"], "found str"),
    ],
)
def test_what_does_not_fit_is_said(source, message):
    with pytest.raises(planish.InputError, match=message):
        CalibrationData.read(source, features())


def test_no_mask_means_no_padding():
    assert token_mask({"x": ROWS[0]}) is None
    assert token_mask({"attention_mask": np.ones((2, 3))}) is None
    beside_a_cache = {"input_ids": IDS, "attention_mask": np.array([[0, 1, 1, 1, 1], [1, 1, 1, 0, 1]])}
    assert token_mask(beside_a_cache).tolist() == [[True, True, True], [True, False, True]]


def test_labels_travel_with_training_data():
    item = {"a": np.ones((2, 3), np.float32), "b": np.ones((2, 3), np.float32), "labels": np.array([4, 5])}
    (feeds,) = CalibrationData.read([item], two_inputs(), labels=True)
    np.testing.assert_array_equal(feeds["labels"], [4, 5])
    with pytest.raises(InputError, match=r"item 0: expected the inputs \['a', 'b'\], found"):
        CalibrationData.read([item], two_inputs())


@pytest.mark.parametrize(
    ("labels", "message"),
    [(np.zeros(3), r"first axis of \[2\]"), (np.array([1.0, np.nan]), "NaN or infinity")],
)
def test_labels_that_do_not_fit(labels, message):
    item = {"a": np.ones((2, 3), np.float32), "b": np.ones((2, 3), np.float32), "labels": labels}
    with pytest.raises(InputError, match=message):
        CalibrationData.read([item], two_inputs(), labels=True)


def test_data_is_fitted_to_a_cache_with_fewer_heads():
    model = parse(DECODER)
    (feeds,) = CalibrationData.read([{"input_ids": IDS}], model)
    past = np.ones((2, 2, 1, 4), np.float32)
    filled = {
        **feeds,
        "attention_mask": np.ones((2, 4), np.int64),
        "past_key_values.0.key": past,
        "past_key_values.0.value": past,
    }
    assert fitted(filled, model).keys() == filled.keys()
    assert fitted(filled, model)["past_key_values.0.key"] is past
    for value in model.graph.inputs:
        if value.name.startswith("past"):
            value.shape = ir.Shape(["batch", 1, "past", 4])
    found = fitted(filled, model)
    assert found["past_key_values.0.key"].shape == found["past_key_values.0.value"].shape == (2, 1, 0, 4)
    assert found["attention_mask"].shape == (2, 3)
    np.testing.assert_array_equal(found["input_ids"], IDS)


def test_data_for_inputs_that_are_gone_is_left_out():
    model = parse(DECODER)
    data = CalibrationData.read([{"input_ids": IDS}], model)
    model.graph.inputs[:] = [value for value in model.graph.inputs if value.name == "input_ids"]
    (feeds,) = data.fitted(model)
    assert list(feeds) == ["input_ids"]
