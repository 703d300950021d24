"""One quantised linear of a checkpoint, in the form that the ``planish`` ops take.

    Y[..., N] = X[..., order] · ((integers − zero_point) · scale) (+ bias)

A checkpoint gives each input feature the number of its group, and each group and output a scale and a zero
point. The ops want groups of equal size, one after the other. Where the numbers do not ascend (*act order*),
the rows of the weight are sorted by them, and the same permutation is applied to the input. Where sizes
differ, blocks are the largest that all groups are whole multiples of, and blocks of a group repeat its grid.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from .tensors import Tensors

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Activations:
    """The grid of a linear's input.

    Attributes:
        granularity: one symmetric grid per ``token`` at run time, or one fixed grid, ``static``.
        bits: of an integer.
        scale: of a static grid.
        zero_point: of a static grid, int8.
    """

    granularity: Literal["token", "static"]
    bits: int = 8
    scale: float = 1.0
    zero_point: int = 0


@dataclasses.dataclass(frozen=True)
class StoredLinear:
    """A weight [K, N] as it is stored.

    Attributes:
        integers: [K, N] int8, or uint8 where zero points are needed that lie in it.
        scale: [K / B, N] float32, or [N] where all rows share one.
        zero_point: shaped like ``scale``, in the type of ``integers``; None for 0.
        bits: of an integer.
        block_size: B; 0 where all rows share a scale.
        order: [K] int64, the input feature that each row belongs to; None where it is its own.
        activations: None for float ones.
    """

    integers: Array
    scale: npt.NDArray[np.float32]
    zero_point: Array | None
    bits: int
    block_size: int
    order: npt.NDArray[np.int64] | None = None
    activations: Activations | None = None


class Layout(Protocol):
    """How a kind of checkpoint stores quantised linears."""

    def layers(self, tensors: Tensors) -> frozenset[str]:
        """The names of the modules that are stored quantised."""

    def read(self, tensors: Tensors, layer: str, in_features: int, out_features: int) -> StoredLinear:
        """One of them.

        Raises:
            ModelError: its tensors are missing, do not fit each other, or say what no op can.
        """

    def remarks(self, layers: frozenset[str]) -> tuple[str, ...]:
        """Sentences about what these layers of the checkpoint ask for and do not get."""


def grouped(
    integers: Array, scales: Array, zero_points: Array | None, groups: Array, bits: int
) -> StoredLinear:
    """Put rows of the same group beside each other.

    Args:
        integers: [K, N] int8 or uint8.
        scales: [G, N] float.
        zero_points: [G, N] integers; None for the middle of the range.
        groups: [K], the group of each row.
        bits: of an integer.
    """
    order = np.argsort(groups, kind="stable")
    in_order = groups[order]
    starts = np.flatnonzero(np.diff(in_order, prepend=in_order[:1] - 1))
    sizes = np.diff(starts, append=len(in_order))
    block_size = 0 if len(starts) == 1 else int(np.gcd.reduce(sizes))
    of_block = in_order[:1] if block_size == 0 else in_order[::block_size]
    permuted = bool((order != np.arange(len(order))).any())
    centred, zeros = _centred(integers[order] if permuted else integers, zero_points, bits)
    scale = scales.astype(np.float32)[of_block]
    zero_point = None if zeros is None else zeros[of_block].astype(centred.dtype)
    if block_size == 0:
        scale, zero_point = scale[0], None if zero_point is None else zero_point[0]
    return StoredLinear(
        centred, scale, zero_point, bits, block_size, order.astype(np.int64) if permuted else None
    )


def _centred(integers: Array, zero_points: Array | None, bits: int) -> tuple[Array, Array | None]:
    """Symmetric weights are signed and need no zero points: unsigned ones around the middle become so."""
    middle = 0 if integers.dtype == np.int8 else 1 << (bits - 1)
    if zero_points is not None and (zero_points != middle).any():
        return integers, zero_points
    return (integers if middle == 0 else (integers - np.uint8(middle)).view(np.int8)), None


def as_array(tensor: torch.Tensor) -> Array:
    """A tensor as an array; bfloat16, which numpy has not, as float32."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
