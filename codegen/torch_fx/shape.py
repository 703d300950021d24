"""Ops that lay elements out anew: reshaping, joining, cutting, padding; and those that compute shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from .registry import Integers, Lowering, as_integers, standard

Tensor = torch.Tensor


def reshape(x: Tensor, shape: Integers, *, allowzero: int = 0) -> Tensor:
    """A 0 in ``shape`` keeps the dimension, unless ``allowzero``; a −1 takes what is left."""
    sizes = as_integers(shape)
    if not allowzero:
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    """Two dimensions: those before ``axis`` and the others."""
    axis = axis + x.ndim if axis < 0 else axis
    rows = torch.Size(x.shape[:axis]).numel()
    return x.reshape(rows, torch.Size(x.shape[axis:]).numel())


def transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    """Permute the dimensions; reverse them by default."""
    return x.permute(tuple(reversed(range(x.ndim))) if perm is None else tuple(perm))


def squeeze(x: Tensor, axes: Integers | None = None) -> Tensor:
    """Drop the given dimensions of size 1, or all of them."""
    return x.squeeze() if axes is None else x.squeeze(tuple(as_integers(axes)))


def unsqueeze(x: Tensor, axes: Integers) -> Tensor:
    """Insert dimensions of size 1 where ``axes`` are in the result."""
    wanted = as_integers(axes)
    rank = x.ndim + len(wanted)
    for axis in sorted(axis % rank for axis in wanted):
        x = x.unsqueeze(axis)
    return x


def expand(x: Tensor, shape: Integers) -> Tensor:
    """Broadcast both ways: x may also be larger than ``shape``."""
    return x.expand(np.broadcast_shapes(x.shape, as_integers(shape)))


def concat(*operands: Tensor, axis: int) -> Tensor:
    """Join along an axis."""
    return torch.cat(operands, dim=axis)


def split(
    x: Tensor, sizes: Integers | None = None, *, axis: int = 0, num_outputs: int = 0
) -> tuple[Tensor, ...]:
    """Cut into parts of ``sizes``, or into ``num_outputs`` equal ones of which the last may be smaller."""
    if sizes is not None:
        return torch.split(x, as_integers(sizes), dim=axis)
    return torch.split(x, -(-x.shape[axis] // num_outputs), dim=axis)


def strided_slice(
    x: Tensor,
    starts: Integers,
    ends: Integers,
    axes: Integers | None = None,
    steps: Integers | None = None,
) -> Tensor:
    """``x[start:end:step]`` along each of ``axes``, as in numpy, negative steps included.

    Unlike in numpy, a negative step from before the first element starts at it.
    """
    first, last = as_integers(starts), as_integers(ends)
    along = list(range(len(first))) if axes is None else as_integers(axes)
    strides = [1] * len(first) if steps is None else as_integers(steps)
    index = [slice(None)] * x.ndim
    for start, end, axis, step in zip(first, last, along, strides, strict=True):
        if step > 0:
            index[axis] = slice(start, end, step)
        else:
            size = x.shape[axis]
            start = min(max(start + size if start < 0 else start, 0), size - 1)
            end = max(end + size, -1) if end < 0 else end
            backwards = range(start, end, step)
            x = x.index_select(axis, torch.tensor(backwards, dtype=torch.int64, device=x.device))
    return x[tuple(index)]


def tile(x: Tensor, repeats: Integers) -> Tensor:
    """Repeat the whole tensor along each dimension."""
    return x.repeat(as_integers(repeats))


def pad(
    x: Tensor,
    pads: Integers,
    value: Tensor | None = None,
    axes: Integers | None = None,
    *,
    mode: str = "constant",
) -> Tensor:
    """Add elements around, or take some away where ``pads`` are negative.

    ``pads`` are all the starts, then all the ends; ``axes`` default to all. Modes: constant, reflect, edge,
    wrap.
    """
    amounts = as_integers(pads)
    along = list(range(x.ndim)) if axes is None else [axis % x.ndim for axis in as_integers(axes)]
    widths = dict(zip(along, zip(amounts[: len(along)], amounts[len(along) :], strict=True), strict=True))
    if mode == "constant":
        flat = [width for axis in reversed(range(x.ndim)) for width in widths.get(axis, (0, 0))]
        padded = F.pad(x, flat)
        if value is None:
            return padded
        real = F.pad(torch.ones_like(x, dtype=torch.bool), flat)
        return torch.where(real, padded, value)
    for axis, (before, after) in widths.items():
        x = x.index_select(axis, _padded_positions(x.shape[axis], before, after, mode, x.device))
    return x


def _padded_positions(size: int, before: int, after: int, mode: str, device: torch.device) -> Tensor:
    positions = torch.arange(-before, size + after, device=device)
    if mode == "edge":
        return positions.clamp(0, size - 1)
    if mode == "wrap":
        return positions % size
    period = max(2 * (size - 1), 1)
    folded = positions % period
    return torch.minimum(folded, period - folded)


def shape_of(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    """The dimensions, from ``start`` to ``end``, as an int64 tensor."""
    return torch.tensor(x.shape[start:end], dtype=torch.int64, device=x.device)


def size_of(x: Tensor) -> Tensor:
    """How many elements there are, as an int64 scalar."""
    return torch.tensor(x.numel(), dtype=torch.int64, device=x.device)


def value_range(
    start: Tensor | int, limit: Tensor | int, delta: Tensor | int, *, device: str = "cpu"
) -> Tensor:
    """``start, start + delta, …`` up to but without ``limit``; nothing if delta leads away from it."""
    operands = (start, limit, delta)
    tensors = [operand for operand in operands if isinstance(operand, torch.Tensor)]
    first, end, step = (
        operand.item() if isinstance(operand, torch.Tensor) else operand for operand in operands
    )
    dtype = tensors[0].dtype if tensors else torch.int64
    count = math.ceil((end - first) / step) if dtype.is_floating_point else -((first - end) // step)
    return first + torch.arange(max(count, 0), dtype=dtype, device=device) * step


def constant_of_shape(
    shape: Integers, *, value: float = 0.0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Tensor:
    """A tensor filled with ``value``."""
    return torch.full(as_integers(shape), value, dtype=dtype, device=device)


def eye_like(x: Tensor, *, dtype: torch.dtype | None = None, k: int = 0) -> Tensor:
    """A matrix of the shape of x with ones on diagonal ``k``."""
    ones = torch.ones(x.shape, dtype=dtype or x.dtype, device=x.device)
    return ones.tril(k).triu(k)


def triangle(x: Tensor, diagonal: Integers | None = None, *, upper: int = 1) -> Tensor:
    """The upper or lower triangle of each matrix; zeros elsewhere."""
    k = 0 if diagonal is None else as_integers(diagonal)[0]
    return torch.triu(x, k) if upper else torch.tril(x, k)


def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """[N, C·b², H, W] to [N, C, H·b, W·b]."""
    if mode == "CRD":
        return F.pixel_shuffle(x, blocksize)
    n, channels, height, width = x.shape
    blocks = x.reshape(n, blocksize, blocksize, channels // blocksize**2, height, width)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(n, -1, height * blocksize, width * blocksize)


def space_to_depth(x: Tensor, *, blocksize: int) -> Tensor:
    """[N, C, H·b, W·b] to [N, b²·C, H, W]."""
    n, channels, height, width = x.shape
    blocks = x.reshape(n, channels, height // blocksize, blocksize, width // blocksize, blocksize)
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(n, -1, height // blocksize, width // blocksize)


OPS = standard(
    {
        "Concat": concat,
        "ConstantOfShape": Lowering(constant_of_shape, integers=(0,), creates=True),
        "DepthToSpace": depth_to_space,
        "Expand": Lowering(expand, integers=(1,)),
        "EyeLike": eye_like,
        "Flatten": flatten,
        "Pad": Lowering(pad, integers=(1, 3)),
        "Range": Lowering(value_range, integers=(0, 1, 2), creates=True),
        "Reshape": Lowering(reshape, integers=(1,)),
        "Shape": shape_of,
        "Size": size_of,
        "Slice": Lowering(strided_slice, integers=(1, 2, 3, 4)),
        "SpaceToDepth": space_to_depth,
        "Split": Lowering(split, integers=(1,), several=True),
        "Squeeze": Lowering(squeeze, integers=(1,)),
        "Tile": Lowering(tile, integers=(1,)),
        "Transpose": transpose,
        "Trilu": Lowering(triangle, integers=(1,)),
        "Unsqueeze": Lowering(unsqueeze, integers=(1,)),
    }
)
