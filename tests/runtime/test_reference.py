"""Running graphs for their values, inputs that are made up for them, and where two graphs differ."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from planish.ir.errors import InputError, ModelError, TargetError
from planish.runtime import localize
from planish.runtime.example_inputs import example_inputs
from planish.runtime.localize import first_difference, relative_error
from planish.runtime.model_file import ModelFile, read_inputs
from planish.runtime.reference import run_model


def parse(text: str) -> ir.Model:
    model = ir.from_proto(onnx.parser.parse_model(text))
    for node in model.graph:
        node.name = f"{node.outputs[0].name}.node"
    return model


TWO_LAYERS = """<ir_version: 11, opset_import: ["": 23]>
    net (float[batch, 2] x) => (float[batch, 2] y)
    <float[2, 2] "l0.weight" = {1,2,3,4}, float[2, 2] "l1.weight" = {1,-1,2,1}>
    { h = MatMul(x, "l0.weight")  a = Relu(h)  y = MatMul(a, "l1.weight") }"""
X = {"x": np.array([[1.0, -1.0], [2.0, 0.5]], np.float32)}
WEIGHTS = (np.array([[1, 2], [3, 4]], np.float64), np.array([[1, -1], [2, 1]], np.float64))


def test_outputs_and_intermediate_tensors_agree_with_numpy():
    hidden = X["x"].astype(np.float64) @ WEIGHTS[0]
    expected = np.maximum(hidden, 0) @ WEIGHTS[1]
    values = run_model(parse(TWO_LAYERS), X, ["h", "y"])
    # Sums of two small integers: exact in float32.
    np.testing.assert_array_equal(values["h"], hidden)
    np.testing.assert_array_equal(values["y"], expected)
    assert list(run_model(parse(TWO_LAYERS), X)) == ["y"]


def test_only_what_the_outputs_need_is_run():
    model = parse(TWO_LAYERS)
    model.graph.node("y.node").op_type = "NoSuchOp"
    assert list(run_model(model, X, ["a"])) == ["a"]
    with pytest.raises(TargetError, match="NoSuchOp"):
        run_model(model, X)


def test_optional_outputs_stay_where_nobody_reads_them():
    # onnxruntime's Attention refuses past_key without present_key.
    model = parse(
        """<ir_version: 11, opset_import: ["": 23]>
        net (float[1, 1, 2, 4] q, float[1, 1, 3, 4] past) => (float[1, 1, 2, 4] y, float[1, 1, 5, 4] key)
        { y, key, value = Attention(q, q, q, , past, past) }"""
    )
    feeds = {"q": np.ones((1, 1, 2, 4), np.float32), "past": np.zeros((1, 1, 3, 4), np.float32)}
    assert run_model(model, feeds, ["y"])["y"].shape == (1, 1, 2, 4)


def test_a_branch_that_captures_a_value_can_be_left_out():
    model = ir.from_proto(
        onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["": 21]>
            net (float[2] x, bool flag) => (float[2] y)
            { a = Neg(x)
              y = If (flag) <then_branch = yes () => (float[2] t) { t = Abs(a) },
                             else_branch = no () => (float[2] e) { e = Exp(a) }> }"""
        )
    )
    feeds = {"x": np.array([1, -2], np.float32), "flag": np.array(True)}
    np.testing.assert_array_equal(run_model(model, feeds, ["a"])["a"], [-1, 2])


def test_running_leaves_the_model_alone():
    model = parse(TWO_LAYERS)
    run_model(model, X, ["h"])
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert len(model.graph) == 3


def test_inputs_that_do_not_fit_are_named():
    with pytest.raises(InputError, match="no tensor 'nothing'"):
        run_model(parse(TWO_LAYERS), X, ["nothing"])
    with pytest.raises(InputError, match=r"missing \['x'\]"):
        run_model(parse(TWO_LAYERS), {})
    with pytest.raises(InputError, match="expected dtype float32, found float64"):
        run_model(parse(TWO_LAYERS), {"x": X["x"].astype(np.float64)})


def test_functions_are_run():
    model = parse(
        """<ir_version: 11, opset_import: ["": 23, "planish": 1]>
        net (float[2] x) => (float[2] y) { y = planish.Twice(x) }
        <domain: "planish", opset_import: ["": 23]> Twice (x) => (y) { y = Add(x, x) }"""
    )
    assert run_model(model, {"x": np.array([1, 2], np.float32)})["y"].tolist() == [2.0, 4.0]


