"""GPTAQ: GPTQ that also makes up for what the layers before it did to its input.

With x the dense model's input, x̂ the quantised model's and Δx = x − x̂, the layer should give Wᵀx, not Wᵀx̂:

    min over Ŵ of E‖Ŵᵀx̂ − Wᵀx‖²  =  E‖(Ŵ − W)ᵀ x̂ − Wᵀ Δx‖² .

When row i is rounded, the rows behind it also take over its share w_i Δx_i of the mismatch, by least squares.
With H = E[x̂ x̂ᵀ] = R Rᵀ, U = R⁻¹ and C = E[Δx x̂ᵀ] that adds w_i P_i: to them,

    P = α · triu(C Uᵀ, 1) · U ,

so the loop of GPTQ runs on the target W + Pᵀ W. w_i is the dense model's row, as the objective says; the
published code takes the row as the loop has changed it by then. α < 1 because C is an estimate.

Source: Li et al., GPTAQ, 2025, https://arxiv.org/abs/2504.02692.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import scipy.linalg

from ..grid import Doubles, Floats
from .base import LayerStatistics
from .curvature import Curvature
from .gptq import GPTQ


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTAQ(GPTQ):
    """GPTQ towards the dense model's output.

    Attributes:
        alpha: how much of the mismatch is corrected, 0 to 1.
    """

    needs_prefix_error: ClassVar[bool] = True

    alpha: float = 0.25

    def target(self, weight: Floats, statistics: LayerStatistics, curvature: Curvature) -> Doubles:
        """W + Pᵀ W, [K, N].

        Raises:
            ValueError: there is no prefix error.
        """
        if statistics.prefix_error is None:
            raise ValueError("gptaq needs the error of the layer's inputs")
        order, root = curvature.order, curvature.root
        original = weight.astype(np.float64)
        mismatch = statistics.prefix_error[np.ix_(order, order)]
        # C Uᵀ transposed is R⁻¹ Cᵀ; its part below the diagonal is triu(C Uᵀ, 1) transposed.
        taken_over = np.tril(scipy.linalg.solve_triangular(root, mismatch.T), -1)
        change = scipy.linalg.solve_triangular(root, taken_over @ original[order], trans="T")
        target = original
        target[order] += self.alpha * change
        return target
