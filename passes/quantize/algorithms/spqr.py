"""SpQR: a few weights that would hurt most stay in float16; scales and zero points are integers themselves.

    Ŵ = (Q − z) · s   except at the outliers,   s = (Q_s − a) · b,   z = (Q_z − c) · d

- *outliers*: weights whose rounding costs the output more than τ times the mean over all weights of
  var(w_j) R_jj² (var within a row): (e_j R_jj)² by their own error; for the largest of a group also what the
  whole group would save without it. At most `largest_share` of the weights, the most costly ones. Grids are
  then fitted without them.
- *bilevel groups*: the scales of 16 neighbouring columns share a grid of 3 bits, and so do their zero points.
- GPTQ's loop and descent then choose the integers on these grids, towards GPTAQ's target; what is added to an
  outlier to make up for others' errors is stored with it.

Source: Dettmers et al., SpQR, 2023, https://arxiv.org/abs/2306.03078. There outliers are found, and grids
fitted, as the loop reaches them; here before it, so that act-order needs no permutation at run time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from ....runtime.workers import SERIAL, Workers
from ..grid import Doubles, Format, Grid, fit, nearest_codes, round_to_grid
from ..quantized_weight import Floats, Outliers, QuantizedWeight, SecondLevel
from .base import LayerStatistics, Remark
from .curvature import Curvature, curvature
from .gptaq import GPTAQ
from .gptq import FixedGrids

_FINEST = 2048
"""Steps are at least this part of the largest value, so that what is subtracted fits float16 exactly."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpQR(GPTAQ):
    """SpQR with its settings, beside those of `GPTAQ`.

    Attributes:
        threshold: τ; a larger one keeps fewer outliers.
        largest_share: of the weights that may be outliers.
        second_level_bits: of a scale's, and of a zero point's integer.
        second_level_block: neighbouring columns that share a grid of scales.
    """

    threshold: float = 0.2
    largest_share: float = 0.01
    second_level_bits: int = 3
    second_level_block: int = 16

    def __call__(
        self,
        weight: Floats,
        grid: Format,
        statistics: LayerStatistics | None,
        remark: Remark,
        workers: Workers = SERIAL,
    ) -> QuantizedWeight:
        """Quantise ``weight`` [K, N]; of the grid, bits, group size and clipping count.

        Raises:
            ValueError: the grid is a code book.
        """
        if not isinstance(grid, Grid):
            raise ValueError("spqr needs a grid of integers, found a code book")
        # Its scales are stored on grids of their own, not in the model's type.
        grid = _RealZeroGrid(grid.bits, False, grid.block_size, np.dtype(np.float32), grid.clip)
        found = curvature(statistics, len(weight), damp=self.damp, act_order=self.act_order, remark=remark)
        if found is None or statistics is None:
            integers, level = self._grids(weight, grid, None)
            scale, zero = level.scales(integers[0]), level.zero_points(integers[1])
            blocks = weight.reshape(len(scale), -1, weight.shape[1])
            nearest = nearest_codes(blocks, scale, zero, grid).reshape(weight.shape)
            return _stored(nearest, integers, level, grid, None)
        target = self.target(weight, statistics, found)
        to_fit = target.astype(np.float32)
        kept = self._outliers(to_fit, grid, found)
        metric = found.covariance if grid.block_size else None
        integers, level = self._grids(np.where(kept, np.float32(0), to_fit), grid, metric)
        scale, zero = level.scales(integers[0]), level.zero_points(integers[1])
        fixed = FixedGrids(scale, zero, kept)
        codes, _, _, values = self.solve(target, grid, found, workers, fixed=fixed)
        return _stored(codes, integers, level, grid, Outliers(np.flatnonzero(kept), values))

    def _outliers(self, weight: Floats, grid: Grid, curvature: Curvature) -> npt.NDArray[np.bool_]:
        """Which weights [K, N] stay floats."""
        sensitivity = np.empty(len(weight))
        sensitivity[curvature.order] = np.diag(curvature.root) ** 2
        costs = _costs(weight, grid, curvature, sensitivity)
        limit = self.threshold * float(np.mean(weight.var(axis=1) * sensitivity))
        allowed = int(self.largest_share * weight.size)
        if np.count_nonzero(costs > limit) > allowed:
            limit = float(np.partition(costs.ravel(), -allowed - 1)[-allowed - 1])
        kept: npt.NDArray[np.bool_] = costs > limit
        return kept

    def _grids(
        self, weight: Floats, grid: Grid, metric: Doubles | None
    ) -> tuple[tuple[Floats, Floats], SecondLevel]:
        """Integers of the scales and of the zero points [K / B, N], and what they stand for."""
        scale, zero = fit(weight, grid, covariance=metric)
        scale = _without_zeros(scale, weight, self.second_level_block)
        steps, scale_scale, scale_zero = self._second_grid(scale)
        level = SecondLevel(
            scale_scale,
            scale_zero,
            scale_scale,
            scale_zero,
            self.second_level_bits,
            self.second_level_block,
        )
        # Scales have changed by being rounded; the range keeps its lower end, −zero · scale.
        shifted = (np.zeros_like(scale) if zero is None else zero) * scale / level.scales(steps)
        shifts, zero_scale, zero_zero = self._second_grid(shifted)
        return (steps, shifts), dataclasses.replace(level, zero_scale=zero_scale, zero_zero=zero_zero)

    def _second_grid(self, values: Floats) -> tuple[Floats, npt.NDArray[Any], npt.NDArray[Any]]:
        """Integers for ``values`` [K / B, N] ≥ 0, and the grids [K / B, ⌈N / C⌉] that they are on."""
        starts = np.arange(0, values.shape[1], self.second_level_block)
        lowest = np.minimum.reduceat(values, starts, axis=1)
        highest = np.maximum.reduceat(values, starts, axis=1)
        top = (1 << self.second_level_bits) - 1
        step = np.maximum((highest - lowest) / top, highest / _FINEST)
        step = np.where(step > 0, step, np.float32(1))
        # float16 keeps its precision down to 2^-14; only weights much smaller than usual need float32.
        dtype = np.float16 if step.min() >= np.finfo(np.float16).tiny else np.float32
        step = step.astype(dtype)
        subtracted = (-lowest / step.astype(np.float32)).astype(dtype)
        block_of = np.arange(values.shape[1]) // self.second_level_block
        parts = values / step.astype(np.float32)[:, block_of] + subtracted.astype(np.float32)[:, block_of]
        return np.clip(np.rint(parts), 0, top), step, subtracted


