"""Calling a graph like the module it came from: arguments to feeds, outputs to results."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.utils._pytree as pytree
from planish.ir.errors import InputError
from planish.ir.signature import (
    Signature,
    default_arguments,
    flatten_inputs,
    flatten_with_paths,
    path_name,
    unflatten_outputs,
)

Point = namedtuple("Point", "x y")
X, Y, Z = torch.zeros(2), torch.ones(2), torch.full((2,), 2.0)


@pytest.fixture
def signature() -> Signature:
    """forward(x, pair, scale=2, *, mask=None), traced with tensors x and pair = (a, {"b": ...})."""
    return Signature(
        input_names=("x", "pair.0", "pair.1.b"),
        output_names=("logits", "size", "hidden.0"),
        input_paths=(("x",), ("pair", 0), ("pair", 1, "b")),
        parameters=("x", "pair", "scale"),
        constants=((("scale",), 2), (("mask",), None)),
        output_tree=pytree.tree_structure({"logits": 0, "size": 0, "hidden": (0, 0)}),
        output_constants=((3, None),),
        output_scalars=(1,),
    )


def test_paths_follow_keys_indices_and_fields() -> None:
    tree = {"a": (X, [Y]), "p": Point(x=Z, y=None)}
    assert [path for path, _ in flatten_with_paths(tree)] == [("a", 0), ("a", 1, 0), ("p", "x"), ("p", "y")]


def test_paths_come_in_the_order_of_torch() -> None:
    tree = {"z": (1, [2, {"k": 3}]), "a": Point(x=4, y=(5,)), "n": None}
    assert [leaf for _, leaf in flatten_with_paths(tree)] == pytree.tree_leaves(tree)


def test_path_name_joins_with_dots() -> None:
    assert path_name(("past_key_values", 0, "key")) == "past_key_values.0.key"


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X, (Y, {"b": Z})), {}),
        ((X,), {"pair": (Y, {"b": Z})}),
        ((), {"pair": (Y, {"b": Z}), "x": X, "scale": 2, "mask": None}),
    ],
)
def test_positional_and_keyword_calls_give_the_same_feeds(signature, args, kwargs) -> None:
    feeds = flatten_inputs(signature, args, kwargs)
    assert list(feeds) == ["x", "pair.0", "pair.1.b"]
    assert feeds["x"] is X
    assert feeds["pair.0"] is Y
    assert feeds["pair.1.b"] is Z


def test_numpy_arrays_are_inputs(signature) -> None:
    array = np.zeros(2)
    assert flatten_inputs(signature, (array, (Y, {"b": Z})))["x"] is array


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((X,), {}, r"input 'pair\.0' of the model is missing"),
        ((3, (Y, {"b": Z})), {}, "input 'x' of the model is a int"),
        ((X, (Y, {"b": Z})), {"mask": Y}, "input 'mask' was not a tensor input"),
        ((X, (Y, {"b": Z})), {"scale": 3}, "'scale' is 3, the model was traced with 2"),
        ((X, (Y, {"b": Z})), {"unknown": True}, "'unknown' is True"),
        ((X, (Y, {"b": Z}), 2, 1), {}, "4 positional arguments were given, the module takes 3"),
        ((X, (Y, {"b": Z})), {"x": X}, "argument 'x' was given by position and by name"),
    ],
)
def test_a_call_that_does_not_fit_is_one_clear_error(signature, args, kwargs, message) -> None:
    with pytest.raises(InputError, match=message):
        flatten_inputs(signature, args, kwargs)


def test_variadic_arguments_are_numbered() -> None:
    signature = Signature(
        input_names=("x", "rest.0", "rest.1"),
        output_names=("output",),
        input_paths=(("x",), ("rest", 0), ("rest", 1)),
        parameters=("x",),
        variadic="rest",
    )
    assert flatten_inputs(signature, (X, Y, Z)) == {"x": X, "rest.0": Y, "rest.1": Z}
    with pytest.raises(InputError, match=r"rest\.1"):
        flatten_inputs(signature, (X, Y))


def test_results_have_the_module_s_structure_constants_and_numbers(signature) -> None:
    result = unflatten_outputs(signature, [X, np.array(7), Y])
    assert result == {"logits": X, "size": 7, "hidden": (Y, None)}
    assert type(result["size"]) is int


def test_a_wrong_number_of_outputs_is_an_error(signature) -> None:
    with pytest.raises(InputError, match="2 outputs were given, the model has 3"):
        unflatten_outputs(signature, [X, Y])


def test_default_arguments_are_those_that_the_call_leaves_out() -> None:
    class Module(torch.nn.Module):
        def forward(self, x, scale=2, *, mask=None, flag=True): ...

    assert default_arguments(Module(), (X,), {"flag": False}) == {"scale": 2, "mask": None}
    with pytest.raises(InputError, match=r"do not fit Module\.forward"):
        default_arguments(Module(), (), {"y": X})


def graph(inputs: Sequence[str], outputs: Sequence[str]) -> ir.Graph:
    return ir.Graph([ir.val(name) for name in inputs], [ir.val(name) for name in outputs], nodes=[])


def test_a_graph_that_lost_an_input_ignores_its_tensor(signature: Signature) -> None:
    restricted = signature.restricted(graph(["x", "pair.0"], signature.output_names))
    assert list(flatten_inputs(restricted, (X, (Y, {"b": Z})))) == ["x", "pair.0"]
    assert list(flatten_inputs(restricted, (X, (Y, {})))) == ["x", "pair.0"]


def test_none_stands_where_a_lost_output_was(signature: Signature) -> None:
    restricted = signature.restricted(graph(signature.input_names, ["logits", "size"]))
    assert unflatten_outputs(restricted, [X, torch.tensor(3)]) == {
        "logits": X,
        "size": 3,
        "hidden": (None, None),
    }


def test_nothing_lost_is_nothing_changed(signature: Signature) -> None:
    same = graph([*signature.input_names, "more"], signature.output_names)
    assert signature.restricted(same) is signature
