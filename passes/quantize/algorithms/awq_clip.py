"""AWQ's clipping: round to nearest on grids whose range is the best for the layer's output.

20 ranges from the whole down to half of it are tried for each block of B rows of a column; the one with the
least error in the output that the block alone causes, eᵀ H e with the block's own part of H, is taken.

Source: Lin et al., AWQ, 2023, https://arxiv.org/abs/2306.00978. Its scaling of channels is a pass of its own,
``scale{method=awq}``.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ..grid import Format, fit, round_to_grid
from ..quantized_weight import Floats, QuantizedWeight
from .base import LayerStatistics, Remark, covariance_of

_FACTORS = tuple(1 - 0.5 * step / 20 for step in range(1, 21))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWQClip:
    """Round to nearest after a search for the clipping that harms the output least."""

    needs_statistics: ClassVar[bool] = True
    needs_prefix_error: ClassVar[bool] = False

    def __call__(
        self, weight: Floats, grid: Format, statistics: LayerStatistics | None, remark: Remark
    ) -> QuantizedWeight:
        """Quantise ``weight`` [K, N] under ``statistics.covariance``."""
        covariance = covariance_of(statistics, len(weight))
        grid = grid.prepared(weight)
        scale, zero = fit(weight, grid, covariance=covariance, factors=_FACTORS)
        return round_to_grid(weight, scale, zero, grid)
