"""2SSP: prune FFNs in width, then whole attention modules in depth.

    FFN:        down(act(up(x)))   →   the same with fewer neurons, the same share of each FFN
    attention:  x + attention(x)   →   x

Stage 1 keeps the neurons whose outputs are largest: the mean over samples of the Euclidean norm, over a
sample's tokens, of what the down projection reads. Stage 2 drops, one after the other, the attention module
without which the outputs of the model, pruned so far, stay nearest to those of the dense model: where the
paper measures the perplexity of a text, this is the divergence from the dense model's predictions, or the
error of outputs that are no predictions (see `planish.passes.prune.removal_loss`). How a sparsity is divided
between the stages: `planish.passes.prune.two_stage_plan`.

Preconditions: `planish.ir.structure.discover` finds the FFN as a channel group whose consumers are linears;
an attention module is a residual module of its own, without an FFN in it.

After Sandri et al. (2025, 2SSP).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...ir import clone
from ...ir.errors import InputError, MissingDataError, PassError, PipelineError
from ...ir.structure import ChannelGroup, Choice, ResidualModule, Structure, discover, drop, shrink
from ...ir.views import linears
from ...runtime.calibration import ActivationStream
from ...runtime.calibration.data import token_mask
from ...runtime.sensitivity import first_samples
from ..infrastructure.base import Contract, Coverage, Fact, Feeds, Pass, PassContext, PassResult, Skipped
from .deployed import check_deployed_with
from .deployment import Deployment
from .depth import module_weights, must_stay
from .removal_loss import RemovalLoss, greedy_removals
from .two_stage_plan import Plan, Sizes, make_plan

Array = npt.NDArray[Any]

_NEAR_ENOUGH = 0.03
"""Of the target: how far the measured speed-up may be from it."""
_SMALLEST_STEP = 1 / 256
"""Sparsities nearer than this are not told apart: what is left then is the size of a module."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoStage(Pass):
    """Prune FFN neurons and drop attention modules by 2SSP, to a sparsity or a measured speed-up.

    Attributes:
        sparsity: target: the share of the weights of all attention modules and FFNs that goes.
        speedup: target: measured end to end, relative to the model before the pipeline's first pass that
            changes its function, both after ``deployed_with``; the sparsity is found by bisection.
        samples: how many calibration samples neurons are scored on.
        attention_samples: how many calibration samples attention modules are chosen on.
        alpha: how late attention goes; the power of the sparsity is (P_mlp / P_attn) / alpha.
        multiple: widths of FFNs that are narrowed become multiples of this.
        batch: of the deployment whose latency ``speedup`` is about.
        sequence: likewise, tokens of a sample.
        deployed_with: pipeline text: the passes that models get before they are timed.
    """

    name: ClassVar[str] = "two-stage"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED})
    uses_original: ClassVar[bool] = True

    sparsity: float | None = None
    speedup: float | None = None
    samples: int = 32
    attention_samples: int = 1
    alpha: float = 1.5
    multiple: int = 1
    batch: int = 1
    sequence: int = 128
    deployed_with: str = "fuse"

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.speedup is None):
            found = "none" if self.sparsity is None else "both"
            raise PipelineError(f"two-stage: expected one target, sparsity or speedup, found {found}")
        for name in ("samples", "attention_samples", "alpha", "multiple", "batch", "sequence"):
            if not getattr(self, name) > 0:
                raise PipelineError(f"two-stage: {name} must be positive, found {getattr(self, name)}")
        if self.speedup is not None and not self.speedup > 1:
            raise PipelineError(f"two-stage: speedup must be above 1, found {self.speedup}")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise PipelineError(f"two-stage: sparsity must be between 0 and 1, found {self.sparsity}")
        check_deployed_with(self.deployed_with, self.name)

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        """Find the sparsity, prune the FFNs, and drop attention modules."""
        parts = _Parts.of(model)
        coverage = Coverage(unit="FFNs and attention modules", covered=parts.count, skipped=parts.skipped)
        if not parts.groups:
            return PassResult(modified=False, coverage=dataclasses.replace(coverage, covered=0))
        data = ctx.calibration or ctx.examples
        if not data:
            raise MissingDataError(
                "two-stage: neurons are scored on calibration data, and there is none",
                hint="give compile(..., calibration=inputs), or example_inputs",
            )
        scores = neuron_scores(model, parts.groups, first_samples(data, self.samples, model), ctx)
        plan = self._plan(model, parts, ctx)
        choices = _widths(parts.groups, plan, scores)
        samples = first_samples(data, self.attention_samples, model)
        dropped = _attention_to_drop(model, parts, plan, choices, samples, ctx)
        shrink(model, choices)
        gone = drop(model, dropped)
        _report(parts, plan, choices, ctx)
        statistics = {"narrowed FFNs": len(choices), "dropped attention modules": len(dropped)}
        return PassResult(
            modified=bool(choices or dropped),
            coverage=coverage,
            statistics=statistics,
            redefined_outputs=gone,
        )

    def _plan(self, model: ir.Model, parts: _Parts, ctx: PassContext) -> Plan:
        if self.speedup is not None:
            return self._plan_for_speedup(self.speedup, model, parts, ctx)
        assert self.sparsity is not None
        most = self._at(1.0, parts).sparsity(parts.sizes)
        if self.sparsity > most:
            raise PassError(
                f"two-stage: sparsity={self.sparsity:g} cannot be reached: without {len(parts.droppable)} "
                f"attention modules and with {self.multiple} neurons in each FFN it is {most:.6g}"
            )
        return self._at(self.sparsity, parts)

    def _at(self, sparsity: float, parts: _Parts) -> Plan:
        return make_plan(sparsity, parts.sizes, alpha=self.alpha, multiple=self.multiple)

    def _plan_for_speedup(self, target: float, model: ir.Model, parts: _Parts, ctx: PassContext) -> Plan:
        """Bisection; which neurons and which modules of a kind go makes no difference to the time."""
        deployment = Deployment(
            ctx.original,
            target=ctx.target,
            batch=self.batch,
            sequence=self.sequence,
            examples=ctx.examples or ctx.calibration,
            deployed_with=self.deployed_with,
        )

        def measured(sparsity: float) -> float:
            plan = self._at(sparsity, parts)
            candidate = clone(model)
            shrink(candidate, _widths(parts.groups, plan, {}))
            drop(candidate, parts.droppable[len(parts.droppable) - plan.attention :])
            return deployment.measure(candidate).speedup

        sparsity, reached = _sparsity_for(target, measured)
        ctx.remark(
            "all FFNs and attention modules", f"measured speed-up {reached:.3g} for the target {target:g}"
        )
        return self._at(sparsity, parts)


