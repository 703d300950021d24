"""Choosing one option for each group so that a sum is least and other sums stay within budgets.

    minimise Σ_g f[g, c(g)]   subject to   Σ_g u_b[g, c(g)] ≤ U_b for each budget b

over the choices c(g): a multiple-choice knapsack problem, solved exactly as an integer program with one
binary variable for each option of each group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp

Doubles = npt.NDArray[np.float64]

_SCALE = 1e4
"""Sums are brought to about this size: the solver's tolerances are absolute, 1e-6."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """An upper limit on a sum.

    Attributes:
        name: with its unit, for messages.
        limit: of the sum over all groups.
        uses: of each option of each group: what it adds to the sum, not negative.
    """

    name: str
    limit: float
    uses: Sequence[Doubles]

    def smallest(self) -> float:
        """The least that any choice uses."""
        return float(sum(use.min() for use in self.uses))

    def used(self, choice: Sequence[int]) -> float:
        """What a choice uses."""
        return float(sum(use[option] for use, option in zip(self.uses, choice, strict=True)))


def choose(objective: Sequence[Doubles], budgets: Sequence[Budget]) -> list[int] | None:
    """For each group the index of its option; None if no choice keeps all budgets.

    Args:
        objective: of each group what each of its options adds to the sum that is to be least; not negative.
        budgets: limits that the choice keeps.
    """
    counts = [len(values) for values in objective]
    belongs = np.repeat(np.eye(len(counts)), counts, axis=1)
    constraints = [LinearConstraint(belongs, lb=1, ub=1)]
    for budget in budgets:
        row = np.concatenate(list(budget.uses))
        unit = _SCALE / max(budget.limit, budget.smallest(), np.finfo(np.float64).tiny)
        constraints.append(LinearConstraint(row[None] * unit, ub=budget.limit * unit))
    costs = np.concatenate(list(objective))
    largest = sum(float(values.max()) for values in objective)
    solution = milp(
        costs * (_SCALE / largest if largest else 1.0),
        integrality=np.ones(len(costs)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if solution.x is None:
        return None
    ends = np.cumsum(counts)
    return [int(solution.x[end - count : end].argmax()) for end, count in zip(ends, counts, strict=True)]
