"""Ops that lay elements out anew, and those that compute shapes, against onnxruntime."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from op_cases import ANY, Array, Case, Draw, Generator, agree

INT64_MAX, INT64_MIN = np.iinfo(np.int64).max, np.iinfo(np.int64).min


def moved(draw: Draw, shape: Sequence[int]) -> Array:
    return draw.array(shape, draw.choice(ANY))


def factors(draw: Draw, total: int) -> list[int]:
    """Sizes of a random shape of so many elements."""
    sizes = []
    while total > 1:
        divisor = draw.choice([d for d in range(2, total + 1) if total % d == 0])
        sizes.append(divisor)
        total //= divisor
    return [*sizes, *[1] * draw.integer(0, 2)]


def reshape(draw: Draw) -> Case:
    """To other sizes, of which one may be left open and some be kept; or an empty one, with ``allowzero``."""
    shape = draw.shape()
    if draw.flag(0.15):
        return Case([moved(draw, [3, 0, 2]), draw.vector([0, 5])], {"allowzero": 1}, exact=True)
    if draw.flag(0.3) and shape:
        kept = draw.integer(1, len(shape))
        sizes = [0] * kept + factors(draw, math.prod(shape[kept:]))
    else:
        sizes = factors(draw, math.prod(shape))
    if sizes and draw.flag(0.4):
        sizes[draw.integer(0, len(sizes) - 1)] = -1
    return Case([moved(draw, shape), draw.vector(sizes)], {"allowzero": draw.maybe(0)}, exact=True)


def flatten(draw: Draw) -> Case:
    shape = draw.shape(empty=True)
    axis = draw.integer(-len(shape), len(shape))
    return Case([moved(draw, shape)], {"axis": axis if axis != 1 else draw.maybe(1)}, exact=True)


def transpose(draw: Draw) -> Case:
    shape = draw.shape(empty=True)
    perm = draw.maybe(draw.rng.permutation(len(shape)).tolist()) or None
    return Case([moved(draw, shape)], {"perm": perm}, exact=True)


def squeeze(draw: Draw) -> Case:
    shape = [1 if draw.flag(0.4) else size for size in draw.shape()]
    ones = [axis for axis, size in enumerate(shape) if size == 1]
    chosen = [axis - len(shape) if draw.flag(0.3) else axis for axis in ones if draw.flag()]
    return Case([moved(draw, shape), draw.maybe(draw.vector(chosen)) if chosen else None], exact=True)


def unsqueeze(draw: Draw) -> Case:
    shape, count = draw.shape(empty=True), draw.integer(1, 3)
    return Case([moved(draw, shape), draw.vector(draw.axes(len(shape) + count, count))], exact=True)


def expand(draw: Draw) -> Case:
    whole = draw.shape(empty=True)
    shape, wanted = draw.broadcastable(whole), draw.broadcastable(whole)
    return Case([moved(draw, shape), draw.vector(wanted)], exact=True)


def concat(draw: Draw) -> Case:
    shape, dtype = list(draw.shape(1)), draw.choice(ANY)
    axis = draw.axis(len(shape))
    operands = []
    for _ in range(draw.integer(1, 4)):
        shape[axis] = draw.integer(0, 4)
        operands.append(draw.array(shape, dtype))
    return Case(operands, {"axis": axis}, exact=True)


def split(draw: Draw) -> Case:
    shape = list(draw.shape(1))
    axis, outputs = draw.axis(len(shape)), draw.integer(1, 4)
    attributes: dict[str, Any] = {"axis": axis or draw.maybe(0)}
    sizes: Array | None = None
    if draw.flag():
        parts = draw.integers(outputs, 0, 3)
        shape[axis], sizes = sum(parts), draw.vector(parts)
    else:
        size = draw.integer(1, 3)
        shape[axis] = size * (outputs - 1) + draw.integer(1, size)
        attributes["num_outputs"] = outputs
    return Case([moved(draw, shape), sizes], attributes, outputs=outputs, exact=True)


def strided_slice(draw: Draw) -> Case:
    shape = draw.shape(1)
    axes = draw.axes(len(shape), draw.integer(1, len(shape)))
    if draw.flag(0.3):
        axes = list(range(len(axes)))
    starts, ends, steps = ([] for _ in range(3))
    for axis in axes:
        size = shape[axis]
        step = draw.choice((1, 1, 2, -1, -2, 7))
        bounds = [draw.integer(-size - 2, size + 2), INT64_MAX, INT64_MIN]
        starts.append(draw.choice((bounds[0], 0) if step > 0 else (bounds[0], INT64_MAX)))
        ends.append(draw.choice((draw.integer(-size - 2, size + 2), INT64_MAX if step > 0 else INT64_MIN)))
        steps.append(step)
    in_order = axes == list(range(len(axes)))
    operands = [starts, ends, None if in_order and draw.flag() else axes]
    operands.append(None if set(steps) == {1} and draw.flag() else steps)
    return Case([moved(draw, shape), *(x if x is None else draw.vector(x) for x in operands)], exact=True)


def tile(draw: Draw) -> Case:
    shape = draw.shape(1)
    return Case([moved(draw, shape), draw.vector(draw.integers(len(shape), 0, 3))], exact=True)


def pad(draw: Draw) -> Case:
    """Also by less than nothing, if with a constant; onnxruntime has that for the other modes, if at all."""
    mode = draw.choice(("constant", "reflect", "edge", "wrap"))
    shape, dtype = draw.shape(1), draw.choice(("float32", "float64", "int32", "int64", "uint8", "bool"))
    axes = draw.axes(len(shape), draw.integer(1, len(shape))) if draw.flag(0.4) else None
    along = range(len(shape)) if axes is None else axes
    if mode == "constant":
        amounts = [[draw.integer(-(shape[axis] // 2), 3) for axis in along] for _ in range(2)]
    elif mode == "edge":
        amounts = [[draw.integer(0, 3) for _ in along] for _ in range(2)]
    else:
        amounts = [[draw.integer(0, shape[axis] - (mode == "reflect")) for axis in along] for _ in range(2)]
    value = draw.maybe(draw.array((), dtype)) if mode == "constant" else None
    attributes = {"mode": mode if mode != "constant" else draw.maybe(mode)}
    operands = [draw.array(shape, dtype), draw.vector([*amounts[0], *amounts[1]]), value]
    return Case([*operands, None if axes is None else draw.vector(axes)], attributes, exact=True)


def shape_of(draw: Draw) -> Case:
    shape = draw.shape(empty=True)
    bounds = {name: draw.maybe(draw.integer(-len(shape) - 1, len(shape) + 1)) for name in ("start", "end")}
    return Case([moved(draw, shape)], bounds)


def size_of(draw: Draw) -> Case:
    return Case([moved(draw, draw.shape(empty=True))])


def value_range(draw: Draw) -> Case:
    """Also of nothing, where the step leads away from the limit. Steps are exact in binary."""
    dtype = draw.choice(("int32", "int64", "float32", "float64"))
    step = draw.choice((-3, -2, -1, 1, 2, 3)) / (4 if dtype.startswith("float") else 1)
    return Case([np.array(x, dtype) for x in (draw.integer(-5, 5), draw.integer(-9, 9), step)], exact=True)


def constant_of_shape(draw: Draw) -> Case:
    value = draw.array([1], draw.choice(ANY))
    return Case(
        [draw.vector(draw.shape(empty=True))],
        {"value": draw.maybe(onnx.numpy_helper.from_array(value))},
        exact=True,
    )


def eye_like(draw: Draw) -> Case:
    dtypes = (None, onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.INT64)
    x = draw.array(draw.shape(2, 2), draw.choice(("float32", "float64", "int32", "int64")))
    return Case([x], {"dtype": draw.choice(dtypes), "k": draw.maybe(draw.integer(-4, 4))}, exact=True)


def triangle(draw: Draw) -> Case:
    x = draw.array(draw.shape(2, empty=True), draw.choice(("float32", "float64", "int64", "bool")))
    diagonal = draw.maybe(np.array(draw.integer(-6, 6)))
    return Case([x, diagonal], {"upper": draw.maybe(draw.integer(0, 1))}, exact=True)


def depth_to_space(draw: Draw) -> Case:
    size = draw.integer(1, 3)
    shape = [draw.integer(1, 2), size * size * draw.integer(1, 3), *draw.integers(2, 1, 4)]
    mode = draw.maybe(draw.choice(("DCR", "CRD")))
    return Case([draw.array(shape)], {"blocksize": size, "mode": mode}, exact=True)


def space_to_depth(draw: Draw) -> Case:
    size = draw.integer(1, 3)
    shape = [*draw.integers(2, 1, 3), *(size * x for x in draw.integers(2, 1, 4))]
    return Case([draw.array(shape, draw.choice(("float32", "float64")))], {"blocksize": size}, exact=True)


CASES: dict[str, Generator] = {
    "Concat": concat,
    "ConstantOfShape": constant_of_shape,
    "DepthToSpace": depth_to_space,
    "Expand": expand,
    "EyeLike": eye_like,
    "Flatten": flatten,
    "Pad": pad,
    "Range": value_range,
    "Reshape": reshape,
    "Shape": shape_of,
    "Size": size_of,
    "Slice": strided_slice,
    "SpaceToDepth": space_to_depth,
    "Split": split,
    "Squeeze": squeeze,
    "Tile": tile,
    "Transpose": transpose,
    "Trilu": triangle,
    "Unsqueeze": unsqueeze,
}


@pytest.mark.parametrize("op_type", CASES)
def test_op_agrees_with_onnxruntime(op_type: str) -> None:
    agree(op_type, CASES[op_type])