def _sparsity_for(target: float, speedup: Callable[[float], float]) -> tuple[float, float]:
    """The sparsity that brings a speed-up, and the speed-up that was measured with it.

    Where no sparsity comes within `_NEAR_ENOUGH`, because a whole module makes the difference, the least that
    is faster is taken.

    Raises:
        PassError: not even the highest sparsity reaches it; says what that reaches.
    """
    low, high, reached = 0.0, 1.0, speedup(1.0)
    if reached < target * (1 - _NEAR_ENOUGH):
        raise PassError(
            f"two-stage: speedup={target:g} cannot be reached: without any attention that can go and with "
            f"the narrowest FFNs it is {reached:.3g}",
            hint=f"the fastest that can be reached is speedup={math.floor(reached * 100) / 100:g}",
        )
    while abs(reached / target - 1) > _NEAR_ENOUGH and high - low > _SMALLEST_STEP:
        middle = (low + high) / 2
        found = speedup(middle)
        if found < target * (1 - _NEAR_ENOUGH):
            low = middle
        else:
            high, reached = middle, found
    return high, reached


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What 2SSP prunes, in the order of the graph.

    Attributes:
        groups: of FFN neurons.
        droppable: attention modules; one more stays where the model needs its cache.
        sizes: weights of all FFNs and attention modules.
        skipped: what it leaves alone.
    """

    groups: tuple[ChannelGroup, ...]
    droppable: tuple[ResidualModule, ...]
    sizes: Sizes
    skipped: tuple[Skipped, ...]

    @property
    def count(self) -> int:
        """FFNs and attention modules."""
        return len(self.groups) + len(self.droppable)

    @classmethod
    def of(cls, model: ir.Model) -> _Parts:
        structure = discover(model)
        skipped = [Skipped(entry.name, entry.reason) for entry in structure.unprunable]
        groups = _ffn_groups(model, structure, skipped)
        ffns = {group.name for group in groups}
        attention = []
        for module in structure.modules:
            if module.kind == "attention" and ffns.isdisjoint(module.groups):
                attention.append(module)
            elif module.kind == "attention":
                skipped.append(Skipped(module.name, "attention and FFN are one module"))
        weights = module_weights(model, attention)
        kept = must_stay(model, attention)
        droppable = [module for module in attention if kept is None or module is not kept.module]
        skipped += [] if kept is None else [Skipped(kept.module.name, kept.reason)]
        sizes = Sizes(
            attention=tuple(weights[module.name] for module in attention),
            droppable=len(droppable),
            ffn={group.name: _group_weights(model, group) for group in groups},
            neurons={group.name: group.structures for group in groups},
        )
        return cls(tuple(groups), tuple(droppable), sizes, tuple(skipped))


def _ffn_groups(model: ir.Model, structure: Structure, skipped: list[Skipped]) -> list[ChannelGroup]:
    """The groups of neurons that linears read, in the order of these linears."""
    position = {str(linear.weight.name): index for index, linear in enumerate(linears(model))}
    found = []
    for group in structure.groups:
        if group.kind != "ffn":
            continue
        if all(member.tensor in position for member in group.consumers):
            found.append(group)
        else:
            skipped.append(Skipped(group.name, "what reads the neurons is no linear"))
    return sorted(found, key=lambda group: position[group.consumers[0].tensor])


def _group_weights(model: ir.Model, group: ChannelGroup) -> int:
    """How many numbers of its tensors go with all structures of a group."""
    total = 0
    for member in group.members:
        constant = model.graph.initializers[member.tensor].const_value
        assert constant is not None
        total += constant.size * member.indices.size // constant.shape.numpy()[member.axis]
    return total


def neuron_scores(
    model: ir.Model, groups: Sequence[ChannelGroup], samples: Sequence[Feeds], ctx: PassContext
) -> dict[str, Array]:
    """How large each neuron's outputs are, float64 [structures] by group name.

    The mean over samples of ‖h[:, neuron]‖₂, h [tokens, neurons] what the consumers of the group read of a
    sample, without padding.

    Args:
        model: run as it is.
        groups: whose consumers are linears, in the order of the graph.
        samples: complete feeds; a sample is an element of their batch axis.
        ctx: shows how far it is.
    """
    stream = ActivationStream(model, samples)
    inputs = {str(linear.weight.name): linear.input for linear in linears(model)}
    scores: dict[str, Array] = {}
    for group in ctx.progress(groups, "score neurons"):
        read = {member: inputs[member.tensor] for member in group.consumers}
        norms: list[Array] = []
        for feeds, tap in zip(samples, stream.advance(list(read.values())), strict=True):
            squares = [_squares(tap.array(value), feeds)[:, m.indices].sum(-1) for m, value in read.items()]
            norms.append(np.sqrt(np.sum(squares, axis=0)))
        scores[group.name] = np.concatenate(norms).mean(0)
        if not np.isfinite(scores[group.name]).all():
            raise InputError(f"{group.name}: its activations on the calibration data are not finite")
    return scores


def _squares(array: Array, feeds: Feeds) -> Array:
    """Sums of squares over the real tokens of each sample, float64 [samples, features]."""
    samples = len(array) if array.ndim > 2 else 1
    rows = np.square(array.reshape(samples, -1, array.shape[-1]).astype(np.float64))
    mask = token_mask(feeds)
    if mask is not None and mask.size == rows.shape[0] * rows.shape[1]:
        rows *= mask.reshape(samples, -1, 1)
    return np.asarray(rows.sum(1))


def _widths(groups: Sequence[ChannelGroup], plan: Plan, scores: Mapping[str, Array]) -> list[Choice]:
    """The neurons with the highest scores (without scores: the first) of each FFN that becomes narrower."""
    choices = []
    for group in groups:
        width = plan.widths[group.name]
        if width < group.structures:
            score = scores.get(group.name, np.zeros(group.structures))
            keep = np.sort(np.argsort(-score, kind="stable")[:width])
            choices.append(Choice(group, keep))
    return choices


def _attention_to_drop(
    model: ir.Model,
    parts: _Parts,
    plan: Plan,
    choices: Sequence[Choice],
    samples: Sequence[Feeds],
    ctx: PassContext,
) -> list[ResidualModule]:
    """As many as the plan says, each the one without which the outputs stay nearest to the dense model's."""
    if not plan.attention:
        return []
    narrowed = _without_neurons(model, choices)
    loss = RemovalLoss(model, parts.droppable, samples, list(narrowed))
    track = partial(ctx.progress, description="try attention modules")
    order = greedy_removals(parts.droppable, partial(loss, changed=narrowed), track)
    dropped = []
    for module, found in itertools.islice(order, plan.attention):
        ctx.remark(module.name, f"dropped: loss {found:.4g} without it and those before")
        dropped.append(module)
    return dropped


def _without_neurons(model: ir.Model, choices: Sequence[Choice]) -> dict[str, Array]:
    """The consumers' weights with zeros where neurons go: the same function as the narrower FFN, by name."""
    changed: dict[str, Array] = {}
    for choice in choices:
        gone = np.setdiff1d(np.arange(choice.group.structures), choice.keep)
        for member in choice.group.consumers:
            constant = model.graph.initializers[member.tensor].const_value
            assert constant is not None
            weight = changed.get(member.tensor, constant.numpy()).copy()
            np.moveaxis(weight, member.axis, 0)[member.indices[gone].reshape(-1)] = 0
            changed[member.tensor] = weight
    return changed


def _report(parts: _Parts, plan: Plan, choices: Sequence[Choice], ctx: PassContext) -> None:
    for choice in choices:
        ctx.remark(choice.group.name, f"{len(choice.keep)} of {choice.group.structures} neurons stay")
    modules = f"{plan.attention} of {len(parts.sizes.attention)} attention modules dropped"
    ffns = f"{len(choices)} of {len(parts.groups)} FFNs narrowed"
    ctx.remark(
        "all FFNs and attention modules", f"sparsity {plan.sparsity(parts.sizes):.4g}: {modules}, {ffns}"
    )
