"""The layers to decide about, in groups that are decided together, and what each of their options means."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ...codegen.target import Target
from ...ir.errors import TargetError
from ...ir.views import Linear
from ..quantize.layer_plan import LayerPlan, Planner
from .candidates import Candidate, Cost, dense_cost, quantized_cost

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


class Catalogue:
    """Finds the options of groups; layers of equal size are measured once.

    Args:
        candidates: what every group may become, where its layers can.
        reference: what latencies are relative to; None where they are not asked for.
        planner: of quantised layers.
        target: where times are measured.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        reference: Candidate | None,
        planner: Planner,
        target: Target,
    ) -> None:
        self._candidates = candidates
        self._reference = reference
        self._planner = planner
        self._target = target
        self._costs: dict[tuple[object, ...], Cost] = {}

    def group(self, linears: Sequence[Linear]) -> tuple[Group, list[tuple[Candidate, str]]]:
        """The group with its options, their losses not measured yet, and why other candidates are none.

        Raises:
            TargetError: the target does not run a candidate.
        """
        options, refused = [], []
        for candidate in self._candidates:
            plans = self._plans(linears, candidate)
            if isinstance(plans, str):
                refused.append((candidate, plans))
            else:
                options.append(Option(candidate, plans, self._cost_of_all(linears, candidate, plans)))
        return Group(tuple(linears), tuple(options), self._reference_seconds(linears)), refused

    def _plans(self, linears: Sequence[Linear], candidate: Candidate) -> Plans | str:
        """How each layer would be stored, or why one of them could not."""
        if candidate.scheme is None:
            return (None,) * len(linears)
        plans: list[LayerPlan] = []
        for linear in linears:
            plan = self._planner.plan(linear, candidate.scheme)
            if isinstance(plan, str):
                return plan
            assert isinstance(plan, LayerPlan), "the plan of a linear"
            self._require_supported(plan, candidate)
            plans.append(plan)
        return tuple(plans)

    def _require_supported(self, plan: LayerPlan, candidate: Candidate) -> None:
        reason = self._target.unsupported_reason(plan.format)
        if reason is not None:
            raise TargetError(
                f"allocate: {self._target.name} does not run candidate {candidate.text!r}: {reason}",
                hint="it runs " + "; ".join(self._target.formats()),
            )

    def _cost_of_all(self, linears: Sequence[Linear], candidate: Candidate, plans: Plans) -> Cost:
        costs = [self._cost(linear, candidate, plan) for linear, plan in zip(linears, plans, strict=True)]
        seconds = [cost.seconds for cost in costs if cost.seconds is not None]
        return Cost(
            stored=sum(cost.stored for cost in costs),
            bits=sum(cost.bits for cost in costs),
            seconds=sum(seconds) if len(seconds) == len(costs) else None,
        )

    def _cost(self, linear: Linear, candidate: Candidate, plan: LayerPlan | None) -> Cost:
        rank = None if linear.input.shape is None else len(linear.input.shape)
        size = (linear.in_features, linear.out_features, linear.weight.dtype, linear.bias is None, rank)
        key = (candidate.text, linear.transposed, *size)
        if key not in self._costs:
            timed = self._reference is not None
            self._costs[key] = (
                dense_cost(linear, self._target, timed=timed)
                if plan is None
                else quantized_cost(linear, plan, self._target, timed=timed)
            )
        return self._costs[key]

    def _reference_seconds(self, linears: Sequence[Linear]) -> float | None:
        """Layers that cannot be stored as the reference candidate says count as dense."""
        if self._reference is None:
            return None
        plans = self._plans(linears, self._reference)
        if isinstance(plans, str):
            return self._cost_of_all(linears, Candidate("dense", None), (None,) * len(linears)).seconds
        return self._cost_of_all(linears, self._reference, plans).seconds
