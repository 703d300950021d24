"""Algorithms that choose the integers of one weight, by name. A new one adds a file and a row here."""

from __future__ import annotations

from typing import Protocol

from ..grid import Floats, Grid, QuantizedWeight
from .rtn import round_to_nearest


class Algorithm(Protocol):
    """Chooses integers, scales and zero points for one weight."""

    def __call__(self, weight: Floats, grid: Grid) -> QuantizedWeight:
        """Quantise ``weight`` [K, N] float32, finite, to ``grid``."""


ALGORITHMS: dict[str, Algorithm] = {"rtn": round_to_nearest}

__all__ = ["ALGORITHMS", "Algorithm"]
