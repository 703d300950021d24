"""H, the curvature of a layer's output error in its weights, and its triangular root."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import scipy.linalg

from ..grid import Doubles
from .base import LayerStatistics, Remark, covariance_of

_LARGEST_DAMPING = 1.0


@dataclasses.dataclass(frozen=True)
class Curvature:
    """H = E[x̂ x̂ᵀ] with damping, and R, upper triangular, R Rᵀ = H + damping · I, in the order of the loop.

    Attributes:
        covariance: [K, K] float64, without damping, rows in their natural order.
        damping: what is added to the diagonal.
        order: [K] the row that comes first, second, … in the loop.
        root: [K, K] R; its row i is row ``order[i]`` of the weight.
    """

    covariance: Doubles
    damping: float
    order: npt.NDArray[np.intp]
    root: Doubles


def curvature(
    statistics: LayerStatistics | None, features: int, *, damp: float, act_order: bool, remark: Remark
) -> Curvature | None:
    """The curvature for a layer of ``features`` inputs; None, and a remark, if no damping makes it definite.

    ``damp`` is the part of the diagonal's mean that is added to it; ten times more as long as Cholesky fails,
    up to 1. Dead inputs, always zero in calibration, do not count in the mean.

    Raises:
        ValueError: there are no statistics, or not of ``features`` inputs.
    """
    covariance = covariance_of(statistics, features)
    diagonal = np.diag(covariance)
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(features)
    living = diagonal[diagonal > 0]
    unit = float(living.mean()) if living.size else 1.0
    # H = R Rᵀ with R upper is Cholesky from the last row to the first.
    backwards = order[::-1]
    for share in _dampings(damp):
        damped = covariance[np.ix_(backwards, backwards)]
        np.fill_diagonal(damped, np.diag(damped) + share * unit)
        try:
            # Transposed, which is the same matrix, it lies as LAPACK wants it and is overwritten.
            root = scipy.linalg.cholesky(damped.T, lower=True, overwrite_a=True)[::-1, ::-1]
        except (scipy.linalg.LinAlgError, ValueError):
            continue
        if share > damp:
            remark(f"its inputs' covariance needed damping {share:g} instead of {damp:g}")
        return Curvature(covariance, share * unit, order, np.ascontiguousarray(root))
    remark(f"rounded to nearest: its inputs' covariance is not positive definite with damping {share:g}")
    return None


def _dampings(damp: float) -> list[float]:
    shares = [damp]
    while shares[-1] < _LARGEST_DAMPING:
        shares.append(min(10 * shares[-1], _LARGEST_DAMPING) if shares[-1] else 0.01)
    return shares