def _costs(weight: Floats, grid: Grid, curvature: Curvature, sensitivity: Doubles) -> Doubles:
    """What each weight [K, N] costs by not being an outlier.

    That is its own error; for the largest of a group, on which the grid depends, what the group's error would
    be lower by without it.
    """
    metric = curvature.covariance if grid.block_size else None
    costs = _rounding_costs(weight, grid, metric, sensitivity)
    groups = costs.reshape(-1, grid.block_size or len(weight), weight.shape[1])
    largest = np.abs(weight).reshape(groups.shape).argmax(axis=1)[:, None]
    rest = weight.copy().reshape(groups.shape)
    np.put_along_axis(rest, largest, 0, axis=1)
    without = _rounding_costs(rest.reshape(weight.shape), grid, metric, sensitivity).reshape(groups.shape)
    # A weight that was left out counts as 0, which every grid holds: it costs nothing there.
    saved = groups.sum(axis=1, keepdims=True) - without.sum(axis=1, keepdims=True)
    own = np.take_along_axis(groups, largest, axis=1)
    np.put_along_axis(groups, largest, np.maximum(own, saved), axis=1)
    return costs


def _rounding_costs(weight: Floats, grid: Grid, metric: Doubles | None, sensitivity: Doubles) -> Doubles:
    """(e_j R_jj)² of each weight [K, N], rounded to nearest."""
    error = round_to_grid(weight, *fit(weight, grid, covariance=metric), grid).dequantized() - weight
    costs: Doubles = error.astype(np.float64) ** 2 * sensitivity[:, None]
    return costs


def _without_zeros(scale: Floats, weight: Floats, columns: int) -> Floats:
    """``scale`` [K / B, N] where groups of zeros, which any scale fits, have the smallest of their block."""
    empty = ~weight.reshape(len(scale), -1, weight.shape[1]).any(axis=1)
    open_scale = np.where(empty, np.float32(np.inf), scale)
    smallest = np.minimum.reduceat(open_scale, np.arange(0, scale.shape[1], columns), axis=1)
    filled = np.minimum(open_scale, smallest[:, np.arange(scale.shape[1]) // columns])
    chosen: Floats = np.where(empty, filled, scale)
    return np.where(np.isinf(chosen), np.float32(1), chosen)


class _RealZeroGrid(Grid):
    """A grid whose zero point need not be an integer: q = clamp(round(w / scale + zero))."""

    def codes(self, values: Any, scale: Any, zero: Any) -> Any:
        """clamp(round(values / scale + zero))."""
        return np.clip(np.rint(values / scale + zero), self.lowest, self.highest)


def _stored(
    codes: npt.NDArray[Any],
    integers: tuple[Floats, Floats],
    level: SecondLevel,
    grid: Grid,
    outliers: Outliers | None,
) -> QuantizedWeight:
    scale, zero = (
        array.astype(np.uint8) if grid.block_size else array[0].astype(np.uint8) for array in integers
    )
    return QuantizedWeight(
        codes.astype(np.uint8), scale, zero, grid.bits, second_level=level, outliers=outliers
    )