def test_the_first_difference_is_named_with_layer_and_weight():
    before, after = parse(TWO_LAYERS), parse(TWO_LAYERS)
    weight = after.graph.initializers["l1.weight"]
    weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(2), name=weight.name)
    found = first_difference(before, after, X, tolerance=1e-6)
    assert (found.tensor, found.layer, found.node, found.changed_weights) == (
        "y",
        "l1",
        "y.node",
        ("l1.weight",),
    )
    assert found.error == 1.0
    assert first_difference(before, before, X, tolerance=0.0) is None


def test_a_tensor_that_vanished_names_the_layer_that_is_gone():
    with_bias = """<ir_version: 11, opset_import: ["": 23]>
        net (float[batch, 2] x) => (float[batch, 2] y)
        <float[2, 2] "l0.weight" = {1,2,3,4}, float[2] "l0.bias" = {1,1}>
        { h = MatMul(x, "l0.weight")  b = Add(h, "l0.bias")  y = Relu(b) }"""
    without = with_bias.replace('b = Add(h, "l0.bias")  y = Relu(b)', "y = Relu(h)")
    found = first_difference(parse(with_bias), parse(without), X, tolerance=1e-6)
    assert (found.tensor, found.layer, found.vanished) == ("y", "l0", ("b",))
    assert "'b' before it is gone" in str(found)


def test_tensors_are_compared_in_runs_that_fit_into_memory(monkeypatch):
    before, after = parse(TWO_LAYERS), parse(TWO_LAYERS)
    weight = after.graph.initializers["l1.weight"]
    weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(2), name=weight.name)
    fetched: list[list[str]] = []

    def spy(model, feeds, names):
        fetched.append(names)
        return run_model(model, feeds, names)

    monkeypatch.setattr(localize, "run_model", spy)
    for value in (node.outputs[0] for node in after.graph):
        value.shape, value.type = ir.Shape(["batch", 2]), ir.TensorType(ir.DataType.FLOAT)
    # Each tensor is 2 × 2 floats, 16 bytes: two fit.
    monkeypatch.setattr(localize, "_CHUNK_BYTES", 32)
    assert first_difference(before, after, X, tolerance=1e-6).tensor == "y"
    assert fetched == [["h", "a"], ["h", "a"], ["y"], ["y"]]


def test_differences_that_no_wanted_output_depends_on_do_not_count():
    two = """<ir_version: 11, opset_import: ["": 23]>
        net (float[2] x) => (float[2] y, float[2] z) { y = Relu(x)  z = Neg(x) }"""
    other = parse(two.replace("z = Neg(x)", "z = Abs(x)"))
    feeds = {"x": np.array([1, -2], np.float32)}
    assert first_difference(parse(two), other, feeds, tolerance=0, outputs=["y"]) is None
    assert first_difference(parse(two), other, feeds, tolerance=0).tensor == "z"


@pytest.mark.parametrize(
    ("value", "reference", "error"),
    [
        (np.float32([1, 2]), np.float32([1, 2]), 0.0),
        (np.float32([1, 3]), np.float32([1, 2]), 0.5),
        (np.float32([0, 1e-3]), np.float32([0, 0]), 1e-3),
        (np.float32([1, np.nan]), np.float32([1, np.nan]), 0.0),
        (np.float32([1, np.nan]), np.float32([1, 2]), np.inf),
        (np.float32([1, 2]), np.float32([1, np.nan]), np.inf),
        (np.float32([1, -np.inf]), np.float32([1, -np.inf]), 0.0),
        (np.float32([1, np.inf]), np.float32([1, -np.inf]), np.inf),
        (np.float32([1, 2]), np.float32([[1, 2]]), np.inf),
        (np.float32([1, 2]), np.float64([1, 2]), np.inf),
        (np.int64([1, 2]), np.int64([1, 2]), 0.0),
        (np.int64([1, 2]), np.int64([1, 3]), np.inf),
        (np.array(["a", "b"]), np.array(["a", "b"]), 0.0),
        (np.array(["a", "b"]), np.array(["a", "c"]), np.inf),
        (np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32), 0.0),
    ],
)
def test_relative_errors(value, reference, error):
    measured, words = relative_error(value, reference)
    # One float32 rounding of the inputs.
    assert measured == pytest.approx(error, rel=1e-7)
    assert words


