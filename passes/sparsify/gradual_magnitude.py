"""Gradual magnitude pruning: the share of zeros rises by a cubic schedule while the rest is trained.

    s(t) = s_f + (s_i − s_f) (1 − t / n)³        t = 0, Δ, 2Δ, …, n

After update t the weights of least magnitude are pruned, so that a share s(t) is zero; it rises fast at
first, while there is much to choose from, and slowly in the end. After n updates the mask stays, and the
weights that are left recover. Zhu and Gupta, 2017.
"""

from __future__ import annotations

import dataclasses

from ...runtime.training import Parameters
from .masks import Method


@dataclasses.dataclass(kw_only=True)
class GradualMagnitude(Method):
    """Prunes a share that rises.

    Attributes:
        initial_sparsity: s_i, pruned before the first update.
        rising: n, the updates over which the share rises; at least one, at most ``steps``.
        frequency: Δ, updates between two masks.
    """

    initial_sparsity: float
    rising: int
    frequency: int

    def sparsity_at(self, step: int) -> float:
        """s(t) after ``step`` updates."""
        left = 1 - min(step, self.rising) / self.rising
        return self.sparsity + (self.initial_sparsity - self.sparsity) * left**3

    def update(self, step: int, parameters: Parameters) -> None:
        """A new mask at every Δ-th update, and at the n-th."""
        if step == self.rising or (step < self.rising and step % self.frequency == 0):
            self.masks = self.pruner.choose(parameters, self.sparsity_at(step))
