"""AWQ's clipping: round to nearest on grids whose range is the best for the layer's output.

20 ranges from the whole down to half of it are tried for each block of B rows of a column; the one with the
least error in the output that the block alone causes, eᵀ H e with the block's own part of H, is taken.

Source: Lin et al., AWQ, 2023, https://arxiv.org/abs/2306.00978. Its scaling of channels is a pass of its own,
``scale{method=awq}``.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from ....runtime.workers import SERIAL, Workers
from ..grid import Doubles, Format, fit, round_to_grid
from ..quantized_weight import Floats, QuantizedWeight
from .base import LayerStatistics, Remark, covariance_of, slabs

_FACTORS = tuple(1 - 0.5 * step / 20 for step in range(1, 21))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWQClip:
    """Round to nearest after a search for the clipping that harms the output least."""

    needs_statistics: ClassVar[bool] = True
    needs_prefix_error: ClassVar[bool] = False

    def __call__(
        self,
        weight: Floats,
        grid: Format,
        statistics: LayerStatistics | None,
        remark: Remark,
        workers: Workers = SERIAL,
    ) -> QuantizedWeight:
        """Quantise ``weight`` [K, N] under ``statistics.covariance``."""
        covariance = covariance_of(statistics, len(weight))
        grid = grid.prepared(weight)
        parts = (np.ascontiguousarray(weight[:, columns]) for columns in slabs(weight.shape[1]))
        found = list(workers.map(_fitted, (covariance, grid), parts))
        scale = np.concatenate([scale for scale, _ in found], axis=1)
        zeros = [zero for _, zero in found if zero is not None]
        return round_to_grid(weight, scale, np.concatenate(zeros, axis=1) if zeros else None, grid)


def _fitted(shared: tuple[Doubles, Format], weight: Floats) -> tuple[Floats, Floats | None]:
    """Scale and zero point of some columns."""
    covariance, grid = shared
    return fit(weight, grid, covariance=covariance, factors=_FACTORS)
