"""Round to nearest: every weight goes to the nearest point of its block's grid. Needs no data."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ....runtime.workers import SERIAL, Workers
from ..grid import Format, fit, round_to_grid
from ..quantized_weight import Floats, QuantizedWeight
from .base import LayerStatistics, Remark


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundToNearest:
    """`round_to_nearest` as an `Algorithm`."""

    needs_statistics: ClassVar[bool] = False
    needs_prefix_error: ClassVar[bool] = False

    def __call__(
        self,
        weight: Floats,
        grid: Format,
        statistics: LayerStatistics | None,
        remark: Remark,
        workers: Workers = SERIAL,
    ) -> QuantizedWeight:
        """Quantise ``weight`` [K, N]; statistics are not looked at."""
        return round_to_nearest(weight, grid)


def round_to_nearest(weight: Floats, grid: Format) -> QuantizedWeight:
    """Quantise ``weight`` [K, N] by rounding."""
    grid = grid.prepared(weight)
    scale, zero = fit(weight, grid)
    return round_to_grid(weight, scale, zero, grid)
