"""Convolutions of [N, C, spatial…] features, and sampling images at given places."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from .registry import Integers, Lowering, as_integers, standard
from .windows import flat, halves, padding, spread

Tensor = torch.Tensor
_CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED: tuple[Callable[..., Tensor], ...] = (
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)
_SAMPLINGS = {"linear": "bilinear", "nearest": "nearest", "cubic": "bicubic"}
"""ONNX's names for what torch calls the modes of `grid_sample`."""


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Convolution of [N, C, spatial…] with [out, C / group, kernel…]."""
    del kernel_shape  # the weight has it
    rank = weight.ndim - 2
    stride, dilation = list(strides or [1] * rank), list(dilations or [1] * rank)
    pairs = padding(x.shape[2:], spread(weight.shape[2:], dilation), stride, pads, auto_pad)
    x = F.pad(x, flat(pairs))
    return _CONVOLUTIONS[rank - 1](x, weight, bias, stride=stride, dilation=dilation, groups=group)


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The transpose of a convolution with [C, out / group, kernel…]; ``pads`` are cut off its result.

    ``output_padding`` adds to the end of the result, and ``output_shape`` says which pads give it.
    """
    del kernel_shape  # the weight has it
    rank = weight.ndim - 2
    stride, dilation = list(strides or [1] * rank), list(dilations or [1] * rank)
    whole = _TRANSPOSED[rank - 1](x, weight, stride=stride, dilation=dilation, groups=group)
    added = list(output_padding or [0] * rank)
    if output_shape is None and auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        output_shape = [size * step for size, step in zip(x.shape[2:], stride, strict=True)]
    if output_shape is None:
        pairs = padding(x.shape[2:], [], stride, pads, auto_pad)
    else:
        totals = (
            size + more - wanted
            for size, more, wanted in zip(whole.shape[2:], added, output_shape[-rank:], strict=True)
        )
        pairs = [halves(total, auto_pad) for total in totals]
    cut = [(-before, more - after) for (before, after), more in zip(pairs, added, strict=True)]
    result = F.pad(whole, flat(cut))
    return result if bias is None else result + bias.reshape([-1] + [1] * rank)


def columns_to_image(
    columns: Tensor,
    image_shape: Integers,
    block_shape: Integers,
    *,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """[N, C · block, blocks] to [N, C, spatial…]: the sum of the blocks where they overlap."""
    sizes, block = as_integers(image_shape), as_integers(block_shape)
    rank = len(sizes)
    stride, dilation = list(strides or [1] * rank), list(dilations or [1] * rank)
    pairs = padding(sizes, block, stride, pads, "NOTSET")
    padded = [before + size + after for size, (before, after) in zip(sizes, pairs, strict=True)]
    place = torch.zeros([1] * (2 * rank), dtype=torch.int64, device=columns.device)
    for axis, reach in enumerate(spread(block, dilation)):
        inside = torch.arange(block[axis], device=columns.device) * dilation[axis]
        starts = torch.arange(0, padded[axis] - reach + 1, stride[axis], device=columns.device)
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = len(inside), len(starts)
        place = place * padded[axis] + (inside.unsqueeze(1) + starts).reshape(shape)
    elements = columns.reshape(columns.shape[0], -1, place.numel())
    image = columns.new_zeros(*elements.shape[:2], math.prod(padded)).index_add(
        2, place.reshape(-1), elements
    )
    return F.pad(image.reshape(*image.shape[:2], *padded), [-amount for amount in flat(pairs)])


def grid_sample(
    x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros"
) -> Tensor:
    """x at the places of ``grid`` [N, spatial…, rank], which has −1 and 1 at the borders."""
    return F.grid_sample(
        x, grid, mode=_SAMPLINGS[mode], padding_mode=padding_mode, align_corners=bool(align_corners)
    )


def affine_grid(theta: Tensor, size: Integers, *, align_corners: int = 0) -> Tensor:
    """The places that the affine maps ``theta`` [N, rank, rank + 1] give the points of an image."""
    return F.affine_grid(theta, as_integers(size), align_corners=bool(align_corners))


OPS = standard(
    {
        "AffineGrid": Lowering(affine_grid, integers=(1,)),
        "Col2Im": Lowering(columns_to_image, integers=(1, 2)),
        "Conv": conv,
        "ConvTranspose": conv_transpose,
        "GridSample": grid_sample,
    }
)