DECODER = """<ir_version: 11, opset_import: ["": 23]>
    net (int64[batch_size, sequence_length] input_ids,
         int64[batch_size, total_sequence_length] attention_mask,
         int64[batch_size, sequence_length] position_ids, bool flag,
         float[batch_size, 2, past_sequence_length, 4] "past_key_values.0.key",
         float[batch_size, 3, height, 32] pixel_values)
        => (float[batch_size, sequence_length, 3] y)
    <float[7, 3] table = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2,3}>
    { ids = Cast<to = 7>(input_ids)  y = Gather(table, ids) }"""


def test_made_up_inputs_follow_names_shapes_and_tables():
    inputs = example_inputs(parse(DECODER))
    assert {name: array.shape for name, array in inputs.items()} == {
        "input_ids": (2, 5),
        "attention_mask": (2, 8),
        "position_ids": (2, 5),
        "flag": (),
        "past_key_values.0.key": (2, 2, 3, 4),
        "pixel_values": (2, 3, 64, 32),
    }
    assert inputs["input_ids"].dtype == np.int64
    assert 0 <= inputs["input_ids"].min() <= inputs["input_ids"].max() < 7
    assert len(np.unique(inputs["input_ids"])) > 1
    assert inputs["attention_mask"].all()
    assert inputs["position_ids"].tolist() == [[3, 4, 5, 6, 7]] * 2
    assert inputs["past_key_values.0.key"].dtype == np.float32
    run_model(parse(DECODER), inputs)


def test_made_up_inputs_take_sizes_and_are_the_same_each_time():
    sizes = {"batch_size": 1, "sequence_length": 4, "past_sequence_length": 6}
    inputs = example_inputs(parse(DECODER), sizes=sizes)
    assert inputs["attention_mask"].shape == (1, 10)
    again = example_inputs(parse(DECODER), sizes=sizes)
    assert all(np.array_equal(inputs[name], again[name]) for name in inputs)
    other = example_inputs(parse(DECODER), sizes=sizes, seed=1)
    assert not np.array_equal(inputs["pixel_values"], other["pixel_values"])
    with pytest.raises(InputError, match="no dimension 'batch' — symbolic dimensions: batch_size"):
        example_inputs(parse(DECODER), sizes={"batch": 1})


def test_sums_of_dimensions_are_followed():
    model = parse(TWO_LAYERS)
    model.graph.inputs[0].shape = ir.Shape(["past_sequence_length + sequence_length", "sequence_length"])
    model.graph.inputs.append(ir.val("past", ir.DataType.FLOAT, ["past_sequence_length"]))
    inputs = example_inputs(model)
    assert inputs["x"].shape == (inputs["past"].size + inputs["x"].shape[1], inputs["x"].shape[1])


def test_inputs_without_a_declaration_are_refused():
    model = parse(TWO_LAYERS)
    model.graph.inputs[0].shape = None
    with pytest.raises(InputError, match="input 'x' declares no tensor type and shape"):
        example_inputs(model)


def test_a_file_is_run_as_it_is(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(ir.to_proto(parse(TWO_LAYERS)), path)
    expected = run_model(parse(TWO_LAYERS), X)["y"]
    np.testing.assert_array_equal(ModelFile(path).run(X)["y"], expected)
    with pytest.raises(InputError, match="inputs do not match"):
        ModelFile(path).run({})
    with pytest.raises(ModelError, match="no such file"):
        ModelFile(tmp_path / "missing.onnx")
    path.write_bytes(b"not a model")
    with pytest.raises(TargetError, match="cannot load"):
        ModelFile(path)


def test_inputs_are_read_from_an_archive_and_from_nothing_else(tmp_path):
    path = tmp_path / "inputs.npz"
    np.savez(path, **X)
    np.testing.assert_array_equal(read_inputs(path)["x"], X["x"])
    with pytest.raises(InputError, match="cannot be read as inputs"):
        read_inputs(tmp_path / "missing.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(InputError, match="cannot be read as inputs"):
        read_inputs(tmp_path / "text.npz")
    np.save(tmp_path / "one.npy", X["x"])
    with pytest.raises(InputError, match="found one array"):
        read_inputs(tmp_path / "one.npy")
    np.savez(tmp_path / "objects.npz", x=np.array([object()]))
    with pytest.raises(InputError, match="cannot be read as inputs"):
        read_inputs(tmp_path / "objects.npz")
