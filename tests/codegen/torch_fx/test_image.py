"""Convolutions and sampling against onnxruntime."""

from __future__ import annotations

import math
from typing import Any

import pytest
from op_cases import Case, Draw, Generator, agree


def window_attributes(draw: Draw, rank: int) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "strides": draw.maybe(draw.integers(rank, 1, 3)),
        "dilations": draw.maybe(draw.integers(rank, 1, 2), 0.4),
    }
    if draw.flag(0.4):
        attributes["pads"] = draw.integers(2 * rank, 0, 2)
    else:
        attributes["auto_pad"] = draw.choice((None, "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"))
    return attributes


def conv(draw: Draw) -> Case:
    rank, group, dtype = draw.integer(1, 3), draw.integer(1, 2), draw.choice(("float32", "float16"))
    channels, made, kernel = draw.integer(1, 3), draw.integer(1, 3), draw.integers(rank, 1, 3)
    x = draw.array([draw.integer(1, 2), group * channels, *draw.integers(rank, 5, 7)], dtype)
    weight = draw.array([group * made, channels, *kernel], dtype, -1, 1)
    bias = draw.maybe(draw.array([group * made], dtype))
    attributes = window_attributes(draw, rank)
    if str(attributes.get("auto_pad")).startswith("SAME"):
        attributes["dilations"] = None  # refused by onnxruntime
    attributes |= {"group": group if group > 1 else None, "kernel_shape": draw.maybe(kernel)}
    return Case([x, weight, bias], attributes, terms=math.sqrt(channels * math.prod(kernel)))


def conv_transpose(draw: Draw) -> Case:
    rank, group = draw.integer(1, 3), draw.integer(1, 2)
    channels, made, kernel = draw.integer(1, 3), draw.integer(1, 3), draw.integers(rank, 2, 3)
    x = draw.array([draw.integer(1, 2), group * channels, *draw.integers(rank, 4, 6)])
    weight = draw.array([group * channels, made, *kernel], low=-1, high=1)
    bias = draw.maybe(draw.array([group * made]))
    attributes = window_attributes(draw, rank)
    strides = attributes["strides"] or [1] * rank
    attributes |= {"group": group if group > 1 else None, "kernel_shape": draw.maybe(kernel)}
    if "pads" in attributes:
        attributes["pads"] = [min(amount, 1) for amount in attributes["pads"]]
        attributes["output_padding"] = draw.maybe([draw.integer(0, step - 1) for step in strides])
    elif not str(attributes["auto_pad"]).startswith("SAME") and draw.flag(0.3):
        dilations = attributes["dilations"] or [1] * rank
        sizes = zip(x.shape[2:], kernel, strides, dilations, strict=True)
        whole = [(size - 1) * step + (k - 1) * apart + 1 for size, k, step, apart in sizes]
        attributes |= {"output_shape": [size - draw.integer(0, 1) for size in whole], "auto_pad": None}
    else:
        attributes["strides"] = [min(step, k) for step, k in zip(strides, kernel, strict=True)]
    return Case([x, weight, bias], attributes, terms=math.sqrt(channels * math.prod(kernel)))


def columns_to_image(draw: Draw) -> Case:
    rank = draw.integer(1, 3)
    image, block = draw.integers(rank, 5, 6), draw.integers(rank, 1, 3)
    strides, dilations, pads = (
        draw.integers(rank, 1, 2),
        draw.integers(rank, 1, 2),
        draw.integers(2 * rank, 0, 1),
    )
    counts = [
        (image[d] + pads[d] + pads[rank + d] - dilations[d] * (block[d] - 1) - 1) // strides[d] + 1
        for d in range(rank)
    ]
    columns = draw.array([draw.integer(1, 2), draw.integer(1, 2) * math.prod(block), math.prod(counts)])
    attributes = {
        "strides": strides if max(strides) > 1 else draw.maybe(strides),
        "dilations": dilations if max(dilations) > 1 else draw.maybe(dilations),
        "pads": pads if max(pads) else draw.maybe(pads),
    }
    # Onnxruntime loses blocks that are dilated and apart, unless there are two dimensions.
    operands = [columns, draw.vector(image), draw.vector(block)]
    return Case(operands, attributes, terms=4, reference=rank != 2)


def grid_sample(draw: Draw) -> Case:
    mode = draw.choice(("linear", "nearest", "cubic"))
    rank = 2 if mode == "cubic" else draw.integer(2, 3)
    batch, channels = draw.integer(1, 2), draw.integer(1, 3)
    x = draw.array([batch, channels, *draw.integers(rank, 2, 5)])
    grid = draw.array([batch, *draw.integers(rank, 1, 4), rank], low=-1.3, high=1.3)
    attributes = {
        "mode": draw.maybe(mode) if mode == "linear" else mode,
        "padding_mode": draw.maybe(draw.choice(("zeros", "border", "reflection"))),
        "align_corners": draw.maybe(draw.integer(0, 1)),
    }
    # Places are rounded too: the differences between neighbours turn that into one of the result.
    return Case([x, grid], attributes, terms=16)


def affine_grid(draw: Draw) -> Case:
    rank, batch = draw.integer(2, 3), draw.integer(1, 2)
    theta = draw.array([batch, rank, rank + 1])
    size = draw.vector([batch, draw.integer(1, 3), *draw.integers(rank, 2, 5)])
    return Case([theta, size], {"align_corners": draw.maybe(draw.integer(0, 1))}, terms=4)


CASES: dict[str, Generator] = {
    "AffineGrid": affine_grid,
    "Col2Im": columns_to_image,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "GridSample": grid_sample,
}


@pytest.mark.parametrize("op_type", CASES)
def test_op_agrees_with_onnxruntime(op_type: str) -> None:
    agree(op_type, CASES[op_type])
