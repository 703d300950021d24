"""Decide which linear gets which quantisation scheme, or stays dense, under a budget.

    minimise Σ_l loss(l, c(l))   subject to   Σ_l bytes(l, c(l)) ≤ B,   Σ_l seconds(l, c(l)) ≤ T

over the candidates c(l) of each layer l; or the least bits, subject to a largest loss. loss(l, c) is the
measured change of the model's outputs on calibration data when only the weight of l is rounded by scheme c
(see `planish.runtime.sensitivity`). Losses of layers are taken to add up, which holds where they are small.
Seconds are measured too, of the kernels that the target would bind.

The graph keeps its function: the decision is written into the nodes' metadata, and `quantize` obeys it.

Precondition of a layer: what `quantize` asks, see there. After Q-Palette (Lee and Song, 2025), whose integer
program this is; the additivity of losses is that of HIGGS (Malinovskii et al., 2024).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...ir.errors import MissingDataError, PassError, PipelineError, TargetError
from ...ir.views import Linear, linears
from ...runtime.sensitivity import first_samples
from ..infrastructure.base import Contract, Coverage, Fact, Feeds, Pass, PassContext, PassResult, Skipped
from ..infrastructure.patterns import matches
from ..quantize.layer_plan import Planner
from ..quantize.selection import SCHEME_KEY
from .candidates import Candidate, parse_candidate
from .layers import Catalogue, Group, Option
from .losses import with_losses
from .program import Budget, choose


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocate(Pass):
    """Choose a scheme for every linear by measured sensitivities and kernel times, under a budget.

    Attributes:
        candidates: schemes with float activations, such as ``W3A16``, ``W4A16_ASYM group_size=32`` or
            ``NF4``, and ``dense``.
        group_size: of candidates that do not say it themselves; by default the scheme's own default.
        bytes: budget: what the weights of these layers may take in a file, in bytes.
        bits_per_weight: budget: bits of integers, scales and zero points over the number of weights.
        latency: budget: seconds of these layers relative to ``latency_of``, on the target; where it runs
            several numbers of rows, by the geometric means of each layer's times.
        latency_of: the candidate that all layers have where ``latency`` is 1; it need not be one of
            ``candidates``.
        loss: the largest estimated loss; then the least bits are sought. In nats per token (KL divergence)
            for a model with logits, else relative squared error of the outputs.
        targets: names or ``re:`` patterns of the layers to decide about; empty means all.
        ignore: names or ``re:`` patterns of the layers to leave alone.
        samples: how many calibration samples sensitivities are measured on. The model is run on all of them
            once for each candidate of each layer, or of each group of layers that are decided together.
        together: layers that read the same input (q, k and v; gate and up) get one scheme, so that they can
            be merged and run as one.
        clip: as in ``quantize``.
    """

    name: ClassVar[str] = "allocate"
    contract: ClassVar[Contract] = Contract.EXACT
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})

    candidates: tuple[str, ...] = ("W2A16", "W3A16", "W4A16", "W8A16", "dense")
    group_size: int | None = None
    bytes: int | None = None
    bits_per_weight: float | None = None
    latency: float | None = None
    latency_of: str = "dense"
    loss: float | None = None
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ("lm_head",)
    samples: int = 8
    together: bool = True
    clip: bool | None = None

    def __post_init__(self) -> None:
        self._parsed()
        parse_candidate(self.latency_of, self.group_size)
        limits = {name: getattr(self, name) for name in ("bytes", "bits_per_weight", "latency", "loss")}
        given = {name: limit for name, limit in limits.items() if limit is not None}
        if not given:
            raise PipelineError(
                "allocate: expected a budget, found none", hint=f"give one or more of {', '.join(limits)}"
            )
        if any(not limit > 0 for limit in given.values()):
            raise PipelineError(f"allocate: budgets must be positive, found {given}")
        if self.samples < 1:
            raise PipelineError(f"allocate: samples must be positive, found {self.samples}")

    def _parsed(self) -> tuple[Candidate, ...]:
        if not self.candidates:
            raise PipelineError("allocate: expected candidates, found none")
        return tuple(parse_candidate(text, self.group_size) for text in self.candidates)

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        """Measure, decide, and write the decision into the nodes' metadata."""
        samples = self._samples(model, ctx)
        skipped: list[Skipped] = []
        groups = self._groups(model, ctx, skipped)
        for skip in skipped:
            ctx.remark(skip.name, f"not decided about: {skip.reason}")
        covered = sum(len(group.linears) for group in groups)
        coverage = Coverage(unit="linears", covered=covered, skipped=tuple(skipped))
        if not groups:
            return PassResult(modified=False, coverage=coverage)
        self._require_possible(groups)
        groups = with_losses(groups, model, samples, ctx)
        chosen = self._solve(groups)
        counts: dict[str, int] = {}
        for group, option in zip(groups, chosen, strict=True):
            _write(group, option, ctx)
            counts[option.candidate.text] = counts.get(option.candidate.text, 0) + len(group.linears)
        _report(groups, chosen, ctx)
        return PassResult(modified=True, coverage=coverage, statistics=counts)

    def _samples(self, model: ir.Model, ctx: PassContext) -> list[Feeds]:
        data = ctx.calibration or ctx.examples
        if not data:
            raise MissingDataError(
                "allocate: sensitivities are measured on calibration data, and there is none",
                hint="give compile(..., calibration=inputs), or example_inputs",
            )
        return first_samples(data, self.samples, model)

    def _groups(self, model: ir.Model, ctx: PassContext, skipped: list[Skipped]) -> list[Group]:
        """The layers to decide about with their options, whose losses are not known yet."""
        wanted = []
        for linear in linears(model):
            reason = self._not_asked_for(linear.name)
            if reason is None:
                wanted.append(linear)
            else:
                skipped.append(Skipped(linear.name, reason))
        catalogue = self._catalogue(ctx)
        groups = []
        for members in _members(wanted, together=self.together):
            group, refused = catalogue.group(members)
            schemes = [option for option in group.options if option.candidate.scheme is not None]
            if not schemes:
                reason = refused[0][1] if refused else "the only candidate is dense"
                skipped += [Skipped(linear.name, reason) for linear in members]
                continue
            for candidate, reason in refused:
                ctx.remark(group.name, f"cannot be {candidate.text}: {reason}")
            groups.append(group)
        return groups

    def _catalogue(self, ctx: PassContext) -> Catalogue:
        planner = Planner(self.clip, None, None, ctx.target.adds_products_in_16_bits)
        reference = None if self.latency is None else parse_candidate(self.latency_of, self.group_size)
        return Catalogue(self._parsed(), reference, planner, ctx.target)

    def _not_asked_for(self, name: str) -> str | None:
        if matches(name, self.ignore):
            return "ignored"
        return "not a target" if self.targets and not matches(name, self.targets) else None

    def _require_possible(self, groups: Sequence[Group]) -> None:
        """Fail on a budget that is too low before anything is measured, which takes long."""
        budgets = [budget for budget in self._budgets(groups) if budget.name != "loss"]
        if any(budget.limit < budget.smallest() for budget in budgets):
            raise _infeasible(budgets)

    def _solve(self, groups: Sequence[Group]) -> list[Option]:
        budgets = self._budgets(groups)
        objective = _values(groups, (lambda option: option.loss) if self.loss is None else _bits)
        choice = choose(objective, budgets)
        if choice is None:
            raise _infeasible(budgets)
        return [group.options[index] for group, index in zip(groups, choice, strict=True)]

    def _budgets(self, groups: Sequence[Group]) -> list[Budget]:
        budgets = []
        if self.bytes is not None:
            stored = _values(groups, lambda option: option.cost.stored)
            budgets.append(Budget("bytes", self.bytes, stored))
        if self.bits_per_weight is not None:
            weights = sum(group.weights for group in groups)
            bits = _values(groups, lambda option: option.cost.bits / weights)
            budgets.append(Budget("bits_per_weight", self.bits_per_weight, bits))
        if self.latency is not None:
            reference = sum(_known(group.reference_seconds) for group in groups)
            seconds = _values(groups, lambda option: _known(option.cost.seconds) / reference)
            budgets.append(Budget("latency", self.latency, seconds))
        if self.loss is not None:
            budgets.append(Budget("loss", self.loss, _values(groups, lambda option: option.loss)))
        return budgets


