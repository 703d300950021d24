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
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from ...codegen.torch_fx.tensors import DTYPES
from .quantized_weight import Floats, QuantizedWeight

Doubles = npt.NDArray[np.float64]
PAIR_LIMIT = 128
CLIP_FACTORS = tuple(np.linspace(0.95, 0.4, 12))
_BITS_WITH_ZERO_SEARCH = 3
"""Up to here one step of the zero point is a large part of the range."""
_SMALLEST_NORMAL = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126}
_PAIR_STEPS = (0.25, 0.5, 0.75, 1.0)
"""Of the way to the scale at which all pairs fit: more steps lower the error by less than 1 %."""


class Format(Protocol):
    """What a weight can be rounded to: points that a scale, and perhaps a zero point, stretch and shift.

    Codes are what is stored, in a float array until `stored`. Scales and zero points of B rows are [N]; of a
    whole weight, [K / B, N], scales float32 and storable as they are.
    """

    @property
    def bits(self) -> int:
        """Bits of a code."""

    @property
    def block_size(self) -> int:
        """Rows that share a scale; 0 for all."""

    @property
    def clip(self) -> bool:
        """Whether scales are to err least instead of covering the largest weight."""

    @property
    def limit_pairs(self) -> bool:
        """Whether adjacent rows must stay exact under 16-bit addition of products."""

    def prepared(self, weight: Floats) -> Format:
        """This format with what all of ``weight`` [K, N] shares."""

    def trials(self, blocks: Floats, factors: Sequence[float]) -> Iterator[tuple[Floats, Floats | None]]:
        """Scales and zero points [blocks, N] for ``blocks`` [blocks, B, N]: covering ones, then others.

        ``factors`` are parts of the range that the others cover.
        """

    def codes(self, values: Any, scale: Any, zero: Any) -> Any:
        """The codes of the points nearest to ``values``."""

    def values(self, codes: Any, scale: Any, zero: Any) -> Any:
        """What ``codes`` stand for."""

    def storable(self, scale: Doubles) -> Floats:
        """The scales nearest to ``scale`` that can be stored; blocks of zeros get 1."""

    def stored(self, codes: npt.NDArray[Any], scale: Floats, zero: Floats | None) -> QuantizedWeight:
        """Codes [K, N] with scales and zero points [K / B, N], in the types that they are stored in."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """How a weight [K, N] is to be quantised: the `Format` of equally spaced points.

    Attributes:
        bits: 2 to 8.
        symmetric: without zero points.
        block_size: rows that share a scale, a divisor of K; 0 for all of them.
        scale_dtype: the float type that scales are stored in.
        clip: look for the scale with the least error instead of covering the largest weight.
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

    def prepared(self, weight: Floats) -> Grid:
        """The grid itself: blocks share nothing."""
        return self

    def trials(self, blocks: Floats, factors: Sequence[float]) -> Iterator[tuple[Floats, Floats | None]]:
        """The covering grid; ranges smaller by ``factors``, with the zero points beside; pairs that fit."""
        lowest, highest = _extremes(blocks)
        if self.symmetric:
            widest: Floats = np.maximum(-lowest, highest)
        else:
            widest = np.maximum(highest, 0) - np.minimum(lowest, 0)
        covering = widest / np.float32(self.highest)
        yield self._scale_and_zero(covering, lowest)
        searches_zero = not self.symmetric and self.bits <= _BITS_WITH_ZERO_SEARCH
        for factor in factors:
            scale, zero = self._scale_and_zero(covering * np.float32(factor), lowest * np.float32(factor))
            yield scale, zero
            if zero is not None and searches_zero:
                yield scale, np.maximum(zero - 1, self.lowest)
                yield scale, np.minimum(zero + 1, self.highest)
        if self.limit_pairs:
            for step in _pair_growth(blocks, covering):
                yield self._scale_and_zero(covering * step, lowest)

    def _scale_and_zero(self, scale: Floats, lowest: Floats) -> tuple[Floats, Floats | None]:
        stored = self.storable(scale)
        if self.symmetric:
            return stored, None
        zero = np.clip(np.rint(-np.minimum(lowest, 0) / stored), self.lowest, self.highest)
        return stored, zero.astype(np.float32)

    def storable(self, scale: npt.NDArray[np.floating[Any]]) -> Floats:
        """The scales in their stored type; blocks of zeros get scale 1."""
        return storable_floats(scale, self.scale_dtype)

    def codes(self, values: Any, scale: Any, zero: Any) -> Any:
        """clamp(round(values / scale) + zero)."""
        if values.ndim > 1:
            zeros = None if zero is None else torch.from_numpy(zero)
            return self.codes_into(None, torch.from_numpy(values), torch.from_numpy(scale), zeros).numpy()
        integers = np.rint(values / scale)
        if zero is not None:
            integers += zero
        return np.clip(integers, self.lowest, self.highest, out=integers)

    def codes_into(
        self,
        codes: torch.Tensor | None,
        values: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
    ) -> torch.Tensor:
        """The same of more than one dimension: torch takes less memory traffic than numpy, and all cores.

        Args:
            codes: where to put them, or None for new memory.
            values: what is rounded.
            scale, zero: broadcast against the values.
        """
        codes = torch.div(values, scale, out=codes).round_()
        if zero is not None:
            codes += zero
        return codes.clamp_(self.lowest, self.highest)

    def values(self, codes: Any, scale: Any, zero: Any) -> Any:
        """(codes − zero) · scale."""
        if isinstance(scale, np.ndarray) and scale.ndim > 1:
            steps = torch.from_numpy(codes)
            if zero is not None:
                steps = steps - torch.from_numpy(zero)
            return steps.mul(torch.from_numpy(scale)).numpy()
        return codes * scale if zero is None else (codes - zero) * scale

    def stored(self, codes: npt.NDArray[Any], scale: Floats, zero: Floats | None) -> QuantizedWeight:
        """int8 or uint8 codes, and zero points like them."""
        dtype = np.int8 if self.symmetric else np.uint8
        if self.block_size == 0:
            scale, zero = scale[0], None if zero is None else zero[0]
        integers = torch.from_numpy(codes).to(torch.int8 if self.symmetric else torch.uint8).numpy()
        return QuantizedWeight(
            integers,
            narrowed(scale, self.scale_dtype),
            None if zero is None else zero.astype(dtype),
            self.bits,
        )


