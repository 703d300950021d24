"""GPTQ: round one row of [K, N] after the other, and let the rows that are left make up for the error.

Minimises ‖X̂ᵀ(W − Ŵ)‖² = tr (W − Ŵ)ᵀ H (W − Ŵ), H = E[x̂ x̂ᵀ]: the loop of `feedback`, once, gives GPTQ's
integers, and `descent` improves on them. All of it is float64; columns are independent and go in slabs.

- *act-order*: rows with the largest E[x²] first. Grids then come from the original weight (static groups), so
  nothing of the order reaches the runtime. In the natural order, a group's grid is fitted to its updated rows
  when the loop gets there. One grid per channel is always fitted to the original weight.
- *clipping*, where the grid asks for it: grids of groups minimise the error that the group alone causes in
  the output (its block of H, as MARLIN does, https://arxiv.org/abs/2408.11743), grids of channels the plain
  squared error; then each sweep of the descent refits the scales to the integers.
- *damping*: `damp` times the mean of H's diagonal is added to it; ten times more as long as Cholesky fails,
  up to 1, after which the layer is rounded to nearest, with a remark.
- *dead rows*, whose input was always zero in calibration, come out rounded to nearest: the published code
  sets them to zero, which would delete what calibration happened not to reach.

``GPTQ(sweeps=0)`` on a grid without clipping is the published algorithm.

Source: Frantar et al., GPTQ, 2022, https://arxiv.org/abs/2210.17323.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ....runtime.workers import SERIAL, Workers
from ..grid import Doubles, Format, fit
from ..quantized_weight import Floats, QuantizedWeight
from .base import LayerStatistics, Remark, slabs
from .curvature import Curvature, curvature
from .descent import descend
from .feedback import round_with_feedback
from .rounding import Rounding
from .rtn import round_to_nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQ:
    """GPTQ with its settings.

    Attributes:
        damp: part of the mean of H's diagonal that is added to the diagonal.
        act_order: rows with the largest E[x²] first, with static groups.
        block_size: rows that are updated by one matrix product.
        sweeps: passes of coordinate descent after the loop. On a small trained decoder at 2 bits per channel
            they brought the output error from 23 % of that of rounding to 17 %, six to 16 %. Each takes about
            two thirds of the loop's time.
    """

    needs_statistics: ClassVar[bool] = True
    needs_prefix_error: ClassVar[bool] = False

    damp: float = 0.01
    act_order: bool = True
    block_size: int = 128
    sweeps: int = 3

    def __call__(
        self,
        weight: Floats,
        grid: Format,
        statistics: LayerStatistics | None,
        remark: Remark,
        workers: Workers = SERIAL,
    ) -> QuantizedWeight:
        """Quantise ``weight`` [K, N] under ``statistics.covariance``."""
        found = curvature(statistics, len(weight), damp=self.damp, act_order=self.act_order, remark=remark)
        if found is None or statistics is None:
            return round_to_nearest(weight, grid)
        target = self.target(weight, statistics, found)
        grid = grid.prepared(target.astype(np.float32))
        codes, scale, zero, _ = self.solve(target, grid, found, workers)
        return grid.stored(codes, scale, zero)

    def aim(self, weight: Floats, statistics: LayerStatistics) -> Doubles:
        """What the quantised weight [K, N] approximates, for whatever is to make up for the rest."""
        found = curvature(
            statistics, len(weight), damp=self.damp, act_order=self.act_order, remark=lambda _: None
        )
        return weight.astype(np.float64) if found is None else self.target(weight, statistics, found)

    def target(self, weight: Floats, statistics: LayerStatistics, curvature: Curvature) -> Doubles:
        """What is to be approximated, [K, N]: the weight itself."""
        return weight.astype(np.float64)

    def solve(
        self,
        target: Doubles,
        grid: Format,
        curvature: Curvature,
        workers: Workers,
        *,
        fixed: FixedGrids | None = None,
    ) -> tuple[Floats, Floats, Floats | None, npt.NDArray[np.float16]]:
        """Choose grids and codes, one slab of columns apart from the other.

        Args:
            target: [K, N], what is to be approximated.
            grid: what codes mean.
            curvature: of the output error.
            workers: do the slabs.
            fixed: grids that are not to be fitted, with the weights that stay floats.

        Returns:
            Codes [K, N], scale and zero point [K / B, N], and the values [nnz] of the kept weights, row by
            row.
        """
        parts = slabs(target.shape[1])
        items = (_Slab.of(target, columns, fixed) for columns in parts)
        found = list(workers.map(_solved, (self, grid, curvature), items))
        codes, scale = (np.concatenate([slab[index] for slab in found], axis=1) for index in (0, 1))
        zeros = [slab[2] for slab in found if slab[2] is not None]
        zero = np.concatenate(zeros, axis=1) if zeros else None
        if fixed is None:
            return codes, scale, zero, np.zeros(0, np.float16)
        values = np.zeros(target.shape, np.float16)
        for columns, slab in zip(parts, found, strict=True):
            values[:, columns][fixed.kept[:, columns]] = slab[3]
        return codes, scale, zero, values[fixed.kept]


@dataclasses.dataclass(frozen=True, eq=False)
class FixedGrids:
    """Grids that were decided before codes are chosen.

    Attributes:
        scale: [K / B, N].
        zero: [K / B, N].
        kept: [K, N], which weights are not rounded but kept in float16.
    """

    scale: Floats
    zero: Floats
    kept: npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True, eq=False)
class _Slab:
    """Some columns of a target, with their fixed grids if there are any; arrays of their own."""

    target: Doubles
    fixed: FixedGrids | None

    @classmethod
    def of(cls, target: Doubles, columns: slice, fixed: FixedGrids | None) -> _Slab:
        part = (slice(None), columns)
        if fixed is not None:
            fixed = FixedGrids(
                fixed.scale[part].copy("C"), fixed.zero[part].copy("C"), fixed.kept[part].copy("C")
            )
        return cls(target[part].copy("C"), fixed)


_COLUMNS_TO_FIT = 128
"""At a time."""

_Solved = tuple[Floats, Floats, Floats | None, npt.NDArray[np.float16]]
"""Codes, scale, zero point, values of the kept weights, row by row."""


def _solved(shared: tuple[GPTQ, Format, Curvature], slab: _Slab) -> _Solved:
    """Choose the codes of one slab, and its grids where they are not fixed."""
    settings, grid, curvature = shared
    fixed, kept = slab.fixed, None
    if fixed is None:
        metric = curvature.covariance if grid.block_size else None
        scale, zero = _fitted(slab.target, grid, metric)
    else:
        scale, zero, kept = fixed.scale.copy(), fixed.zero.copy(), fixed.kept
    rounding = Rounding(grid, slab.target, scale, zero, kept)
    in_groups = not settings.act_order and grid.block_size > 0
    round_with_feedback(
        rounding, curvature, block_size=settings.block_size, fits_groups=in_groups and fixed is None
    )
    descend(rounding, curvature, sweeps=settings.sweeps, refits_scales=grid.clip and fixed is None)
    values = np.zeros(0) if kept is None else rounding.dequantized[kept]
    return rounding.codes.astype(np.float32), rounding.scale, rounding.zero, values.astype(np.float16)


def _fitted(target: Doubles, grid: Format, metric: Doubles | None) -> tuple[Floats, Floats | None]:
    """Grids for a target [K, N], a few columns at a time: trying a range takes several copies of them."""
    scales, zeros = [], []
    for start in range(0, target.shape[1], _COLUMNS_TO_FIT):
        columns = target[:, start : start + _COLUMNS_TO_FIT].astype(np.float32)
        scale, zero = fit(columns, grid, covariance=metric)
        scales.append(scale)
        zeros += [] if zero is None else [zero]
    return np.concatenate(scales, axis=1), np.concatenate(zeros, axis=1) if zeros else None
