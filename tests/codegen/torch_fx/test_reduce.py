"""Reductions, running sums and softmax against onnxruntime."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import pytest
from op_cases import Array, Case, Draw, Generator, agree

FLOATS = ("float32", "float64", "float16")
NUMBERS = (*FLOATS, "int32", "int64")


def reduction(
    draw: Draw, dtypes: Sequence[str], low: float = -3, high: float = 3, *, empty: bool = True
) -> Case:
    dtype = draw.choice(dtypes)
    shape = draw.shape(0, empty=empty and dtype != "bool")  # onnxruntime has no extremum of no truths
    axes: Array | None = None
    if draw.flag(0.8):
        axes = draw.vector(draw.axes(len(shape)))
        if 0 in shape and len(axes):
            axes %= len(shape)  # onnxruntime does not reduce negative ones of nothing
    attributes = {
        "keepdims": draw.maybe(draw.integer(0, 1)),
        "noop_with_empty_axes": draw.maybe(draw.integer(0, 1)),
    }
    return Case([draw.array(shape, dtype, low, high), axes], attributes, terms=8)


def logarithm_of_sum(draw: Draw) -> Case:
    """Of sums of more than nothing; of one element by itself, onnxruntime takes no logarithm."""
    case = reduction(draw, FLOATS, 0.1, 3, empty=False)
    case.attributes = {**case.attributes, "noop_with_empty_axes": None}
    return case


def place(draw: Draw) -> Case:
    """Of few different numbers: there are equals."""
    shape = draw.shape(1)
    axis = draw.axis(len(shape))
    attributes = {
        "axis": axis or draw.maybe(0),
        "keepdims": draw.maybe(draw.integer(0, 1)),
        "select_last_index": draw.maybe(draw.integer(0, 1)),
    }
    dtype = draw.choice(("float32", "float64", "float16", "int32", "int8", "uint8"))
    return Case([np.round(draw.array(shape, dtype, -2, 2))], attributes)


def running_sum(draw: Draw) -> Case:
    """Terms of very different size: a sum without its last term is no difference of two sums."""
    shape, dtype = draw.shape(1, empty=True), draw.choice(("float32", "float64", "int32", "int64"))
    x = draw.array(shape, dtype, -9, 9)
    if draw.flag(0.3) and dtype.startswith("float"):
        x = x * 10 ** draw.array(shape, dtype, 0, 6)
        x = np.abs(x)
    axis = np.array(draw.axis(len(shape)), draw.choice(("int32", "int64")))
    attributes = {name: draw.maybe(draw.integer(0, 1)) for name in ("exclusive", "reverse")}
    return Case([x, axis], attributes)


def along_axis(draw: Draw, dtypes: Sequence[str] = FLOATS, *, empty: bool = True) -> Case:
    shape = draw.shape(1, empty=empty)
    axis = draw.axis(len(shape))
    x = draw.array(shape, draw.choice(dtypes), -9, 9)
    return Case([x], {"axis": axis if axis != -1 else draw.maybe(-1)}, terms=2)


def hardmax(draw: Draw) -> Case:
    case = along_axis(draw, ("float32",), empty=False)
    x = case.inputs[0]
    assert isinstance(x, np.ndarray)
    return Case([np.round(x / 3)], case.attributes, exact=True)


CASES: dict[str, Generator] = {
    "ArgMax": place,
    "ArgMin": place,
    "CumSum": running_sum,
    "Hardmax": hardmax,
    "LogSoftmax": along_axis,
    "ReduceL1": functools.partial(reduction, dtypes=(*FLOATS, "int32")),
    "ReduceL2": functools.partial(reduction, dtypes=(*FLOATS, "int32")),
    "ReduceLogSum": logarithm_of_sum,
    "ReduceLogSumExp": functools.partial(reduction, dtypes=FLOATS),
    "ReduceMax": functools.partial(reduction, dtypes=(*NUMBERS, "int8", "uint8", "bool")),
    "ReduceMean": functools.partial(reduction, dtypes=(*FLOATS, "int32"), empty=False),
    "ReduceMin": functools.partial(reduction, dtypes=(*NUMBERS, "int8", "uint8", "bool")),
    "ReduceProd": functools.partial(
        reduction, dtypes=("float32", "float64", "int32", "int64"), low=-2, high=2
    ),
    "ReduceSum": functools.partial(reduction, dtypes=NUMBERS),
    "ReduceSumSquare": functools.partial(reduction, dtypes=(*FLOATS, "int32")),
    "Softmax": along_axis,
}


@pytest.mark.parametrize("op_type", CASES)
def test_op_agrees_with_onnxruntime(op_type: str) -> None:
    agree(op_type, CASES[op_type])
