"""Normalisations against onnxruntime."""

from __future__ import annotations

import math
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from op_cases import Case, Draw, Generator, agree, model_of
from planish.codegen import get_target
from planish.codegen.torch_fx import lower
from planish.ir.errors import TargetError

TERMS = 8
"""Means of up to 60 terms, squares of them and a root: some roundings each."""


def epsilon(draw: Draw, dtype: str = "float32") -> float | None:
    """In float64, the default is 1e-5 for torch and the float32 next to it for onnxruntime."""
    return draw.maybe(draw.choice((1e-6, 1e-3, 0.1)), 1 if dtype == "float64" else 0.6)


def of_last_axes(draw: Draw, dtypes: tuple[str, ...], inputs: int) -> Case:
    """Scale, and a bias if there are three inputs, for the axes from one on."""
    shape, dtype = draw.shape(1), draw.choice(dtypes)
    axis = draw.axis(len(shape))
    of_axes = shape[axis % len(shape) :]
    parameters = [draw.array(of_axes, dtype), *[draw.maybe(draw.array(of_axes, dtype))] * (inputs - 2)]
    attributes: dict[str, Any] = {
        "axis": axis if axis != -1 else draw.maybe(-1),
        "epsilon": epsilon(draw, dtype),
    }
    attributes["stash_type"] = draw.maybe(onnx.TensorProto.FLOAT)
    return Case([draw.array(shape, dtype), *parameters], attributes, terms=TERMS)


def layer_normalization(draw: Draw) -> Case:
    return of_last_axes(draw, ("float32", "float64", "float16"), 3)


def rms_normalization(draw: Draw) -> Case:
    return of_last_axes(draw, ("float32", "float64", "float16"), 2)


def images(draw: Draw, channels: int) -> list[int]:
    return [draw.integer(1, 3), channels, *draw.integers(draw.integer(1, 3), 1, 4)]


def batch_normalization(draw: Draw) -> Case:
    channels, dtype = draw.integer(1, 5), draw.choice(("float32", "float64", "float16"))
    shape = images(draw, channels)[: draw.integer(2, 5)]
    parameters = [draw.array([channels], dtype) for _ in range(3)]
    variance = draw.array([channels], dtype, 0.1, 3)
    attributes = {
        "epsilon": epsilon(draw, dtype),
        "momentum": draw.maybe(0.5),
        "training_mode": draw.maybe(0),
    }
    return Case([draw.array(shape, dtype), *parameters, variance], attributes, terms=TERMS)


def group_normalization(draw: Draw) -> Case:
    groups = draw.integer(1, 3)
    channels = groups * draw.integer(1, 3)
    inputs = [draw.array(shape) for shape in (images(draw, channels), [channels], [channels])]
    attributes = {"num_groups": groups, "epsilon": epsilon(draw), "stash_type": draw.maybe(1)}
    return Case(inputs, attributes, terms=TERMS)


def instance_normalization(draw: Draw) -> Case:
    channels = draw.integer(1, 5)
    shape = images(draw, channels)
    inputs = [draw.array(shape), draw.array([channels]), draw.array([channels])]
    # Rounding is divided by the root of ε where a channel is one element, or some that are near each other.
    return Case(inputs, {"epsilon": 0.1 if math.prod(shape[2:]) < 4 else epsilon(draw)}, terms=TERMS)


def lp_normalization(draw: Draw) -> Case:
    x = draw.array(draw.shape(1), draw.choice(("float32", "float64")))
    if draw.flag(0.2):
        x[...] = 0
    axis = draw.axis(x.ndim)
    return Case(
        [x], {"axis": axis if axis != -1 else draw.maybe(-1), "p": draw.maybe(draw.integer(1, 2))}, terms=2
    )


def mean_variance_normalization(draw: Draw) -> Case:
    x = draw.array([draw.integer(2, 4), *draw.integers(3, 1, 4)])  # of one element, there is no deviation
    axes = draw.choice((None, [0, 2, 3], [0, 1, 2, 3]))
    return Case([x], {"axes": axes}, terms=TERMS)


def local_response_normalization(draw: Draw) -> Case:
    x = draw.array([draw.integer(1, 2), draw.integer(1, 7), *draw.integers(2, 1, 4)])
    attributes: dict[str, Any] = {"size": draw.choice((1, 3, 5))}
    for name, low, high in (("alpha", 1e-4, 1), ("beta", 0.3, 1), ("bias", 0.5, 2)):
        attributes[name] = draw.maybe(draw.number(low, high))
    return Case([x], attributes, terms=2)


CASES: dict[str, Generator] = {
    "BatchNormalization": batch_normalization,
    "GroupNormalization": group_normalization,
    "InstanceNormalization": instance_normalization,
    "LRN": local_response_normalization,
    "LayerNormalization": layer_normalization,
    "LpNormalization": lp_normalization,
    "MeanVarianceNormalization": mean_variance_normalization,
    "RMSNormalization": rms_normalization,
}


@pytest.mark.parametrize("op_type", CASES)
def test_op_agrees_with_onnxruntime(op_type: str) -> None:
    agree(op_type, CASES[op_type])


def test_training_is_refused_before_anything_runs() -> None:
    draw = Draw(0)
    case = batch_normalization(draw)
    case.attributes = {"training_mode": 1}
    model = ir.from_proto(model_of("BatchNormalization", case, draw))
    for refuse in (lower, get_target("torch").bind):
        with pytest.raises(
            TargetError, match=r"'node' \(BatchNormalization\): attribute 'training_mode' is 1"
        ):
            refuse(model)
