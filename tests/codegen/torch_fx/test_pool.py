"""Pooling against onnxruntime."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from op_cases import Case, Draw, Generator, agree


def windows(draw: Draw, rank: int, *, dilated: bool = True) -> dict[str, Any]:
    """Attributes of windows over ``rank`` spatial dimensions; the kernels are at most 3 wide."""
    kernel = draw.integers(rank, 1, 3)
    attributes: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": draw.maybe(draw.integers(rank, 1, 3)),
        "dilations": draw.maybe(draw.integers(rank, 1, 2), 0.4 if dilated else 0),
    }
    if draw.flag(0.4):
        # Less than the kernel: a window of nothing but padding has no maximum.
        attributes["pads"] = [draw.integer(0, size - 1) for size in kernel * 2]
    else:
        attributes["auto_pad"] = draw.choice((None, "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"))
    if str(attributes.get("auto_pad")).startswith("SAME"):
        attributes["dilations"] = None  # onnxruntime's padding does not know of them
        # Steps longer than the window make the padding negative: onnxruntime differs from pool to pool.
        steps = attributes["strides"] or [1] * rank
        attributes["strides"] = [min(step, size) for step, size in zip(steps, kernel, strict=True)]
    return attributes


def pool(draw: Draw, dtypes: tuple[str, ...], **more: Any) -> Case:
    rank = draw.integer(1, 3)
    x = draw.array([draw.integer(1, 2), draw.integer(1, 3), *draw.integers(rank, 5, 8)], draw.choice(dtypes))
    attributes = windows(draw, rank) | {"ceil_mode": draw.maybe(draw.integer(0, 1))}
    return Case([x], attributes | {name: draw.maybe(draw.choice(of)) for name, of in more.items()}, terms=2)


def global_pool(draw: Draw) -> Case:
    shape = [draw.integer(1, 3), draw.integer(1, 3), *draw.integers(draw.integer(1, 3), 1, 5)]
    return Case([draw.array(shape, draw.choice(("float32", "float16")))], terms=4)


CASES: dict[str, Generator] = {
    "AveragePool": functools.partial(pool, dtypes=("float32",), count_include_pad=(0, 1)),
    "GlobalAveragePool": global_pool,
    "GlobalMaxPool": global_pool,
    "LpPool": functools.partial(pool, dtypes=("float32",), p=(1, 2, 3)),
    "MaxPool": functools.partial(pool, dtypes=("float32", "float64", "int8", "uint8"), storage_order=(0, 1)),
}


@pytest.mark.parametrize("op_type", CASES)
def test_op_agrees_with_onnxruntime(op_type: str) -> None:
    agree(op_type, CASES[op_type])
