"""Codes under construction: one slab of columns whose rows are rounded in any order, and again."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from ..grid import Doubles, Format, fit, nearest_codes, pair_bounds
from ..quantized_weight import Floats


@dataclasses.dataclass
class Rounding:
    """A slab of N columns of a weight on its way to codes; arrays change in place.

    Attributes:
        grid: what values are rounded to.
        target: [K, N] float64, what is to be approximated.
        scale: [K / B, N].
        zero: [K / B, N], or None for 0.
        kept: [K, N], which weights are not rounded but kept in float16; None for none.
        codes: [K, N] float64.
        dequantized: [K, N] float64, what the codes stand for, and the kept weights.
    """

    grid: Format
    target: Doubles
    scale: Floats
    zero: Floats | None
    kept: npt.NDArray[np.bool_] | None = None
    codes: Doubles = dataclasses.field(init=False)
    dequantized: Doubles = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.dequantized = np.zeros_like(self.target)
        self.codes = np.zeros_like(self.target)
        if self.grid.limit_pairs:
            # Rows are held to what their pair's other row is at that time, from the start.
            blocks = self.target.astype(np.float32).reshape(len(self.scale), -1, self.target.shape[1])
            self.codes[:] = nearest_codes(blocks, self.scale, self.zero, self.grid).reshape(self.codes.shape)

    @property
    def group_size(self) -> int:
        """Rows that share a scale."""
        return len(self.target) // len(self.scale)

    def zero_of(self, group: int) -> Floats | None:
        """Zero points [N] of a group."""
        return None if self.zero is None else self.zero[group]

    def fit_group(self, group: int, values: Doubles, metric: Doubles) -> None:
        """Fit the group's grid to ``values`` [B, N], weighted by ``metric`` [B, B] if it clips."""
        scale, zero = fit(values.astype(np.float32), self.grid, covariance=metric)
        self.scale[group] = scale[0]
        if self.zero is not None and zero is not None:
            self.zero[group] = zero[0]

    def round_row(self, row: int, values: Doubles) -> Doubles:
        """Round ``values`` [N] for one row; gives what the row now stands for."""
        group = row // self.group_size
        scale, zero = self.scale[group], self.zero_of(group)
        codes = self.grid.codes(values, scale, zero)
        partner = row ^ 1
        if self.grid.limit_pairs and partner < len(self.codes):
            codes = np.clip(codes, *pair_bounds(self.codes[partner]))
        self.codes[row] = codes
        found: Doubles = self.grid.values(codes, scale.astype(np.float64), zero)
        if self.kept is not None:
            found = np.where(self.kept[row], values.astype(np.float16), found)
        self.dequantized[row] = found
        return found

    def points(self, rows: slice) -> Doubles:
        """What the codes of rows of one group stand for at scale 1; 0 for kept weights."""
        zero = self.zero_of(rows.start // self.group_size)
        found: Doubles = self.grid.values(self.codes[rows], 1.0, zero)
        return found if self.kept is None else np.where(self.kept[rows], 0, found)
