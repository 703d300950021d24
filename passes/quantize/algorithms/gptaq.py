"""GPTAQ: GPTQ that also makes up for what the layers before it did to its input.

With x the dense model's input, x̂ the quantised model's and Δx = x − x̂, the layer should give Wᵀx, not Wᵀx̂:

    min over Ŵ of E‖Ŵᵀx̂ − Wᵀx‖²  =  E‖(Ŵ − W)ᵀ x̂ − Wᵀ Δx‖² .

Completing the square, that is GPTQ's objective around another target than W: with H = E[x̂ x̂ᵀ] and
C = E[Δx x̂ᵀ],

    W + α · H⁻¹ Cᵀ W      (α = 1: what is best for x̂ without rounding),

and GPTQ's loop and descent run on that. The published algorithm moves only rows behind row i for Δx_i, when
row i is rounded: with H = R Rᵀ and U = R⁻¹ it adds w_i P_i: to them,

    P = α · triu(C Uᵀ, 1) · U ,   which is the target  W + Pᵀ W ;   without triu(·, 1), Pᵀ is H⁻¹ Cᵀ.

w_i is the dense model's row, as the objective says; the published code takes the row as the loop has changed
it by then.

Source: Li et al., GPTAQ, 2025, https://arxiv.org/abs/2504.02692.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import scipy.linalg

from ..grid import Doubles
from ..quantized_weight import Floats
from .base import LayerStatistics
from .curvature import Curvature
from .gptq import GPTQ


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTAQ(GPTQ):
    """GPTQ towards the dense model's output.

    Attributes:
        alpha: how much of the mismatch is corrected, 0 to 1; the published default is 0.25.
        only_behind: correct the mismatch of a row in the rows behind it only, as published.
    """

    needs_prefix_error: ClassVar[bool] = True

    alpha: float = 1.0
    only_behind: bool = False

    def target(self, weight: Floats, statistics: LayerStatistics, curvature: Curvature) -> Doubles:
        """W + α H⁻¹ Cᵀ W or W + Pᵀ W, [K, N].

        Raises:
            ValueError: there is no prefix error.
        """
        if statistics.prefix_error is None:
            raise ValueError("gptaq needs the error of the layer's inputs")
        order, root = curvature.order, curvature.root
        target = weight.astype(np.float64)
        mismatch = statistics.prefix_error[np.ix_(order, order)]
        # C Uᵀ transposed is R⁻¹ Cᵀ; its part below the diagonal is triu(C Uᵀ, 1) transposed.
        share = scipy.linalg.solve_triangular(root, mismatch.T)
        if self.only_behind:
            share = np.tril(share, -1)
        change = scipy.linalg.solve_triangular(root, share @ target[order], trans="T")
        target[order] += self.alpha * change
        return target
