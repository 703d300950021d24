"""GPTQ: round one row of [K, N] after the other, and let the rows that are left make up for the error.

Minimises ‖X̂ᵀ(W − Ŵ)‖² = tr (W − Ŵ)ᵀ H (W − Ŵ), H = E[x̂ x̂ᵀ], greedily in the order of the rows. With H = R Rᵀ,
R upper triangular, the error is Σ_j ‖Σ_{i≤j} R_ij e_i‖², e = W − Ŵ, so row j does best as the nearest point to

    w̃_j = w_j + Σ_{i<j} (R_ij / R_jj) e_i .

These are the integers of the published recurrence (e'_j = (w̃_j − ŵ_j) / U_jj; W_{>j} −= U_{j,>j} e'_j with
H⁻¹ = Uᵀ U, R = U⁻¹) without inverting H: each block of rows gets the errors of all rows before it by one
matrix product, and only inside a block one row follows the other. All of it is float64.

- *act-order*: rows with the largest E[x²] first. Grids then come from the original weight (static groups), so
  nothing of the order reaches the runtime. In the natural order, a group's grid is fitted to its updated rows
  when the loop gets there.
- *damping*: `damp` times the mean of H's diagonal is added to it; ten times more as long as Cholesky fails, up
  to 1, after which the layer is rounded to nearest, with a remark.
- *dead rows*, whose input was always zero in calibration, take no part and are rounded to nearest.

Source: Frantar et al., GPTQ, 2022, https://arxiv.org/abs/2210.17323.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import scipy.linalg

from ..grid import Floats, Grid, QuantizedWeight, codes, fit, quantized_weight
from .base import LayerStatistics, Remark
from .rtn import round_to_nearest

Doubles = npt.NDArray[np.float64]
_COLUMNS_AT_ONCE = 2048
"""Columns are independent; a slab of them with its errors stays small beside the model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQ:
    """GPTQ with its settings.

    Attributes:
        damp: share of the mean of H's diagonal that is added to the diagonal.
        act_order: rows with the largest E[x²] first, with static groups.
        block_size: rows that are updated by one matrix product.
    """

    needs_statistics: ClassVar[bool] = True
    needs_prefix_error: ClassVar[bool] = False

    damp: float = 0.01
    act_order: bool = True
    block_size: int = 128

    def __call__(
        self, weight: Floats, grid: Grid, statistics: LayerStatistics | None, remark: Remark
    ) -> QuantizedWeight:
        """Quantise ``weight`` [K, N] under ``statistics.covariance``."""
        covariance = _covariance(statistics, len(weight))
        order = _order(covariance, self.act_order)
        root = damped_root(covariance[np.ix_(order, order)], self.damp)
        if root is None:
            remark("rounded to nearest: its inputs' covariance is not positive definite even with damping 1")
            return round_to_nearest(weight, grid)
        slabs = [
            _quantize_slab(weight[:, start : start + _COLUMNS_AT_ONCE], grid, root, order, self)
            for start in range(0, weight.shape[1], _COLUMNS_AT_ONCE)
        ]
        return quantized_weight(
            np.concatenate([slab[0] for slab in slabs], axis=1),
            np.concatenate([slab[1] for slab in slabs], axis=1),
            None if grid.symmetric else np.concatenate([slab[2] for slab in slabs], axis=1),
            grid,
        )


def _covariance(statistics: LayerStatistics | None, features: int) -> Doubles:
    if statistics is None:
        raise ValueError("gptq needs the covariance of the layer's inputs")
    if statistics.covariance.shape != (features, features):
        raise ValueError(f"expected a covariance of {features} features, found {statistics.covariance.shape}")
    return statistics.covariance.astype(np.float64)


def _order(covariance: Doubles, act_order: bool) -> npt.NDArray[np.intp]:
    if not act_order:
        return np.arange(len(covariance))
    return np.argsort(-np.diag(covariance), kind="stable")


def damped_root(covariance: Doubles, damp: float) -> Doubles | None:
    """R, upper triangular with R Rᵀ = H + damping, [K, K]; None if no damping up to 1 lets Cholesky succeed."""
    damped = covariance.copy()
    diagonal = np.diag(covariance).copy()
    diagonal[diagonal == 0] = 1
    unit = diagonal.mean()
    while True:
        np.fill_diagonal(damped, diagonal + damp * unit)
        try:
            # H = R Rᵀ with R upper is Cholesky from the last row to the first.
            return np.ascontiguousarray(scipy.linalg.cholesky(damped[::-1, ::-1], lower=True)[::-1, ::-1])
        except (scipy.linalg.LinAlgError, ValueError):
            if damp >= 1:
                return None
            damp = min(10 * damp, 1.0)


def _quantize_slab(
    weight: Floats, grid: Grid, root: Doubles, order: npt.NDArray[np.intp], settings: GPTQ
) -> tuple[Doubles, Floats, Floats]:
    rows, columns = weight.shape
    group = grid.block_size or rows
    sequential = not settings.act_order and grid.block_size > 0
    step = group if sequential else settings.block_size
    scale, zero = fit(weight, grid)
    zero = np.zeros_like(scale) if zero is None else zero
    feedback = root / np.diag(root)
    target = weight[order].astype(np.float64)
    errors = np.zeros_like(target)
    integers = np.empty_like(target)
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        updated = target[block] + feedback[:start, block].T @ errors[:start]
        if sequential:
            new_scale, new_zero = fit(updated.astype(np.float32), grid)
            scale[start // group] = new_scale[0]
            zero[start // group] = 0 if new_zero is None else new_zero[0]
        for row in range(start, block.stop):
            value = updated[row - start] + feedback[start:row, row] @ errors[start:row]
            own_scale, own_zero = scale[order[row] // group], zero[order[row] // group]
            integers[row] = codes(value, own_scale, own_zero, grid)
            errors[row] = target[row] - (integers[row] - own_zero) * own_scale.astype(np.float64)
    in_order = np.empty_like(integers)
    in_order[order] = integers
    return in_order, scale, zero
