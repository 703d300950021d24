"""Convolutions, pooling and resizing of [N, C, …] features."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from ...ir.errors import TargetError
from .registry import Integers, Lowering, as_integers, standard

Tensor = torch.Tensor
_CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
_INTERPOLATIONS = {
    ("nearest", "asymmetric"): "nearest",
    ("linear", "half_pixel"): "centres",
    ("linear", "pytorch_half_pixel"): "centres",
    ("linear", "align_corners"): "corners",
}
"""(mode, coordinate transformation) that torch has too."""
_AVERAGE_POOLS: tuple[Callable[..., Tensor], ...] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_MAX_POOLS: tuple[Callable[..., Tensor], ...] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)


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
    spread = [(size - 1) * step + 1 for size, step in zip(weight.shape[2:], dilation, strict=True)]
    x = F.pad(x, _padding(x.shape[2:], spread, stride, pads, auto_pad))
    return _CONVOLUTIONS[rank - 1](x, weight, bias, stride=stride, dilation=dilation, groups=group)


def max_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    storage_order: int = 0,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The maximum in each window."""
    del storage_order  # of the second output, which is not lowered
    rank = len(kernel_shape)
    stride, dilation = list(strides or [1] * rank), list(dilations or [1] * rank)
    spread = [(size - 1) * step + 1 for size, step in zip(kernel_shape, dilation, strict=True)]
    amounts = _padding(x.shape[2:], spread, stride, pads, auto_pad)
    x = F.pad(x, amounts, value=-math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min)
    pool = _MAX_POOLS[rank - 1]
    return pool(x, list(kernel_shape), stride, dilation=dilation, ceil_mode=bool(ceil_mode))


def average_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The mean of each window, over its real elements, or with the padding's zeros.

    Raises:
        TargetError: the window is dilated.
    """
    rank = len(kernel_shape)
    if any(step != 1 for step in dilations or []):
        raise TargetError(f"torch-fx: AveragePool with dilations {list(dilations or [])} is not lowered")
    stride = list(strides or [1] * rank)
    amounts = _padding(x.shape[2:], kernel_shape, stride, pads, auto_pad)
    counted = F.pad(torch.ones_like(x[:1, :1]), amounts, value=float(count_include_pad))
    pool = _AVERAGE_POOLS[rank - 1]
    means, shares = (
        pool(values, list(kernel_shape), stride, ceil_mode=bool(ceil_mode))
        for values in (F.pad(x, amounts), counted)
    )
    return means / shares


def global_average_pool(x: Tensor) -> Tensor:
    """The mean over the spatial dimensions, which stay with size 1."""
    return x.mean(dim=list(range(2, x.ndim)), keepdim=True)


def _padding(
    sizes: Sequence[int], spread: Sequence[int], strides: Sequence[int], pads: Sequence[int] | None, mode: str
) -> list[int]:
    """The padding as `torch.nn.functional.pad` takes it: last dimension first."""
    rank = len(sizes)
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        pairs = []
        for size, window, stride in zip(sizes, spread, strides, strict=True):
            total = max((-(-size // stride) - 1) * stride + window - size, 0)
            smaller, larger = total // 2, total - total // 2
            pairs.append((smaller, larger) if mode == "SAME_UPPER" else (larger, smaller))
    elif mode == "VALID" or pads is None:
        pairs = [(0, 0)] * rank
    else:
        pairs = list(zip(pads[:rank], pads[rank:], strict=True))
    return [amount for pair in reversed(pairs) for amount in pair]


def resize(
    x: Tensor,
    region: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Integers | None = None,
    *,
    mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel",
    nearest_mode: str = "round_prefer_floor",
    antialias: int = 0,
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
) -> Tensor:
    """Resize images [N, C, …] to whole sizes as torch itself does: nearest (asymmetric, floor) or linear.

    Raises:
        TargetError: another way of interpolating, or batch and channels are resized too.
    """
    del region, cubic_coeff_a, exclude_outside, extrapolation_value  # of modes that are refused
    wanted = _resized(x, scales, sizes)
    transform = coordinate_transformation_mode
    interpolation = _INTERPOLATIONS.get((mode, transform), "")
    known = bool(interpolation) and not antialias and keep_aspect_ratio_policy == "stretch"
    known = known and (interpolation != "nearest" or nearest_mode == "floor")
    if transform == "pytorch_half_pixel":
        known = known and min(wanted[2:]) > 1  # a single pixel comes from the first one, and not the middle
    if not known or list(x.shape[:2]) != wanted[:2]:
        raise TargetError(f"torch-fx: Resize of {list(x.shape)} with {mode!r}, {transform!r} is not lowered")
    if interpolation == "nearest":
        return F.interpolate(x, wanted[2:], mode="nearest")
    linear = {3: "linear", 4: "bilinear", 5: "trilinear"}[x.ndim]
    return F.interpolate(x, wanted[2:], mode=linear, align_corners=interpolation == "corners")


def _resized(x: Tensor, scales: Tensor | None, sizes: Integers | None) -> list[int]:
    """The shape that is asked for."""
    if sizes is not None:
        return as_integers(sizes)
    factors = [] if scales is None else scales.tolist()
    products = [size * factor for size, factor in zip(x.shape, factors, strict=True)]
    if any(product != math.floor(product) for product in products):
        raise TargetError(f"torch-fx: Resize of {list(x.shape)} by {factors}: expected whole sizes")
    return [int(product) for product in products]


OPS = standard(
    {
        "AveragePool": average_pool,
        "Conv": conv,
        "GlobalAveragePool": global_average_pool,
        "MaxPool": max_pool,
        "Resize": Lowering(resize, integers=(3,)),
    }
)
