"""Round to nearest: every weight goes to the nearest point of its block's grid. Needs no data."""

from __future__ import annotations

from ..grid import Floats, Grid, QuantizedWeight, fit, round_to_grid


def round_to_nearest(weight: Floats, grid: Grid) -> QuantizedWeight:
    """Quantise ``weight`` [K, N] by rounding."""
    scale, zero = fit(weight, grid)
    return round_to_grid(weight, scale, zero, grid)
