"""Prune heads, channels and whole modules until the model is faster by a stated factor, as measured.

    W[:, S], W[S, :]  →  gone        for the structures S that each layer can miss best
    minimise loss   subject to   latency(model) = latency(original) / speedup

ZipLM (Kurtic, Frantar and Alistarh, 2023): structured Optimal Brain Surgeon gives each layer at every size,
with its other weights refitted; a table of measured times gives what every size takes on the target; a search
chooses the sizes together, by the loss of the shrunk model. What comes out is smaller matrices, no masks.

Preconditions: the canonical form, float weights, real inputs as calibration data. What can be pruned is found
by `planish.ir.structure`. Prune before rotating, merging or quantising: all of them read the weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import onnx_ir as ir

from ...codegen.target import Target
from ...ir.errors import MissingDataError, PassError, PipelineError
from ...ir.structure import Structure, discover
from ...runtime.latency_table import LatencyTable
from ..infrastructure.base import Contract, Coverage, Fact, Feeds, Pass, PassContext, PassResult, Skipped
from ..infrastructure.patterns import matches
from .candidates import Candidates, fitness_samples
from .database import build_database
from .deployed import check_deployed_with
from .deployment import Deployment
from .time_goal import Progress, Reached, TimeCosts, measured_table
from .units import Grid, Unit, select_units, weights_at_levels

Structures = Literal["attention", "ffn", "convolution", "other", "module"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune(Pass):
    """Remove heads, channels and modules so that the model is faster by a stated, measured factor.

    One of ``speedup``, ``latency_ms`` and ``sparsity`` says how far. Several of them, as in
    ``speedup=[1.5,2,3]``, are reached in one run: the model becomes the smallest one, the others are its
    alternatives.

    Attributes:
        speedup: how many times faster than the original model, end to end on the target; the original is
            the model before the first pass of the pipeline that changes its function.
        latency_ms: the time of a call, in milliseconds.
        sparsity: share of the prunable weights to remove, between 0 and 1; nothing is timed then.
        batch: samples of a call of the deployment.
        sequence: tokens of a sample of the deployment, where inputs have such an axis.
        criterion: what decides which structures go: ``obs`` (ZipLM, which also refits what stays), or for
            comparison ``magnitude`` of the weights, ``wanda`` (weights times activations), ``taylor``
            (first-order change of the loss) or ``random``.
        structures: kinds that may go; ``module`` allows that whole residual modules go.
        targets: names or ``re:`` patterns of the groups to prune; empty means all.
        ignore: names or ``re:`` patterns of the groups to leave alone.
        level_factor: each level of channels keeps this share of the one before; heads go one by one.
        smallest_level: the least share of a group's channels that may stay, modules that go as a whole apart.
        multiple: numbers of channels that stay are multiples of this.
        evaluations: losses of candidates that the search for one target measures; a quarter as many where
            it is repeated near the goal.
        samples: samples of the calibration data that losses are measured on.
        damp: added to the diagonal of the Hessian, relative to its mean.
        deployed_with: passes that the timed models go through first, as text; empty for none.
        deviation: the largest relative one from the speed-up asked for that ends the corrections.
        corrections: how often the search is repeated with a corrected budget where the deviation is larger.
        latency_table: file with a table of `planish latency` to use instead of measuring one.
        force_latency_table: use it although it was measured elsewhere.
    """

    name: ClassVar[str] = "prune"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED})
    uses_original: ClassVar[bool] = True

    speedup: tuple[float, ...] = ()
    latency_ms: tuple[float, ...] = ()
    sparsity: tuple[float, ...] = ()
    batch: int = 1
    sequence: int = 128
    criterion: Literal["obs", "magnitude", "wanda", "taylor", "random"] = "obs"
    structures: tuple[Structures, ...] = ("attention", "ffn", "convolution", "other", "module")
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    level_factor: float = 0.9
    smallest_level: float = 0.01
    multiple: int = 8
    evaluations: int = 200
    samples: int = 32
    damp: float = 0.1
    deployed_with: str = "fuse"
    deviation: float = 0.03
    corrections: int = 4
    latency_table: Path | None = None
    force_latency_table: bool = False

    def __post_init__(self) -> None:
        goals = {name: getattr(self, name) for name in ("speedup", "latency_ms", "sparsity")}
        given = [name for name, values in goals.items() if values]
        if len(given) != 1:
            raise PipelineError(
                f"prune: expected one of {', '.join(goals)}, found {' and '.join(given) or 'none'}",
                hint="for example prune{speedup=2.0}",
            )
        lowest, highest = {"speedup": (1.0, math.inf), "latency_ms": (0.0, math.inf)}.get(
            given[0], (0.0, 1.0)
        )
        if any(not lowest < value < highest for value in goals[given[0]]):
            below = "" if highest == math.inf else f" and below {highest:g}"
            raise PipelineError(
                f"prune: {given[0]}: {list(goals[given[0]])} is out of range",
                hint=f"give numbers above {lowest:g}{below}, as in prune{{{given[0]}=…}}",
            )
        if not 0 < self.level_factor < 1 or not 0 < self.smallest_level < 1:
            raise PipelineError("prune: level_factor and smallest_level must lie between 0 and 1")
        counts = ("batch", "sequence", "multiple", "evaluations", "samples")
        if any(getattr(self, name) < 1 for name in counts):
            raise PipelineError(f"prune: {', '.join(counts)} must be positive")
        if self.damp < 0 or self.deviation <= 0 or self.corrections < 0:
            raise PipelineError("prune: damp and corrections must not be negative, deviation positive")
        check_deployed_with(self.deployed_with, self.name)

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        """Measure, refit, search, and shrink."""
        structure = discover(model)
        units, skipped = self._units(structure)
        coverage = Coverage(unit="prunable groups", covered=len(units), skipped=tuple(skipped))
        if not units:
            return PassResult(modified=False, coverage=coverage)
        samples = self._samples(model, ctx)
        costs = None if self.sparsity else self._time_costs(model, structure, units, ctx)
        folder = ctx.work(model).folder
        database = build_database(
            model,
            structure,
            {unit.name: unit.counts for unit in units},
            criterion=self.criterion,
            damp=self.damp,
            ctx=ctx,
            folder=folder / "database",
        )
        candidates = Candidates(
            model,
            structure,
            units,
            database,
            samples,
            ctx,
            evaluations=self.evaluations,
            memory=folder / "losses.json",
        )
        if costs is None:
            reached = self._reach_sparsities(model, units, candidates)
        else:
            reached = [
                costs.reach(speedup, label, candidates) for speedup, label in self._speedups(costs).items()
            ]
        return self._finish(model, units, candidates, reached, coverage, ctx)

    def table(self, model: ir.Model, target: Target, progress: Progress) -> LatencyTable:
        """Measure what every level takes that this pass may choose for a canonical model."""
        structure = discover(model)
        units, _ = self._units(structure)
        return measured_table(model, structure, units, self._deployment(model, target, ()), progress)

    def _units(self, structure: Structure) -> tuple[list[Unit], list[Skipped]]:
        kinds = set(self.structures)
        grid = Grid(
            factor=self.level_factor,
            smallest=self.smallest_level,
            multiple=self.multiple,
            drops_modules="module" in kinds,
        )
        return select_units(structure, grid, kinds, self._not_asked_for)

    def _deployment(self, original: ir.Model, target: Target, examples: Sequence[Feeds]) -> Deployment:
        return Deployment(
            original,
            target=target,
            batch=self.batch,
            sequence=self.sequence,
            examples=examples,
            deployed_with=self.deployed_with,
        )

    def _samples(self, model: ir.Model, ctx: PassContext) -> list[Feeds]:
        if not ctx.calibration:
            raise MissingDataError(
                "prune: what a layer can miss is measured on calibration data, and there is none",
                hint="give compile(..., calibration=inputs), or --calibration inputs.npz",
            )
        return fitness_samples(model, ctx, self.samples)

    def _not_asked_for(self, name: str) -> str | None:
        if matches(name, self.ignore):
            return "ignored"
        return "not a target" if self.targets and not matches(name, self.targets) else None

    def _time_costs(
        self, model: ir.Model, structure: Structure, units: Sequence[Unit], ctx: PassContext
    ) -> TimeCosts:
        deployment = self._deployment(ctx.original, ctx.target, ctx.calibration)
        costs = TimeCosts(
            model,
            structure,
            units,
            deployment,
            ctx,
            deviation=self.deviation,
            corrections=self.corrections,
            table=self.latency_table,
            force=self.force_latency_table,
        )
        costs.require_possible(max(self._speedups(costs)))
        return costs

    def _speedups(self, costs: TimeCosts) -> dict[float, str]:
        """The speed-ups to reach, rising, and what they are called."""
        if self.latency_ms:
            return {costs.original * 1e3 / ms: f"{ms:g}ms" for ms in sorted(self.latency_ms, reverse=True)}
        return {factor: f"{factor:g}x" for factor in sorted(self.speedup)}

    def _reach_sparsities(
        self, model: ir.Model, units: Sequence[Unit], candidates: Candidates
    ) -> list[Reached]:
        weights = [weights_at_levels(model, unit) for unit in units]
        dense = sum(float(levels[0]) for levels in weights)
        reached = []
        for sparsity in sorted(self.sparsity):
            found = candidates.find(weights, (1 - sparsity) * dense)
            if found is None:
                most = 1 - sum(float(levels.min()) for levels in weights) / dense
                raise PassError(
                    f"prune: sparsity={sparsity:g} is out of reach: at most {most:.3f} of the prunable "
                    "weights can go",
                    hint="ask for less, or allow smaller levels",
                )
            kept = sum(float(levels[level]) for levels, level in zip(weights, found.choice, strict=True))
            text = f"{1 - kept / dense:.3f} of the prunable weights are gone"
            reached.append(Reached(found.choice, f"{sparsity:g}", text, found.loss))
        return reached

    def _finish(
        self,
        model: ir.Model,
        units: Sequence[Unit],
        candidates: Candidates,
        reached: Sequence[Reached],
        coverage: Coverage,
        ctx: PassContext,
    ) -> PassResult:
        for entry in reached:
            ctx.remark(entry.label, f"{entry.text}; loss {entry.loss:.4g} on {self.samples} samples")
        *others, last = reached
        alternatives = {entry.label: candidates.build(entry.levels) for entry in others}
        outputs = _output_types(model)
        candidates.apply(model, last.levels)
        for unit, level, errors in zip(units, last.levels, candidates.errors, strict=True):
            kept = unit.counts[level]
            what = f"keeps {kept} of {unit.group.structures}" if kept else "is dropped"
            ctx.remark(unit.name, f"{what}, error {errors[level]:.3g}")
        changed = outputs - _output_types(model)
        return PassResult(
            modified=any(last.levels),
            coverage=coverage,
            redefined_outputs=frozenset(name for name, _ in changed),
            alternatives=alternatives,
        )


def _output_types(model: ir.Model) -> set[tuple[str, str]]:
    return {(str(value.name), str(value.shape)) for value in model.graph.outputs}
