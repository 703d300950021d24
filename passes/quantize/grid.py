"""The integer grid: what scale and zero point mean, and how weights are rounded to them.

    ŵ = (q − zero_point) · scale,   q = clamp(round(w / scale) + zero_point)

Weights are [K, N]; a block of B rows of one column shares a grid (B = K: one grid per output channel).

- symmetric: scale = max|w| / (2^(bits−1) − 1), q in [−2^(bits−1), 2^(bits−1) − 1], zero_point 0. For 4 bits
  this is the grid "max / 7, clamp [−8, 7]"; without clipping −8 is not used.
- asymmetric: lowest = min(w, 0), highest = max(w, 0), scale = (highest − lowest) / (2^bits − 1),
  zero_point = round(−lowest / scale), q in [0, 2^bits − 1]. Zero is always on the grid.

Scales are rounded to the model's float type before the weights are rounded to them.

**Pairs** (`Grid.limit_pairs`). On x86 CPUs without VNNI the fast int8 kernel multiplies unsigned activations
by signed weights and adds the products of rows 2i and 2i + 1 in 16 bits, with saturation (``vpmaddubsw``).
With activations up to 255 that is exact if, and only if, the positive ones of the two weights add up to at
most 128, and the negative ones to at least −128: pairs of opposite sign never saturate. Pairs beyond that are
brought to the limit by taking half of the excess from each, and `fit` looks for the scale with the least
squared error.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
PAIR_LIMIT = 128
_SMALLEST_NORMAL = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126}
_CLIP_FACTORS = np.linspace(0.95, 0.5, 10)
_PAIR_STEPS = (0.25, 0.5, 0.75, 1.0)
"""Of the way to the scale at which all pairs fit: more steps lower the error by less than 1 %."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """How a weight [K, N] is to be quantised.

    Attributes:
        bits: 2 to 8.
        symmetric: without zero points.
        block_size: rows that share a scale, a divisor of K; 0 for all of them.
        scale_dtype: the float type that scales are stored in.
        clip: look for the scale with the least squared error instead of covering the largest weight.
        limit_pairs: keep adjacent rows exact under 16-bit addition of products; for symmetric 8 bits.
    """

    bits: int
    symmetric: bool
    block_size: int
    scale_dtype: np.dtype[Any]
    clip: bool = False
    limit_pairs: bool = False

    @property
    def lowest(self) -> int:
        """The smallest integer of the grid."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def highest(self) -> int:
        """The largest integer of the grid."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """Integers [K, N] (int8 or uint8) with their grid, [K / B, N], or [N] for one scale per channel."""

    integers: npt.NDArray[Any]
    scale: npt.NDArray[Any]
    zero_point: npt.NDArray[Any] | None

    def columns(self, start: int, stop: int) -> QuantizedWeight:
        """The part of output channels ``start`` to ``stop``: layers quantised as one come apart again."""
        part = (..., slice(start, stop))
        zero_point = None if self.zero_point is None else self.zero_point[part]
        return QuantizedWeight(self.integers[part], self.scale[part], zero_point)

    def dequantized(self) -> Floats:
        """ŵ [K, N] float32."""
        rows, columns = self.integers.shape
        scale = np.atleast_2d(self.scale).astype(np.float32)
        shape = (scale.shape[0], rows // scale.shape[0], columns)
        values = self.integers.astype(np.float32).reshape(shape)
        if self.zero_point is not None:
            values -= np.atleast_2d(self.zero_point).astype(np.float32)[:, None]
        return (values * scale[:, None]).reshape(rows, columns)


def fit(weight: Floats, grid: Grid) -> tuple[Floats, Floats | None]:
    """Scale and zero point, [K / B, N], that cover ``weight`` [K, N] or, with ``clip``, err least on it."""
    blocks = _blocks(weight, grid)
    lowest, highest = blocks.min(axis=1), blocks.max(axis=1)
    if grid.symmetric:
        covering = np.maximum(-lowest, highest) / grid.highest
    else:
        covering = (np.maximum(highest, 0) - np.minimum(lowest, 0)) / grid.highest
    best = _scale_and_zero(covering, lowest, grid)
    factors = _factors(blocks, covering, grid)
    if not factors:
        return best
    scale, zero = best
    least = _squared_error(blocks, scale, zero, grid)
    for factor in factors:
        trial_scale, trial_zero = _scale_and_zero(covering * factor, lowest * np.minimum(factor, 1), grid)
        error = _squared_error(blocks, trial_scale, trial_zero, grid)
        better = error < least
        least = np.where(better, error, least)
        scale = np.where(better, trial_scale, scale)
        zero = None if zero is None or trial_zero is None else np.where(better, trial_zero, zero)
    return scale, zero


def codes(
    values: npt.NDArray[np.float64], scale: Floats, zero: Floats, grid: Grid
) -> npt.NDArray[np.float64]:
    """The integers nearest to ``values`` [N]; all float64, so that ties are those of the exact quotient."""
    integers: npt.NDArray[np.float64] = np.rint(values / scale) + zero
    return np.clip(integers, grid.lowest, grid.highest, out=integers)


def round_to_grid(weight: Floats, scale: Floats, zero: Floats | None, grid: Grid) -> QuantizedWeight:
    """Round ``weight`` [K, N] to the nearest points of the grid, pairs within their limit if it has one."""
    integers = _integers(_blocks(weight, grid), scale, zero, grid).reshape(weight.shape)
    return quantized_weight(integers, scale, zero, grid)


def quantized_weight(
    integers: npt.NDArray[Any], scale: Floats, zero: Floats | None, grid: Grid
) -> QuantizedWeight:
    """Integers [K, N] with scale and zero point [K / B, N], all in the types that they are stored in."""
    dtype = np.int8 if grid.symmetric else np.uint8
    per_channel = grid.block_size == 0
    return QuantizedWeight(
        integers.astype(dtype),
        (scale[0] if per_channel else scale).astype(grid.scale_dtype),
        None if zero is None else (zero[0] if per_channel else zero).astype(dtype),
    )


def _blocks(weight: Floats, grid: Grid) -> Floats:
    rows, columns = weight.shape
    block_size = grid.block_size or rows
    return weight.reshape(rows // block_size, block_size, columns)


def _scale_and_zero(scale: Floats, lowest: Floats, grid: Grid) -> tuple[Floats, Floats | None]:
    """Round the scale to its stored type; blocks of zeros get scale 1."""
    smallest = _SMALLEST_NORMAL[grid.scale_dtype.name]
    stored = np.maximum(scale, smallest).astype(grid.scale_dtype).astype(np.float32)
    stored = np.where(scale > 0, stored, np.float32(1))
    if grid.symmetric:
        return stored, None
    zero = np.clip(np.rint(-np.minimum(lowest, 0) / stored), grid.lowest, grid.highest)
    return stored, zero.astype(np.float32)


def _factors(blocks: Floats, covering: Floats, grid: Grid) -> list[Floats]:
    """Multiples of the covering scale worth a try: smaller ones clip, larger ones make pairs fit."""
    factors = [np.float32(factor) * np.ones_like(covering) for factor in _CLIP_FACTORS if grid.clip]
    if not grid.limit_pairs:
        return factors
    fitting = _pair_sums(blocks).max(axis=1, initial=0) / np.where(covering > 0, covering, 1) / PAIR_LIMIT
    if fitting.max(initial=0) > 1:
        growth = np.maximum(fitting, 1) - 1
        factors += [1 + np.float32(step) * growth for step in _PAIR_STEPS]
    return factors


def _pair_sums(blocks: Floats) -> Floats:
    """|w| summed over the rows 2i and 2i + 1 that have the same sign, [blocks, pairs, N]; else 0."""
    even, odd = blocks[:, 0 : blocks.shape[1] // 2 * 2 : 2], blocks[:, 1::2]
    same_sign: Floats = np.where(even * odd > 0, np.abs(even + odd), np.float32(0))
    return same_sign


def _integers(blocks: Floats, scale: Floats, zero: Floats | None, grid: Grid) -> Floats:
    integers: Floats = np.rint(blocks / scale[:, None])
    if zero is not None:
        integers += zero[:, None]
    np.clip(integers, grid.lowest, grid.highest, out=integers)
    if grid.limit_pairs:
        _limit_pairs(integers)
    return integers


def _limit_pairs(integers: Floats) -> None:
    """Take half of what exceeds the limit from each of two adjacent rows of the same sign, in place."""
    even, odd = integers[:, 0 : integers.shape[1] // 2 * 2 : 2], integers[:, 1::2]
    excess = np.where(even * odd > 0, np.maximum(np.abs(even + odd) - PAIR_LIMIT, 0), 0)
    sign = np.sign(even)
    # A pair's sum is above 128 and each is at most 127, so neither changes sign.
    even -= sign * np.ceil(excess / 2)
    odd -= sign * np.floor(excess / 2)


def _squared_error(blocks: Floats, scale: Floats, zero: Floats | None, grid: Grid) -> Floats:
    integers = _integers(blocks, scale, zero, grid)
    if zero is not None:
        integers -= zero[:, None]
    integers *= scale[:, None]
    integers -= blocks
    squares: Floats = np.einsum("bkn,bkn->bn", integers, integers)
    return squares
