"""Statistics of activations that are added up while a model runs: nothing is kept but the sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
_ROWS = 2048
"""Products of so many float32 rows lose no more than products of one; the sums over them are in float64."""


class Covariance:
    """E[xᵀy] of rows x and y, [features, features]; with y = x the second moment E[xᵀx].

    Half of the Hessian of a linear layer's squared error (GPTQ, eq. 1): H = 2 · E[xᵀx].

    Args:
        features: the length of a row.
    """

    def __init__(self, features: int) -> None:
        self._sum: Doubles = np.zeros((features, features))
        self.tokens = 0

    def update(self, rows: npt.NDArray[Any], others: npt.NDArray[Any] | None = None) -> None:
        """Add rows [tokens, features], and as many ``others`` in the place of y."""
        others = rows if others is None else others
        for start in range(0, len(rows), _ROWS):
            part = slice(start, start + _ROWS)
            # Rows that overflow leave infinities, which whoever reads the mean must look for.
            with np.errstate(over="ignore", invalid="ignore"):
                self._sum += rows[part].T @ others[part]
        self.tokens += len(rows)

    @property
    def mean(self) -> Doubles:
        """E[xᵀy]; zeros where there was no row. Not finite if rows, or their squares, were not."""
        return self._sum / max(self.tokens, 1)
