"""Which dimensions stay dynamic, what they are called, and how examples are made fit for torch.export."""

from __future__ import annotations

import pytest
import torch
from planish.ir.dynamic_shapes import check_specialised, default_dims, enlarge, requested_dims
from planish.ir.errors import InputError, TraceError

IDS, IMAGE = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 3, 8, 8)


def labels(dims) -> dict[str, dict[int, str]]:
    return {name: {axis: dim.label for axis, dim in axes.items()} for name, axes in dims.items()}


def requested(spec, **tensors):
    return requested_dims(spec, {name: (name,) for name in tensors}, tensors)


def test_batch_and_sequence_of_integers_and_batch_of_floats() -> None:
    tensors = {
        "input_ids": IDS,
        "attention_mask": IDS.bool(),
        "pixel_values": IMAGE,
        "scale": torch.tensor(1.0),
    }
    text = {0: "batch_size", 1: "sequence_length"}
    assert labels(default_dims(tensors)) == {
        "input_ids": text,
        "attention_mask": text,
        "pixel_values": {0: "batch_size"},
        "scale": {},
    }


def test_another_size_gets_a_label_of_its_own() -> None:
    tensors = {"input_ids": IDS, "decoder_input_ids": IDS[:, :3], "pixel_values": torch.zeros(4, 3)}
    found = labels(default_dims(tensors))
    assert found["decoder_input_ids"] == {0: "batch_size", 1: "decoder_input_ids_sequence_length"}
    assert found["pixel_values"] == {0: "pixel_values_batch_size"}


def test_a_size_of_one_beside_larger_ones_broadcasts_and_stays_static() -> None:
    assert labels(default_dims({"position_ids": IDS[:1], "input_ids": IDS}))["position_ids"] == {
        1: "sequence_length"
    }


def test_sizes_of_one_everywhere_are_dynamic() -> None:
    assert labels(default_dims({"a": IDS[:1], "b": IDS[:1]}))["b"] == {0: "batch_size", 1: "sequence_length"}


@pytest.mark.parametrize(
    "spec",
    [
        {"x": {0: "batch", 2: "height"}},
        {"x": {0: "batch", -2: "height"}},
        {"x": ("batch", None, "height", None)},
        ({0: "batch", 2: "height"},),
        {"x": {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim.STATIC}},
    ],
)
def test_forms_of_dynamic_shapes(spec) -> None:
    dims = requested(spec, x=IMAGE)
    assert labels(dims) == {"x": {0: "batch", 2: "height"}}
    assert all(dim.required for dim in dims["x"].values())


def test_nested_entries_follow_the_arguments() -> None:
    paths = {"pair.0": ("pair", 0), "pair.1.b": ("pair", 1, "b"), "z": ("z",)}
    tensors = dict.fromkeys(paths, IDS)
    by_name = requested_dims({"pair": ({0: "n"}, {"b": {1: "m"}})}, paths, tensors)
    by_position = requested_dims((({0: "n"}, {"b": {1: "m"}}), None), paths, tensors)
    assert labels(by_name) == labels(by_position) == {"pair.0": {0: "n"}, "pair.1.b": {1: "m"}, "z": {}}


def test_auto_and_hints_get_the_default_labels() -> None:
    dims = requested(
        {"ids": "auto", "x": {0: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.AUTO}}, ids=IDS, x=IMAGE
    )
    assert labels(dims) == {
        "ids": {0: "batch_size", 1: "sequence_length"},
        "x": {0: "batch_size", 3: "x_dim_3"},
    }
    assert not dims["x"][3].required


def test_an_input_that_is_not_named_is_static() -> None:
    assert labels(requested({}, x=IMAGE)) == {"x": {}}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"y": {0: "batch"}}, "names 'y', which is no tensor input"),
        ({"x": {4: "depth"}}, "names axis 4 of input 'x', which has 4 axes"),
        ({"x": 3}, "dynamic_shapes of input 'x' is 3"),
        ({"x": {0: 1.5}}, r"has 1\.5"),
        ({"x": {2: "n", 1: "n"}}, "dimension 'n' is 8 in example 'x' and 3"),
    ],
)
def test_a_wrong_form_is_one_clear_error(spec, message) -> None:
    with pytest.raises(InputError, match=message):
        requested(spec, x=IMAGE)


def test_examples_grow_along_dynamic_dimensions_of_size_zero_and_one() -> None:
    tensors = {"ids": torch.tensor([[7]]), "mask": torch.tensor([[True]]), "past": torch.zeros(1, 2, 0, 4)}
    dims = requested(
        {"ids": ("batch", "length"), "mask": ("batch", "length"), "past": {0: "batch", 2: "past"}}, **tensors
    )
    grown = enlarge(tensors, dims)
    assert grown["ids"].shape == grown["mask"].shape
    assert (grown["ids"] == 7).all()
    sizes = {"batch": grown["ids"].shape[0], "length": grown["ids"].shape[1], "past": grown["past"].shape[2]}
    assert min(sizes.values()) >= 2
    assert len(set(sizes.values())) == 3, "equal sizes could be taken for one dimension"
    assert grown["past"].shape == (sizes["batch"], 2, sizes["past"], 4)


def test_examples_that_are_large_enough_are_not_copied() -> None:
    assert enlarge({"x": IMAGE}, default_dims({"x": IMAGE}))["x"] is IMAGE


def test_a_fixed_dimension_is_an_error_if_asked_for_and_a_remark_if_assumed() -> None:
    shapes = {"x": torch.Size([2, 3, 8, 8])}
    with pytest.raises(TraceError, match=r"dimension 2 \(height\) of 'x' is fixed at 8"):
        check_specialised(requested({"x": {2: "height"}}, x=IMAGE), shapes)
    (remark,) = check_specialised(default_dims({"x": IMAGE}), shapes)
    assert remark.startswith("dimension 0 (batch_size) of 'x' is fixed at 2")