def storable_floats(scale: npt.NDArray[np.floating[Any]], dtype: np.dtype[Any]) -> Floats:
    """``scale`` rounded to a float type, subnormal ones raised to the smallest normal; 1 instead of 0."""
    stored = np.maximum(scale, _SMALLEST_NORMAL[dtype.name])
    if stored.dtype == np.float32:  # of float64 torch makes 16 bits in two steps
        stored = _narrowed(stored, dtype).float().numpy()
    else:
        stored = stored.astype(dtype).astype(np.float32)
    return np.where(scale > 0, stored, np.float32(1))


def narrowed(values: Floats, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """``values`` rounded to a float type, in the order that memory has."""
    result = _narrowed(values, dtype)
    # numpy knows bfloat16 through an extension, of which torch does not know.
    return result.numpy() if result.dtype != torch.bfloat16 else result.view(torch.int16).numpy().view(dtype)


def _narrowed(values: Floats, dtype: np.dtype[Any]) -> torch.Tensor:
    """By torch: numpy has no vector instructions for 16 bits."""
    return torch.from_numpy(values).to(DTYPES[ir.DataType.from_numpy(dtype)])


def fit(
    weight: Floats,
    grid: Format,
    *,
    covariance: Doubles | None = None,
    factors: Sequence[float] | None = None,
) -> tuple[Floats, Floats | None]:
    """Scale and zero point, [K / B, N], that cover ``weight`` [K, N] or, with ``clip``, err least on it.

    Args:
        weight: [K, N].
        grid: what it is to be rounded to.
        covariance: [K, K] of the inputs. With it the error of a block is that of its part of the output,
            eᵀ H e with the block's own part of H, else the sum of squares.
        factors: parts of the range to try; by default `CLIP_FACTORS` where the grid asks for clipping.
    """
    blocks = in_blocks(weight, grid)
    if factors is None:
        factors = CLIP_FACTORS if grid.clip else ()
    trials = grid.trials(blocks, factors)
    scale, zero = next(trials)
    metric = None if covariance is None else _diagonal_blocks(covariance, blocks.shape[1])
    least: npt.NDArray[Any] | None = None
    for trial_scale, trial_zero in trials:
        if least is None:
            least = _error(blocks, scale, zero, grid, metric)
        error = _error(blocks, trial_scale, trial_zero, grid, metric)
        better = error < least
        least = np.where(better, error, least)
        scale = np.where(better, trial_scale, scale)
        zero = None if zero is None or trial_zero is None else np.where(better, trial_zero, zero)
    return scale, zero


def round_to_grid(weight: Floats, scale: Floats, zero: Floats | None, grid: Format) -> QuantizedWeight:
    """Round ``weight`` [K, N] to the nearest points of the grid, pairs within their limit if it has one."""
    codes = nearest_codes(in_blocks(weight, grid), scale, zero, grid).reshape(weight.shape)
    return grid.stored(codes, scale, zero)


def nearest_codes(blocks: Floats, scale: Floats, zero: Floats | None, grid: Format) -> Floats:
    """Codes of ``blocks`` [blocks, B, N], pairs within their limit if the grid has one."""
    codes: Floats = grid.codes(blocks, scale[:, None], None if zero is None else zero[:, None])
    if grid.limit_pairs:
        limit_pairs(codes)
    return codes


def in_blocks(weight: Floats, grid: Format) -> Floats:
    """``weight`` [K, N] as [K / B, B, N], B rows of a column being what shares a scale."""
    rows, columns = weight.shape
    block_size = grid.block_size or rows
    return weight.reshape(rows // block_size, block_size, columns)


def _extremes(blocks: Floats) -> tuple[Floats, Floats]:
    """The smallest and the largest [blocks, N] of ``blocks`` [blocks, B, N].

    They are in memory as the blocks are, columns first or not: arithmetic of the two runs along memory then,
    and its results are in that order, too.
    """
    # torch's reductions along an inner axis take a seventh of the time of numpy's.
    if blocks.strides[1] < blocks.strides[2]:
        columns_first = torch.from_numpy(blocks).permute(2, 0, 1)
        return columns_first.amin(2).numpy().T, columns_first.amax(2).numpy().T
    tensor = torch.from_numpy(blocks)
    return tensor.amin(1).numpy(), tensor.amax(1).numpy()


def _diagonal_blocks(covariance: Doubles, size: int) -> Floats:
    """[K / size, size, size] float32: what a block's error is weighted by."""
    starts = range(0, len(covariance), size)
    return np.stack([covariance[s : s + size, s : s + size] for s in starts]).astype(np.float32)


def _error(
    blocks: Floats, scale: Floats, zero: Floats | None, grid: Format, metric: Floats | None
) -> npt.NDArray[Any]:
    """What rounding costs each block, [blocks, N]."""
    codes = nearest_codes(blocks, scale, zero, grid)
    error = grid.values(codes, scale[:, None], None if zero is None else zero[:, None])
    error -= blocks
    if metric is None:
        return torch.from_numpy(error).square_().sum(1).numpy()
    costs: npt.NDArray[Any] = np.einsum("bkn,bkn->bn", metric @ error, error)
    return costs


def _pair_growth(blocks: Floats, covering: Floats) -> list[Floats]:
    """Multiples of the covering scale up to the one at which all pairs fit; none if they do already."""
    fitting = _pair_sums(blocks).max(axis=1, initial=0) / np.where(covering > 0, covering, 1) / PAIR_LIMIT
    if fitting.max(initial=0) <= 1:
        return []
    growth = np.maximum(fitting, 1) - 1
    return [1 + np.float32(step) * growth for step in _PAIR_STEPS]


def _pair_sums(blocks: Floats) -> Floats:
    """|w| summed over the rows 2i and 2i + 1 that have the same sign, [blocks, pairs, N]; else 0."""
    even, odd = blocks[:, 0 : blocks.shape[1] // 2 * 2 : 2], blocks[:, 1::2]
    same_sign: Floats = np.where(even * odd > 0, np.abs(even + odd), np.float32(0))
    return same_sign


def limit_pairs(integers: Floats) -> None:
    """Take half of what exceeds the limit from each of two adjacent rows of the same sign, in place.

    Args:
        integers: [blocks, B, N].
    """
    even, odd = integers[:, 0 : integers.shape[1] // 2 * 2 : 2], integers[:, 1::2]
    excess = np.where(even * odd > 0, np.maximum(np.abs(even + odd) - PAIR_LIMIT, 0), 0)
    sign = np.sign(even)
    # A pair's sum is above 128 and each is at most 127, so neither changes sign.
    even -= sign * np.ceil(excess / 2)
    odd -= sign * np.floor(excess / 2)


def pair_bounds(partner: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Between which integers a weight may be whose pair has ``partner`` in the other row."""
    return np.where(partner < 0, -PAIR_LIMIT - partner, -PAIR_LIMIT), np.where(
        partner > 0, PAIR_LIMIT - partner, PAIR_LIMIT - 1
    )
