"""The loop of GPTQ: each row is rounded where it makes up for the errors of the rows before it.

With H = R Rᵀ, R upper triangular, the error is Σ_j ‖Σ_{i≤j} R_ij e_i‖², e = W − Ŵ, so given the rows before
it, row j does best as the nearest point to

    w̃_j = w_j + Σ_{i<j} (R_ij / R_jj) e_i .

These are the integers of the published recurrence (e'_j = (w̃_j − ŵ_j) / U_jj, W_{>j} −= U_{j,>j} e'_j with
H⁻¹ = Uᵀ U, so R = U⁻¹) without inverting H. Each block of rows gets the errors of all rows before it by one
matrix product; only inside a block one row follows the other.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from ..grid import Doubles
from .curvature import Curvature
from .rounding import Rounding


def round_with_feedback(
    rounding: Rounding, curvature: Curvature, *, block_size: int, fits_groups: bool
) -> None:
    """Round all rows once, in the order of ``curvature``.

    Args:
        rounding: what to round; its rows change in place.
        curvature: of the output error.
        block_size: rows that are updated by one matrix product.
        fits_groups: fit each group's grid to its updated rows; the order must be the natural one.
    """
    order, root = curvature.order, curvature.root
    diagonal = np.diag(root)
    target = rounding.target[order]
    errors = np.zeros_like(target)
    step = rounding.group_size if fits_groups else block_size
    for start in range(0, len(order), step):
        block = slice(start, min(start + step, len(order)))
        # Of these columns only: the whole would be as large as H, once for each worker.
        feedback = root[: block.stop, block] / diagonal[block]
        updated = target[block] + feedback[:start].T @ errors[:start]
        if fits_groups:
            part = root[block, block]
            expected = target[block] + _passed_on(feedback[start:], updated - target[block])
            rounding.fit_group(start // step, expected, part @ part.T)
        for row in range(start, block.stop):
            value = updated[row - start] + feedback[start:row, row - start] @ errors[start:row]
            errors[row] = target[row] - rounding.round_row(int(order[row]), value)


def _passed_on(feedback: Doubles, change: Doubles) -> Doubles:
    """How rows change that are not rounded yet, given what the rows before them add to each: [B, N].

    A row that changes without being rounded counts as an error of its own, which the rows behind it make up
    for in turn: x_j = change_j − Σ_{i<j} feedback_ij x_i.
    """
    solved: Doubles = scipy.linalg.solve_triangular(feedback, change, trans="T", unit_diagonal=True)
    return solved
