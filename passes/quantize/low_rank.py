"""EoRA: a low-rank residual that makes up for the error of a quantised weight where the inputs have energy.

    min over A [K, r], B [r, N] of ‖X(W − Ŵ − A·B)‖²:   with C = E[xᵀx] = V Λ Vᵀ and S = Λ^½ Vᵀ,
    the r largest singular triplets  U Σ Zᵀ  of  S(W − Ŵ)  give  A = S⁺ U Σ^½,  B = Σ^½ Zᵀ.

Directions without energy (eigenvalues that are zero to rounding) have no part in S⁺.
Source: Liu et al., EoRA, 2024, https://arxiv.org/abs/2410.21271, in the [in, out] convention.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.linalg

from .quantized_weight import Floats

Doubles = npt.NDArray[np.float64]


def low_rank_residual(
    weight: Floats | Doubles, dequantized: Floats, covariance: Doubles, rank: int
) -> tuple[Floats, Floats]:
    """A [K, r] and B [r, N], float32, such that ``dequantized`` + A·B approximates ``weight`` [K, N].

    r is ``rank``, or less where the matrix itself has a smaller one. ``covariance`` is [K, K].
    """
    energies, directions = scipy.linalg.eigh(covariance)
    kept = energies > energies[-1] * len(energies) * np.finfo(np.float64).eps
    roots, basis = np.sqrt(energies[kept]), directions[:, kept]
    error = (weight.astype(np.float64) - dequantized).T
    left, singular, right = scipy.linalg.svd((error @ basis * roots).T, full_matrices=False)
    used = min(rank, len(singular))
    shares = np.sqrt(singular[:used])
    down = basis / roots @ left[:, :used] * shares
    up = shares[:, None] * right[:used]
    return down.astype(np.float32), up.astype(np.float32)