def _bits(option: Option) -> float:
    return option.cost.bits


def _values(groups: Sequence[Group], value: Callable[[Option], float]) -> list[np.ndarray]:
    """[options] for each group."""
    return [np.array([value(option) for option in group.options]) for group in groups]


def _known(seconds: float | None) -> float:
    if seconds is None:
        raise TargetError(
            "allocate: the target does not measure times, so there is no latency to keep below",
            hint="give a budget of bytes, bits_per_weight or loss, or take the target onnxruntime-cpu",
        )
    return seconds


def _infeasible(budgets: Sequence[Budget]) -> PassError:
    """Says how low each budget can be."""
    low = [budget for budget in budgets if budget.limit < budget.smallest()]
    found, least = (
        " and ".join(f"{budget.name}={number(budget):.10g}" for budget in low or budgets)
        for number in (lambda budget: budget.limit, lambda budget: _rounded_up(budget.smallest()))
    )
    if low:
        return PassError(f"allocate: no choice keeps {found}; the least that can be reached is {least}")
    return PassError(
        f"allocate: no choice keeps {found} together; the least that each reaches alone is {least}",
        hint="raise one of them, or add candidates",
    )


def _rounded_up(value: float) -> float:
    """To six digits: a number that can be reached, and read."""
    digits = 5 - math.floor(math.log10(value)) if value > 0 else 0
    return math.ceil(value * 10.0**digits) / 10.0**digits


def _members(wanted: Sequence[Linear], *, together: bool) -> list[list[Linear]]:
    """Layers that are decided together, groups in the order of their first layer."""
    groups: dict[object, list[Linear]] = {}
    for linear in wanted:
        groups.setdefault(linear.input if together else linear, []).append(linear)
    return list(groups.values())


def _write(group: Group, option: Option, ctx: PassContext) -> None:
    text = option.candidate.text
    for linear in group.linears:
        linear.node.metadata_props[SCHEME_KEY] = text
    cost = option.cost
    seconds = "" if cost.seconds is None else f", {cost.seconds * 1e6:.3g} µs"
    ctx.remark(group.name, f"{text}: estimated loss {option.loss:.3g}, {cost.stored:.0f} bytes{seconds}")


def _report(groups: Sequence[Group], chosen: Sequence[Option], ctx: PassContext) -> None:
    weights = sum(group.weights for group in groups)
    loss, stored, bits = (
        sum(values) for values in zip(*((o.loss, o.cost.stored, o.cost.bits) for o in chosen), strict=True)
    )
    text = f"estimated loss {loss:.3g}, {stored:.0f} bytes, {bits / weights:.3g} bits per weight"
    seconds = [option.cost.seconds for option in chosen if option.cost.seconds is not None]
    if len(seconds) == len(chosen):
        reference = sum(group.reference_seconds or 0.0 for group in groups)
        text += f", {sum(seconds) * 1e6:.4g} µs: {sum(seconds) / reference:.3g} of the reference"
    ctx.remark("all layers", text)
