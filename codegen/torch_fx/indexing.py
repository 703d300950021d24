"""Gathering, scattering and searching."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .registry import Integers, Lowering, as_integers, standard

Tensor = torch.Tensor
_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
"""ONNX's names for what torch calls the reductions of a scatter."""


def gather(x: Tensor, indices: Integers, *, axis: int = 0) -> Tensor:
    """``x[..., indices, ...]``; negative indices count from the end."""
    if isinstance(indices, int):
        return x.select(axis, indices)
    axis = axis % x.ndim
    if not isinstance(indices, torch.Tensor) and _is_flat(indices):
        # A tensor of the indices would be copied to the device in every call.
        return torch.cat([x.narrow(axis, index, 1) for index in indices], dim=axis)
    if not isinstance(indices, torch.Tensor):
        indices = torch.tensor(indices, dtype=torch.int64, device=x.device)
    flat = _wrap(indices, x.shape[axis]).reshape(-1)
    picked = x.index_select(axis, flat)
    return picked.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


def _is_flat(indices: Sequence[int]) -> bool:
    return len(indices) > 0 and all(isinstance(index, int) for index in indices)


def gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """One element of x for each index, along ``axis``."""
    return torch.gather(x, axis, _wrap(indices, x.shape[axis]))


def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """The slices of x that the tuples in the last dimension of ``indices`` point at."""
    rank = indices.ndim - 1
    batch = [
        torch.arange(size, device=x.device).reshape([-1 if dim == axis else 1 for dim in range(rank)])
        for axis, size in enumerate(x.shape[:batch_dims])
    ]
    return x[(*batch, *indices.long().unbind(-1))]


def scatter_elements(
    x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    """x with one element replaced, or combined with the update, for each index along ``axis``."""
    places = _wrap(indices, x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, places, updates)
    return x.scatter_reduce(axis, places, updates, _REDUCTIONS[reduction])


def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    """x with slices replaced, or combined with the updates, where the tuples of ``indices`` point."""
    depth = indices.shape[-1]
    sizes = x.shape[:depth]
    flat = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=x.device)
    for position, size in zip(indices.unbind(-1), sizes, strict=True):
        flat = flat * size + _wrap(position, size)
    rows = x.reshape(sizes.numel(), x.shape[depth:].numel())
    new = updates.reshape(flat.numel(), rows.shape[1])
    places = flat.reshape(-1, 1).expand_as(new)
    if reduction == "none":
        return rows.scatter(0, places, new).reshape(x.shape)
    return rows.scatter_reduce(0, places, new, _REDUCTIONS[reduction]).reshape(x.shape)


def one_hot(indices: Tensor, depth: Integers, values: Tensor, *, axis: int = -1) -> Tensor:
    """``values[1]`` where the new axis is at the index, ``values[0]`` elsewhere."""
    (classes,) = as_integers(depth)
    places = torch.arange(classes, device=indices.device)
    axis = axis % (indices.ndim + 1)
    shape = [1] * (indices.ndim + 1)
    shape[axis] = classes
    hot = (indices.long() % classes).unsqueeze(axis) == places.reshape(shape)
    inside = ((indices >= -classes) & (indices < classes)).unsqueeze(axis)
    return torch.where(hot & inside, values[1], values[0])


def nonzero(x: Tensor) -> Tensor:
    """The places of the elements that are not zero, [rank, count]."""
    return x.nonzero().T


def compress(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    """The slices along ``axis`` where ``condition`` holds; elements of the flat x without an axis."""
    places = condition.nonzero().squeeze(1)
    return x.reshape(-1)[places] if axis is None else x.index_select(axis, places)


def reverse_sequence(x: Tensor, lengths: Tensor, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """Each sequence of a batch back to front, up to its length; what comes after it stays."""
    steps = torch.arange(x.shape[time_axis], device=x.device)
    ends = lengths.unsqueeze(1)
    places = torch.where(steps < ends, ends - 1 - steps, steps)
    places = places if batch_axis == 0 else places.T
    places = places.reshape(places.shape + (1,) * (x.ndim - 2))
    return torch.gather(x, time_axis, places.expand(x.shape))


def top_k(
    x: Tensor,
    k: Integers,
    *,
    axis: int = -1,
    largest: int = 1,
    sorted: int = 1,  # noqa: A002 - the op's own name
) -> tuple[Tensor, Tensor]:
    """The k largest or smallest values along ``axis``, and their places; the first of equals comes first."""
    del sorted  # sorted is one of the orders allowed without it
    order = torch.argsort(x, dim=axis, descending=bool(largest), stable=True)
    places = order.narrow(axis, 0, as_integers(k)[0])
    return torch.gather(x, axis, places), places


def _wrap(indices: Tensor, size: int) -> Tensor:
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


OPS = standard(
    {
        "Compress": compress,
        "Gather": Lowering(gather, integers=(1,)),
        "GatherElements": gather_elements,
        "GatherND": gather_nd,
        "NonZero": nonzero,
        "OneHot": Lowering(one_hot, integers=(1,)),
        "ReverseSequence": reverse_sequence,
        "ScatterElements": scatter_elements,
        "ScatterND": scatter_nd,
        "TopK": Lowering(top_k, integers=(1,), several=True),
    }
)
