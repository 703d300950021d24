"""Reductions, running sums and softmax."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .registry import Integers, Lowering, as_integers, standard

Tensor = torch.Tensor


def _dims(x: Tensor, axes: Integers | None, noop_with_empty_axes: int) -> list[int]:
    dims = [] if axes is None else as_integers(axes)
    if not dims and not noop_with_empty_axes:
        return list(range(x.ndim))
    return [dim % x.ndim for dim in dims]


def _of_nothing(x: Tensor, dims: list[int], keepdims: bool, limit: float) -> Tensor:
    """The extremum of no elements: the end of the type's range."""
    shape = x.sum(dims, keepdim=keepdims).shape if dims else x.shape
    if x.dtype == torch.bool:
        return torch.full(shape, limit > 0, device=x.device)
    if not x.is_floating_point():
        limit = torch.iinfo(x.dtype).max if limit > 0 else torch.iinfo(x.dtype).min
    return torch.full(shape, limit, dtype=x.dtype, device=x.device)


def reduce_sum(
    x: Tensor, axes: Integers | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """The sum over ``axes``, all by default."""
    dims = _dims(x, axes, noop_with_empty_axes)
    return x.sum(dims, keepdim=bool(keepdims), dtype=x.dtype) if dims else x


def reduce_mean(
    x: Tensor, axes: Integers | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """The mean over ``axes``, all by default; of integers, cut to one."""
    dims = _dims(x, axes, noop_with_empty_axes)
    if not dims:
        return x
    if x.is_floating_point():
        return x.mean(dims, keepdim=bool(keepdims))
    total = x.sum(dims, keepdim=bool(keepdims), dtype=x.dtype)
    return torch.div(total, math.prod(x.shape[dim] for dim in dims), rounding_mode="trunc")


def reduce_max(
    x: Tensor, axes: Integers | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """The maximum over ``axes``, all by default."""
    dims = _dims(x, axes, noop_with_empty_axes)
    if x.numel() == 0:
        return _of_nothing(x, dims, bool(keepdims), -math.inf)
    return x.amax(dims, keepdim=bool(keepdims)) if dims else x


def reduce_min(
    x: Tensor, axes: Integers | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """The minimum over ``axes``, all by default."""
    dims = _dims(x, axes, noop_with_empty_axes)
    if x.numel() == 0:
        return _of_nothing(x, dims, bool(keepdims), math.inf)
    return x.amin(dims, keepdim=bool(keepdims)) if dims else x


def reduce_prod(
    x: Tensor, axes: Integers | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """The product over ``axes``, all by default."""
    for dim in sorted(_dims(x, axes, noop_with_empty_axes), reverse=True):
        x = x.prod(dim, keepdim=bool(keepdims), dtype=x.dtype)
    return x


def reduce_l1(
    x: Tensor, axes: Integers | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """The sum of the absolute values over ``axes``."""
    return reduce_sum(x.abs(), axes, keepdims=keepdims, noop_with_empty_axes=noop_with_empty_axes)


def reduce_l2(
    x: Tensor, axes: Integers | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """The Euclidean norm over ``axes``."""
    squares = reduce_sum_square(x, axes, keepdims=keepdims, noop_with_empty_axes=noop_with_empty_axes)
    return squares.sqrt().to(x.dtype)


def reduce_sum_square(
    x: Tensor, axes: Integers | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """The sum of squares over ``axes``."""
    return reduce_sum(x * x, axes, keepdims=keepdims, noop_with_empty_axes=noop_with_empty_axes)


def reduce_log_sum(
    x: Tensor, axes: Integers | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """The logarithm of the sum over ``axes``."""
    total = reduce_sum(x, axes, keepdims=keepdims, noop_with_empty_axes=noop_with_empty_axes)
    return total.log().to(x.dtype)


def reduce_log_sum_exp(
    x: Tensor, axes: Integers | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """The logarithm of the sum of exponentials over ``axes``."""
    dims = _dims(x, axes, noop_with_empty_axes)
    return torch.logsumexp(x, dims, keepdim=bool(keepdims)).to(x.dtype) if dims else x


def arg_max(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Where the maximum is along ``axis``: the first or the last of equals."""
    return _arg(torch.argmax, x, axis, bool(keepdims), bool(select_last_index))


def arg_min(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Where the minimum is along ``axis``: the first or the last of equals."""
    return _arg(torch.argmin, x, axis, bool(keepdims), bool(select_last_index))


def _arg(find: Callable[..., Tensor], x: Tensor, axis: int, keepdims: bool, last: bool) -> Tensor:
    if last:
        return x.shape[axis] - 1 - find(x.flip(axis), dim=axis, keepdim=keepdims)
    return find(x, dim=axis, keepdim=keepdims)


def cumulative_sum(x: Tensor, axis: Integers, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """The running sum along ``axis``; ``exclusive`` leaves out the element itself."""
    (dim,) = as_integers(axis)
    x = x.flip(dim) if reverse else x
    if exclusive and x.shape[dim]:
        x = torch.cat([torch.zeros_like(x.narrow(dim, 0, 1)), x.narrow(dim, 0, x.shape[dim] - 1)], dim)
    total = x.cumsum(dim, dtype=x.dtype)
    return total.flip(dim) if reverse else total


def hardmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """1 at the first maximum along ``axis``, 0 elsewhere."""
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1)


def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """``exp(x) / Σ exp(x)`` along ``axis``."""
    return torch.softmax(x, axis)


def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """The logarithm of `softmax`."""
    return torch.log_softmax(x, axis)


OPS = standard(
    {
        "ArgMax": arg_max,
        "ArgMin": arg_min,
        "CumSum": Lowering(cumulative_sum, integers=(1,)),
        "Hardmax": hardmax,
        "LogSoftmax": log_softmax,
        "ReduceL1": Lowering(reduce_l1, integers=(1,)),
        "ReduceL2": Lowering(reduce_l2, integers=(1,)),
        "ReduceLogSum": Lowering(reduce_log_sum, integers=(1,)),
        "ReduceLogSumExp": Lowering(reduce_log_sum_exp, integers=(1,)),
        "ReduceMax": Lowering(reduce_max, integers=(1,)),
        "ReduceMean": Lowering(reduce_mean, integers=(1,)),
        "ReduceMin": Lowering(reduce_min, integers=(1,)),
        "ReduceProd": Lowering(reduce_prod, integers=(1,)),
        "ReduceSum": Lowering(reduce_sum, integers=(1,)),
        "ReduceSumSquare": Lowering(reduce_sum_square, integers=(1,)),
        "Softmax": softmax,
    }
)
