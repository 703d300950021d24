"""The layers to decide about, in groups that are decided together, and what each of their options means."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ...codegen.target import Target
from ...ir.views import Linear
from ..quantize.algorithms.rtn import round_to_nearest
from ..quantize.layer_plan import LayerPlan, Planner
from ..quantize.linear_layers import read_linear_weight
from .candidates import Candidate, Cost, cost_of, plan_of

Plans = tuple[LayerPlan | None, ...]


@dataclasses.dataclass(frozen=True)
class Option:
    """One candidate for one group.

    Attributes:
        candidate: for all layers of the group.
        plans: how each layer is stored; None where it stays dense.
        cost: of all layers of the group together.
        loss: measured with all layers of the group changed at once; NaN until then.
    """

    candidate: Candidate
    plans: Plans
    cost: Cost
    loss: float = float("nan")


@dataclasses.dataclass(frozen=True)
class Group:
    """Layers that get the same scheme, what they may get, and what they take by the reference candidate."""

    linears: tuple[Linear, ...]
    options: tuple[Option, ...]
    reference_seconds: float | None = None

    @property
    def name(self) -> str:
        """The names of the layers."""
        return ", ".join(linear.name for linear in self.linears)

    @property
    def weights(self) -> int:
        """How many weights the layers have."""
        return sum(linear.in_features * linear.out_features for linear in self.linears)


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """Finds the options of a group.

    Attributes:
        candidates: what every group may become, where its layers can.
        reference: what latencies are relative to; None where they are not asked for.
        planner: of quantised layers.
        target: where times are measured.
    """

    candidates: tuple[Candidate, ...]
    reference: Candidate | None
    planner: Planner
    target: Target

    def group(self, linears: Sequence[Linear]) -> tuple[Group, list[tuple[Candidate, str]]]:
        """The group with its options, their losses not measured yet, and why other candidates are none."""
        options, refused = [], []
        for candidate in self.candidates:
            plans, reason = self._plans(linears, candidate)
            if reason is None:
                options.append(Option(candidate, plans, self._cost(linears, plans)))
            else:
                refused.append((candidate, reason))
        return Group(tuple(linears), tuple(options), self._reference_seconds(linears)), refused

    def _plans(self, linears: Sequence[Linear], candidate: Candidate) -> tuple[Plans, str | None]:
        plans = [plan_of(linear, candidate, self.planner) for linear in linears]
        reason = next((plan for plan in plans if isinstance(plan, str)), None)
        return tuple(plan for plan in plans if not isinstance(plan, str)), reason

    def _cost(self, linears: Sequence[Linear], plans: Plans) -> Cost:
        timed = self.reference is not None
        costs = [
            cost_of(linear, plan, self.target, timed=timed)
            for linear, plan in zip(linears, plans, strict=True)
        ]
        seconds = [cost.seconds for cost in costs if cost.seconds is not None]
        return Cost(
            stored=sum(cost.stored for cost in costs),
            bits=sum(cost.bits for cost in costs),
            seconds=sum(seconds) if len(seconds) == len(costs) else None,
        )

    def _reference_seconds(self, linears: Sequence[Linear]) -> float | None:
        """Layers that cannot be stored as the reference candidate says count as dense."""
        if self.reference is None:
            return None
        plans, reason = self._plans(linears, self.reference)
        return self._cost(linears, plans if reason is None else (None,) * len(linears)).seconds


def changed_weights(group: Group, option: Option) -> dict[str, npt.NDArray[np.float32]]:
    """The weights of the group as the option stores them, by initializer, in the layout of the graph."""
    changed = {}
    for linear, plan in zip(group.linears, option.plans, strict=True):
        if plan is not None:
            weight = round_to_nearest(read_linear_weight(linear), plan.grid).dequantized()
            changed[str(linear.weight.name)] = weight.T if linear.transposed else weight
    return changed
