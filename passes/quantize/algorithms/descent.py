"""Coordinate descent: go through the rows again and again, each at its best given all the others.

GPTQ's rows make up for errors of rows before them only. With G = (H + λI) E, E = W − Ŵ, the best place for
row j given every other row is the point nearest to

    ŵ_j + G_j / (H_jj + λ) ,

and the best scale of a group with integers c = ŵ / s, rows g, is s + cᵀ G_g / cᵀ H_gg c. Neither step can
raise the error tr Eᵀ (H + λI) E; scales are taken only if they still lower it once they are rounded to their
stored type. G is kept up to date: rows inside a block one after the other, the others by one product for each
block.

In the manner of Behdin et al., QuantEase, 2023, https://arxiv.org/abs/2309.01885; refitting the scales with
the integers fixed is ordinary least squares.
"""

from __future__ import annotations

import numpy as np

from ..grid import Doubles
from .curvature import Curvature
from .rounding import Rounding

_ROWS_AT_ONCE = 128


def descend(rounding: Rounding, curvature: Curvature, *, sweeps: int, refits_scales: bool) -> None:
    """Improve ``rounding`` in place by ``sweeps`` passes over its rows."""
    if sweeps:
        descent = _Descent(rounding, curvature, refits_scales)
        for _ in range(sweeps):
            descent.sweep()


class _Descent:
    """G and what a sweep needs to keep it up to date."""

    def __init__(self, rounding: Rounding, curvature: Curvature, refits_scales: bool) -> None:
        self.rounding = rounding
        self.covariance = curvature.covariance
        self.damping = curvature.damping
        error = rounding.target - rounding.dequantized
        self.gradient = self.covariance @ error + self.damping * error
        group = rounding.group_size
        whole_groups = group <= _ROWS_AT_ONCE
        self.step = _ROWS_AT_ONCE // group * group if whole_groups else _ROWS_AT_ONCE
        self.refits_groups = refits_scales and whole_groups
        self.refits_all = refits_scales and not self.refits_groups

    def sweep(self) -> None:
        rows = len(self.rounding.target)
        for start in range(0, rows, self.step):
            block = slice(start, min(start + self.step, rows))
            change = self._improve(block)
            self.gradient -= self.covariance[:, block] @ change
            self.gradient[block] -= self.damping * change
        if self.refits_all:
            for start in range(0, rows, self.rounding.group_size):
                self._refit_large_group(slice(start, start + self.rounding.group_size))

    def _improve(self, block: slice) -> Doubles:
        """Go through the rows of ``block``; gives what was added to what they stand for."""
        rounding, group = self.rounding, self.rounding.group_size
        metric = self.covariance[block, block] + self.damping * np.eye(block.stop - block.start)
        gradient = self.gradient[block]
        change = np.zeros_like(gradient)
        for offset in range(len(change)):
            row = block.start + offset
            slope = gradient[offset] - metric[offset, :offset] @ change[:offset]
            before = rounding.dequantized[row].copy()
            change[offset] = rounding.round_row(row, before + slope / metric[offset, offset]) - before
            if self.refits_groups and (row + 1) % group == 0:
                inside = slice(offset + 1 - group, offset + 1)
                now = gradient[inside] - metric[inside, : offset + 1] @ change[: offset + 1]
                rows = slice(row + 1 - group, row + 1)
                change[inside] += self._refit_group(rows, now, metric[inside, inside])
        return change

    def _refit_large_group(self, rows: slice) -> None:
        """Refit the scale of a group that is larger than a block."""
        points = self.rounding.points(rows)
        image = self.covariance[:, rows] @ points
        image[rows] += self.damping * points
        step = self._scale_step(rows, points, self.gradient[rows], image[rows])
        self.rounding.dequantized[rows] += points * step
        self.gradient -= image * step

    def _refit_group(self, rows: slice, gradient: Doubles, metric: Doubles) -> Doubles:
        """Refit the scale of a group inside a block; gives what was added to what its rows stand for."""
        points = self.rounding.points(rows)
        change = points * self._scale_step(rows, points, gradient, metric @ points)
        self.rounding.dequantized[rows] += change
        return change

    def _scale_step(self, rows: slice, points: Doubles, gradient: Doubles, image: Doubles) -> Doubles:
        """Set the group's scales [N] where that lowers the error; gives what was added to them."""
        group = rows.start // self.rounding.group_size
        scale = self.rounding.scale[group].astype(np.float64)
        slope = np.einsum("kn,kn->n", points, gradient)
        bend = np.einsum("kn,kn->n", points, image)
        best = scale + slope / np.where(bend > 0, bend, 1)
        step = self.rounding.grid.storable(best) - scale
        lowers = (best > 0) & (step * (step * bend - 2 * slope) < 0)
        step = np.where(lowers, step, 0)
        self.rounding.scale[group] = scale + step
        return step
