"""Pooling of [N, C, spatial…] features."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from .registry import standard
from .windows import Pairs, flat, padding, spread

Tensor = torch.Tensor
_MAX_POOLS: tuple[Callable[..., Tensor], ...] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)


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
    stride, dilation = _steps(kernel_shape, strides, dilations)
    pairs, _ = _reached(x, kernel_shape, stride, dilation, pads, auto_pad, ceil_mode)
    if not x.is_floating_point():
        x = F.pad(x, flat(pairs), value=torch.iinfo(x.dtype).min)
        return _reduced(x, kernel_shape, stride, dilation, torch.Tensor.amax)
    x = F.pad(x, flat(pairs), value=-math.inf)
    return _MAX_POOLS[len(kernel_shape) - 1](x, list(kernel_shape), stride, dilation=dilation)


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
    """The mean of each window, over its real elements, or with the padding's zeros."""
    stride, dilation = _steps(kernel_shape, strides, dilations)
    pairs, beyond = _reached(x, kernel_shape, stride, dilation, pads, auto_pad, ceil_mode)
    counted = torch.ones_like(x[:1, :1])
    if count_include_pad:
        # What ceil_mode reaches beyond the padding is no padding.
        inside = [(before, after - over) for (before, after), over in zip(pairs, beyond, strict=True)]
        counted = F.pad(F.pad(counted, flat(inside), value=1), flat([(0, over) for over in beyond]))
    else:
        counted = F.pad(counted, flat(pairs))
    sums, counts = (
        _reduced(values, kernel_shape, stride, dilation, torch.Tensor.sum)
        for values in (F.pad(x, flat(pairs)), counted)
    )
    return sums / counts


def lp_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    p: int = 2,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The p-norm of each window."""
    stride, dilation = _steps(kernel_shape, strides, dilations)
    pairs, _ = _reached(x, kernel_shape, stride, dilation, pads, auto_pad, ceil_mode)
    powers = F.pad(x.abs() ** p, flat(pairs))
    return _reduced(powers, kernel_shape, stride, dilation, torch.Tensor.sum) ** (1 / p)


def global_average_pool(x: Tensor) -> Tensor:
    """The mean over the spatial dimensions, which stay with size 1."""
    return x.mean(dim=list(range(2, x.ndim)), keepdim=True)


def global_max_pool(x: Tensor) -> Tensor:
    """The maximum over the spatial dimensions, which stay with size 1."""
    return x.amax(dim=list(range(2, x.ndim)), keepdim=True)


def _steps(
    kernel: Sequence[int], strides: Sequence[int] | None, dilations: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    return list(strides or [1] * len(kernel)), list(dilations or [1] * len(kernel))


def _reached(
    x: Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int] | None,
    auto_pad: str,
    ceil_mode: int,
) -> tuple[Pairs, list[int]]:
    """The padding up to the end of the last window, and how much of it is beyond the padding asked for.

    With ``ceil_mode`` the last window may reach beyond, but it does not start behind the real elements.
    """
    reach = spread(kernel, dilations)
    pairs, beyond = [], []
    asked = padding(x.shape[2:], reach, strides, pads, auto_pad)
    for size, (before, after), window, stride in zip(x.shape[2:], asked, reach, strides, strict=True):
        room = before + size + after - window
        last = -(-room // stride) if ceil_mode else room // stride
        if ceil_mode and last * stride >= before + size:
            last -= 1
        over = max(last * stride - room, 0)
        pairs.append((before, after + over))
        beyond.append(over)
    return pairs, beyond


def _reduced(
    x: Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    reduce: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """The sum or maximum of each window, one dimension after the other."""
    reach = spread(kernel, dilations)
    for axis, (window, stride, step) in enumerate(zip(reach, strides, dilations, strict=True), start=2):
        x = reduce(x.unfold(axis, window, stride)[..., ::step], -1)
    return x


OPS = standard(
    {
        "AveragePool": average_pool,
        "GlobalAveragePool": global_average_pool,
        "GlobalMaxPool": global_max_pool,
        "LpPool": lp_pool,
        "MaxPool": max_pool,
    }
)
