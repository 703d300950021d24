"""SpQR: a few weights that would hurt most stay in float16, and scales and zero points are integers themselves.

    Ŵ = (Q − z) · s   except at the outliers,   s = (Q_s − a) · b,   z = (Q_z − c) · d

- *outliers*: a weight whose rounding error would cost (e_j R_jj)² in the output, more than τ times what leaving
  out an average weight would cost, mean over all weights of var(w_j) R_jj² (var within a row). At most
  `largest_share` of the weights, the most costly ones. They are found on grids fitted to all weights; then
  grids are fitted again without them.
- *bilevel groups*: the scales of 16 neighbouring columns share a grid of 3 bits, and so do their zero points.
- GPTQ's loop and descent then choose the integers on these grids; what is added to an outlier to make up for
  others' errors is stored with it.

Source: Dettmers et al., SpQR, 2023, https://arxiv.org/abs/2306.03078. There outliers are found, and grids
fitted, as the loop reaches them; here before it, so that act-order needs no permutation at run time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from ..grid import Doubles, Floats, Format, Grid, fit, nearest_codes
from ..quantized_weight import Outliers, QuantizedWeight, SecondLevel
from .base import LayerStatistics, Remark
from .curvature import Curvature, curvature
from .gptq import GPTQ

_FINEST = 2048
"""Steps are at least this part of the largest value, so that what is subtracted fits float16 exactly."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpQR(GPTQ):
    """SpQR with its settings, beside those of `GPTQ`.

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
        self, weight: Floats, grid: Format, statistics: LayerStatistics | None, remark: Remark
    ) -> QuantizedWeight:
        """Quantise ``weight`` [K, N]; of the grid, bits, group size and clipping count.

        Raises:
            ValueError: the grid is a code book.
        """
        if not isinstance(grid, Grid):
            raise ValueError("spqr needs a grid of integers, found a code book")
        plain = dataclasses.replace(grid, symmetric=False, limit_pairs=False)
        grid = _RealZeroGrid(
            **{field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
        )
        found = curvature(statistics, len(weight), damp=self.damp, act_order=self.act_order, remark=remark)
        if found is None:
            integers, level = self._grids(weight, plain, None)
            scale, zero = level.scales(integers[0]), level.zero_points(integers[1])
            blocks = weight.reshape(len(scale), -1, weight.shape[1])
            codes: npt.NDArray[Any] = nearest_codes(blocks, scale, zero, grid).reshape(weight.shape)
            return _stored(codes, integers, level, grid, None)
        metric = found.covariance if grid.block_size else None
        kept = self._outliers(weight, plain, found)
        integers, level = self._grids(np.where(kept, np.float32(0), weight), plain, metric)
        scale, zero = level.scales(integers[0]), level.zero_points(integers[1])
        target = weight.astype(np.float64)
        codes, values = self.solve(target, grid, scale, zero, found, kept=kept, fixed_grids=True)
        return _stored(codes, integers, level, grid, Outliers(np.flatnonzero(kept), values))

    def _outliers(self, weight: Floats, grid: Grid, curvature: Curvature) -> npt.NDArray[np.bool_]:
        """Which weights [K, N] stay floats."""
        scale, zero = fit(weight, grid, covariance=curvature.covariance if grid.block_size else None)
        blocks = weight.reshape(len(scale), -1, weight.shape[1])
        points = None if zero is None else zero[:, None]
        rounded = grid.values(nearest_codes(blocks, scale, zero, grid), scale[:, None], points)
        sensitivity = np.empty(len(weight))
        sensitivity[curvature.order] = np.diag(curvature.root) ** 2
        costs = (weight - rounded.reshape(weight.shape)).astype(np.float64) ** 2 * sensitivity[:, None]
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
        step = np.maximum((highest - lowest) / top, np.maximum(highest, 2.0**-20) / _FINEST)
        # float16 keeps its precision down to 2^-14; only weights much smaller than usual need float32.
        dtype = np.float16 if step.min() >= np.finfo(np.float16).tiny else np.float32
        step = step.astype(dtype)
        subtracted = (-lowest / step.astype(np.float32)).astype(dtype)
        block_of = np.arange(values.shape[1]) // self.second_level_block
        parts = values / step.astype(np.float32)[:, block_of] + subtracted.astype(np.float32)[:, block_of]
        return np.clip(np.rint(parts), 0, top), step, subtracted


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
