"""Depth pruning: drop whole residual modules, or layers, the least useful first.

    x + f(x)   →   x

By ``entropy``, a block is worth H(x + f(x)) − H(x), what it adds to the entropy of the residual stream (see
`planish.passes.prune.entropy`). By ``greedy``, each step drops the block without which the model's outputs on
calibration data change least (see `planish.passes.prune.removal_loss`), given those that went before.

Precondition of a block: `planish.ir.structure.discover` finds it as a residual module. Where a norm follows
the addition (BERT), it stays, and what it sees changes; the greedy loss is measured with that.

Entropy after Yang et al. (2025, entropy-based block pruning), who protect the first two layers and the last.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import ClassVar, Literal

import onnx_ir as ir

from ...ir import clone
from ...ir.errors import MissingDataError, PassError, PipelineError
from ...ir.structure import ResidualModule, Structure, discover, drop, layers_of
from ...runtime.calibration import ActivationStream
from ...runtime.sensitivity import first_samples
from ..infrastructure.base import Contract, Coverage, Fact, Feeds, Pass, PassContext, PassResult, Skipped
from ..infrastructure.patterns import matches
from .deployed import check_deployed_with
from .deployment import Deployment
from .depth import (
    DepthUnit,
    Ranking,
    Removal,
    RemovalOrder,
    depth_units,
    fewest_reaching,
    module_weights,
    must_stay,
)
from .entropy import entropy_gains
from .removal_loss import RemovalLoss, greedy_removals


@dataclasses.dataclass(frozen=True, kw_only=True)
class DropBlocks(Pass):
    """Drop whole attention and FFN modules, or layers, until a number, share or measured speed-up is reached.

    Attributes:
        method: what says which go first: ``entropy`` (one run of the model) or ``greedy`` (a run for each
            candidate of each step).
        count: target: how many modules go, or layers with ``unit=layer``.
        speedup: target: measured end to end, relative to the model before the pipeline's first pass that
            changes its function, both after ``deployed_with``; the fewest blocks that reach it go.
        sparsity: target: the share of the weights of all residual modules that goes at least.
        unit: ``module``, or ``layer``: the attention and FFN of a layer go together.
        protect: layers that go only where the target cannot be reached otherwise, counted from 0, or from the
            end by negative numbers.
        targets: names or ``re:`` patterns of the modules that may go; empty means all.
        ignore: names or ``re:`` patterns of the modules that stay.
        samples: how many calibration samples are run.
        tokens: how many tokens entropies are estimated from: time grows with their square.
        neighbours: k of the entropy's nearest neighbours.
        batch: of the deployment whose latency ``speedup`` is about.
        sequence: likewise, tokens of a sample.
        deployed_with: pipeline text: the passes that models get before they are timed.
    """

    name: ClassVar[str] = "drop-blocks"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED})
    uses_original: ClassVar[bool] = True
    works_by_layer: ClassVar[bool] = False

    method: Literal["entropy", "greedy"] = "entropy"
    count: int | None = None
    speedup: float | None = None
    sparsity: float | None = None
    unit: Literal["module", "layer"] = "module"
    protect: tuple[int, ...] = (0, 1, -1)
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    samples: int = 16
    tokens: int = 4096
    neighbours: int = 25
    batch: int = 1
    sequence: int = 128
    deployed_with: str = "fuse"

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("count", "speedup", "sparsity")}
        given = {name: target for name, target in given.items() if target is not None}
        if len(given) != 1:
            raise PipelineError(
                f"drop-blocks: expected one target, found {given or 'none'}",
                hint="give one of count, speedup, sparsity",
            )
        for name in ("count", "samples", "tokens", "neighbours", "batch", "sequence"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise PipelineError(f"drop-blocks: {name} must be positive, found {number}")
        if self.speedup is not None and not self.speedup > 1:
            raise PipelineError(f"drop-blocks: speedup must be above 1, found {self.speedup}")
        if self.sparsity is not None and not 0 < self.sparsity <= 1:
            raise PipelineError(f"drop-blocks: sparsity must be above 0 and at most 1, found {self.sparsity}")
        check_deployed_with(self.deployed_with, self.name)

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        """Rank the blocks, find how many must go, and drop them."""
        structure = discover(model)
        wanted, skipped = self._wanted(structure)
        units = depth_units(model, structure.modules, wanted, by_layer=self.unit == "layer")
        kept = must_stay(model, wanted)
        if kept is not None:
            units = [unit for unit in units if kept.module not in unit.modules]
            skipped.append(Skipped(kept.module.name, kept.reason))
        covered = sum(len(unit.modules) for unit in units)
        coverage = Coverage(unit="residual modules", covered=covered, skipped=tuple(skipped))
        if not units:
            return PassResult(modified=False, coverage=coverage)
        order = self._order(model, structure, units, ctx)
        removals = order.first(self._number(model, structure, order, ctx))
        _report(removals, order, self.method, ctx)
        modules = [module for removal in removals for module in removal.unit.modules]
        gone = drop(model, modules)
        statistics: dict[str, int] = {}
        for module in modules:
            statistics[f"dropped {module.kind}"] = statistics.get(f"dropped {module.kind}", 0) + 1
        return PassResult(
            modified=bool(modules), coverage=coverage, statistics=statistics, redefined_outputs=gone
        )

    def _wanted(self, structure: Structure) -> tuple[list[ResidualModule], list[Skipped]]:
        skipped = [] if structure.modules else [Skipped(u.name, u.reason) for u in structure.unprunable]
        wanted = []
        for module in structure.modules:
            if matches(module.name, self.ignore):
                skipped.append(Skipped(module.name, "ignored"))
            elif self.targets and not matches(module.name, self.targets):
                skipped.append(Skipped(module.name, "not among targets"))
            else:
                wanted.append(module)
        return wanted, skipped

    def _order(
        self, model: ir.Model, structure: Structure, units: Sequence[DepthUnit], ctx: PassContext
    ) -> RemovalOrder:
        data = ctx.calibration or ctx.examples
        if not data:
            raise MissingDataError(
                f"drop-blocks: {self.method} is measured on calibration data, and there is none",
                hint="give compile(..., calibration=inputs), or example_inputs",
            )
        samples = first_samples(data, self.samples, model)
        ranked: Ranking
        if self.method == "entropy":
            ranked = _by_entropy(self._gains(model, units, samples, ctx))
        else:
            ranked = _by_loss(
                RemovalLoss(model, [module for unit in units for module in unit.modules], samples), ctx
            )
        layers = len(layers_of(structure.modules))
        protected = {layer + layers if layer < 0 else layer for layer in self.protect}
        return RemovalOrder(units, [unit for unit in units if unit.layer in protected], ranked)

    def _gains(
        self, model: ir.Model, units: Sequence[DepthUnit], samples: Sequence[Feeds], ctx: PassContext
    ) -> dict[DepthUnit, float]:
        spans = ctx.progress([span for unit in units for span in unit.spans], "measure entropies")
        stream = ActivationStream(model, samples)
        gains = entropy_gains(stream, spans, tokens=self.tokens, neighbours=self.neighbours)
        return {unit: _total([next(gains) for _ in unit.spans]) for unit in units}

    def _number(self, model: ir.Model, structure: Structure, order: RemovalOrder, ctx: PassContext) -> int:
        """How many of the units must go."""
        if self.speedup is not None:
            return self._number_for_speedup(self.speedup, model, order, ctx)
        if self.sparsity is not None:
            weights = sum(module_weights(model, structure.modules).values())
            return _number_for_sparsity(self.sparsity, weights, order, ctx)
        assert self.count is not None
        if self.count > len(order.units):
            raise PassError(
                f"drop-blocks: count={self.count} cannot be reached: {len(order.units)} {self.unit}s may go"
            )
        return self.count

    def _number_for_speedup(
        self, target: float, model: ir.Model, order: RemovalOrder, ctx: PassContext
    ) -> int:
        deployment = Deployment(
            ctx.original,
            target=ctx.target,
            batch=self.batch,
            sequence=self.sequence,
            examples=ctx.examples or ctx.calibration,
            deployed_with=self.deployed_with,
        )

        def measured(count: int) -> float:
            # Without all of them, the order does not matter: it may cost many runs to find.
            everything = count == len(order.units)
            units = order.units if everything else [removal.unit for removal in order.first(count)]
            candidate = clone(model)
            drop(candidate, [module for unit in units for module in unit.modules])
            return deployment.measure(candidate).speedup

        number, reached = fewest_reaching(target, len(order.units), measured)
        if number is None:
            raise PassError(
                f"drop-blocks: speedup={target:g} cannot be reached: without all {len(order.units)} "
                f"{self.unit}s that may go it is {reached:.3g}",
                hint=f"the fastest that can be reached is speedup={math.floor(reached * 100) / 100:g}",
            )
        ctx.remark("all blocks", f"measured speed-up {reached:.3g} for the target {target:g}")
        return number


def _total(gains: Sequence[float]) -> float:
    """Of the spans of one unit: infinite if any of them tells copies apart."""
    return math.inf if math.inf in gains else sum(gains)


def _by_entropy(gains: Mapping[DepthUnit, float]) -> Ranking:
    def ranked(units: Sequence[DepthUnit], removed: Sequence[DepthUnit]) -> Iterator[Removal]:
        del removed  # a gain is that of the dense model
        return iter(sorted((Removal(unit, gains[unit]) for unit in units), key=lambda removal: removal.score))

    return ranked


def _by_loss(loss: RemovalLoss, ctx: PassContext) -> Ranking:
    def ranked(units: Sequence[DepthUnit], removed: Sequence[DepthUnit]) -> Iterator[Removal]:
        def without(more: Sequence[DepthUnit]) -> float:
            return loss([module for unit in (*removed, *more) for module in unit.modules])

        track = partial(ctx.progress, description="try blocks")
        return (Removal(unit, score) for unit, score in greedy_removals(units, without, track))

    return ranked


def _number_for_sparsity(target: float, weights: int, order: RemovalOrder, ctx: PassContext) -> int:
    """The fewest units, in their order, that hold the share ``target`` of all modules' ``weights``."""
    most = sum(unit.weights for unit in order.units) / weights
    if target > most:
        raise PassError(
            f"drop-blocks: sparsity={target:g} cannot be reached: the {len(order.units)} blocks that may go "
            f"hold {most:.4g} of the weights of all residual modules"
        )
    gone, number = 0, 0
    while gone < target * weights and number < len(order.units):
        number += 1
        gone += order.first(number)[-1].unit.weights
    ctx.remark("all blocks", f"sparsity {gone / weights:.4g} for the target {target:g}")
    return number


def _report(removals: Sequence[Removal], order: RemovalOrder, method: str, ctx: PassContext) -> None:
    meaning = "entropy gain {:.4g} nats" if method == "entropy" else "loss {:.4g} without it and those before"
    for removal in removals:
        text = "dropped: " + meaning.format(removal.score)
        if order.is_protected(removal.unit):
            text += "; it was protected, but the target cannot be reached without it"
        ctx.remark(removal.unit.name, text)
