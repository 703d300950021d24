"""Gradient descent on orthogonal matrices by Cayley's transform.

    M ← β M − G                                      momentum, G = ∂loss/∂X
    Ŵ = M Xᵀ − ½ X (Xᵀ M Xᵀ),   W = Ŵ − Ŵᵀ           what of it turns X
    X ← (I − α/2 W)⁻¹ (I + α/2 W) X,   M ← W X       α = min(learning rate, 1 / ‖W‖₁)

Since W is skew-symmetric, the transform is orthogonal, and so X stays orthogonal to rounding: it needs no
projection back. Li, Fuxin and Todorovic (2020), Algorithm 1, which SpinQuant (Liu et al., 2024) uses; they
approximate the inverse by five iterations, here the equation is solved, in float64: for matrices of a model's
width that costs little beside the model's own products.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch


class CayleySGD:
    """Steps for a set of orthogonal matrices.

    Args:
        matrices: float64 [n, n], orthogonal; changed in place, their ``grad`` is read.
        momentum: β.
        directions: M of each, where steps were made before; else zero.
    """

    def __init__(
        self,
        matrices: Sequence[torch.Tensor],
        *,
        momentum: float,
        directions: Sequence[npt.NDArray[np.float64]] | None = None,
    ) -> None:
        self._matrices = matrices
        self._momentum = momentum
        self._directions = (
            [torch.zeros_like(matrix) for matrix in matrices]
            if directions is None
            else [torch.tensor(direction) for direction in directions]
        )

    @property
    def directions(self) -> list[npt.NDArray[np.float64]]:
        """M of each matrix, for an optimiser that goes on from here."""
        return [direction.numpy().copy() for direction in self._directions]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Turn each matrix against its gradient, and clear the gradient."""
        for matrix, direction in zip(self._matrices, self._directions, strict=True):
            if matrix.grad is None:
                continue
            direction.mul_(self._momentum).sub_(matrix.grad)
            skew = skew_direction(matrix, direction)
            # The bound of the paper: no step turns further than about one radian.
            norm = float(torch.linalg.matrix_norm(skew, ord=1))
            rate = min(learning_rate, 1 / norm) if norm > 0 else learning_rate
            direction.copy_(skew @ matrix)
            matrix.copy_(cayley(skew, rate) @ matrix)
            matrix.grad = None


def skew_direction(matrix: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """The skew-symmetric W for which W X is the part of ``direction`` that keeps X orthogonal."""
    outer = direction @ matrix.T
    half = outer - matrix @ (matrix.T @ outer) / 2
    return half - half.T


def cayley(skew: torch.Tensor, rate: float) -> torch.Tensor:
    """The orthogonal matrix (I − rate/2 · W)⁻¹ (I + rate/2 · W)."""
    identity = torch.eye(len(skew), dtype=skew.dtype)
    result: torch.Tensor = torch.linalg.solve(identity - rate / 2 * skew, identity + rate / 2 * skew)
    return result
