"""The pass driver: runs a pipeline's passes in order, with instruments around each."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from ...codegen.target import Target
from ...ir import clone
from ...ir.content_hash import graph_hash
from ...ir.errors import NothingCoveredError, PassError, PlanishError
from ...runtime.calibration import CalibrationData
from ...runtime.calibration.data import fitted, input_types
from ...runtime.work_cache import Work, WorkCache, without_cache, work_key
from ...runtime.workers import LocalWorkers, Workers
from .base import Contract, Feeds, Pass, PassContext, PassResult, ProgressHook
from .facts import facts_after, facts_of, set_facts
from .instruments import Instrument, Invocation, TimeAndMemory, peak_memory_bytes
from .pipeline import Pipeline
from .report import Alternative, PassReport, PipelineReport


def run_pipeline(
    model: ir.Model,
    pipeline: Pipeline,
    *,
    target: Target,
    examples: Sequence[Feeds] = (),
    calibration: Iterable[Feeds] = (),
    training: Sequence[Feeds] = (),
    seed: int = 0,
    cache: WorkCache | None = None,
    workers: Workers | None = None,
    instruments: Sequence[Instrument] = (),
) -> PipelineReport:
    """Run the passes of a pipeline on a model, in place and in order.

    Where a pass gives alternatives, the rest of the pipeline is run on each of them afterwards, and they are
    found in the report.

    Args:
        model: rewritten in place. After an error it is as the failing pass left it.
        pipeline: the passes; their order is checked before the first runs.
        target: what passes may ask about kernels and costs.
        examples: real inputs by graph-input name, for passes that look at activations.
        calibration: further inputs, streamed; an iterator is read once and kept.
        training: inputs for passes that train, with ``labels`` if there are any; else the calibration data.
        seed: seeds every pass together with its name, so that adding a pass leaves the others' randomness.
        cache: where long passes keep what a run that was killed goes on from; nothing is kept if absent.
        workers: who does work that falls into independent pieces; by default a thread for each core.
        instruments: run around every pass; the first is the outermost.

    Raises:
        PipelineError: the order of the passes is not legal.
        NothingCoveredError: a pass that was asked to do work covered nothing.
        PlanishError: what a pass or an instrument raised, with the pass's name in it; other exceptions
            arrive as `PassError` with the exception as its cause.
    """
    pipeline.check_legal(facts_of(model))
    if not isinstance(calibration, Sequence):
        calibration = tuple(calibration)
    run = _Run(
        pipeline=pipeline,
        target=target,
        inputs=_Inputs(examples, calibration, training),
        seed=seed,
        cache=cache,
        workers=LocalWorkers() if workers is None else workers,
        instruments=(*instruments, TimeAndMemory()),
    )
    return run.finish(model)


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What passes run the model on."""

    examples: Sequence[Feeds]
    calibration: Sequence[Feeds]
    training: Sequence[Feeds]

    def fitted(self, model: ir.Model) -> _Inputs:
        """The same for a graph that has lost inputs, or whose caches have another shape or type."""
        return _Inputs(
            tuple(fitted(feeds, model) for feeds in self.examples),
            *(_fitted_data(data, model) for data in (self.calibration, self.training)),
        )


def _fitted_data(data: Sequence[Feeds], model: ir.Model) -> Sequence[Feeds]:
    return CalibrationData(data).fitted(model) if data else data


@dataclasses.dataclass(kw_only=True)
class _Run:
    """A pipeline on its way: what was done up to some pass, and what the next ones are given."""

    pipeline: Pipeline
    target: Target
    inputs: _Inputs
    seed: int
    cache: WorkCache | None
    workers: Workers
    instruments: Sequence[Instrument]
    original: ir.Model | None = None
    position: int = 0
    reports: tuple[PassReport, ...] = ()
    runs_of: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def finish(self, model: ir.Model) -> PipelineReport:
        """Run the passes that are left, and then on each alternative that one of them gave."""
        branches: list[tuple[str, ir.Model, _Run]] = []
        passes = tuple(self.pipeline)
        while self.position < len(passes):
            pass_ = passes[self.position]
            self._keep_original(pass_, passes, model)
            alternatives = self._step(pass_, model)
            self.position += 1
            for label, other in alternatives.items():
                set_facts(other, facts_of(model))
                copied = dataclasses.replace(
                    self, inputs=self.inputs.fitted(other), runs_of=self.runs_of.copy()
                )
                branches.append((label, other, copied))
        return PipelineReport(
            pipeline=str(self.pipeline),
            target=self.target.name,
            seed=self.seed,
            passes=self.reports,
            peak_memory=peak_memory_bytes(),
            alternatives={
                label: Alternative(other, branch.finish(other)) for label, other, branch in branches
            },
        )

    def _keep_original(self, pass_: Pass, passes: Sequence[Pass], model: ir.Model) -> None:
        changes = pass_.contract is Contract.APPROXIMATE or pass_.uses_original
        if self.original is None and changes and any(other.uses_original for other in passes):
            self.original = clone(model)

    def _step(self, pass_: Pass, model: ir.Model) -> Mapping[str, ir.Model]:
        """Run one pass unless an instrument is against it; gives the alternatives."""
        run, names = self.runs_of[pass_.name], input_types(model)
        self.runs_of[pass_.name] += 1
        with contextlib.ExitStack() as stack:
            context = PassContext(
                target=self.target,
                examples=self.inputs.examples,
                calibration=self.inputs.calibration,
                training=self.inputs.training,
                original=self.original,
                open_work=lambda given: stack.enter_context(self._work(pass_, run, given)),
                workers=self.workers,
                seed=(self.seed, zlib.crc32(pass_.name.encode()), run),
            )
            invocation = Invocation(pass_, self.position, self.pipeline, context, self.seed)
            context.on_progress = _progress_hook(invocation, self.instruments)
            # Every instrument is asked, so that one that counts invocations sees them all.
            votes = [instrument.should_run(invocation, model) for instrument in self.instruments]
            if not all(votes):
                return {}
            report, result = _run_pass(invocation, model, self.instruments)
        self.reports += (report,)
        if input_types(model) != names:
            self.inputs = self.inputs.fitted(model)
        return result.alternatives

    def _work(self, pass_: Pass, run: int, model: ir.Model) -> contextlib.AbstractContextManager[Work]:
        """What is kept of a pass on a model: the n-th of its name, with this data and seed."""
        if self.cache is None:
            return without_cache()
        data = (self.inputs.examples, self.inputs.calibration, self.inputs.training)
        original = self.original if pass_.uses_original else None
        key = work_key(model, data, self.seed, run, original and graph_hash(original))
        about = {"pass": pass_.name, "pipeline": str(self.pipeline), "model": str(model.graph.name)}
        return self.cache.opened(pass_.name, key, about)


def _run_pass(
    invocation: Invocation, model: ir.Model, instruments: Sequence[Instrument]
) -> tuple[PassReport, PassResult]:
    """Run one pass between its instruments; whatever goes wrong is told to them and raised with its name."""
    pass_ = invocation.pass_
    if any(instrument.wants_copy for instrument in instruments):
        invocation.before = clone(model)
    nodes_before, bytes_before = size_of(model)
    try:
        for instrument in instruments:
            instrument.before(invocation, model)
        with contextlib.ExitStack() as stack:
            for instrument in instruments:
                stack.enter_context(instrument.around(invocation))
            result = pass_.run(model, invocation.context)
        _check_result(pass_, result)
        set_facts(model, facts_after(pass_, facts_of(model)))
        for instrument in reversed(instruments):
            instrument.after(invocation, model, result)
    except Exception as error:
        named = _name_pass(error, pass_)
        for instrument in instruments:
            instrument.failed(invocation, model, named)
        if named is error:
            raise
        raise named from error
    nodes_after, bytes_after = size_of(model)
    report = PassReport(
        name=pass_.name,
        options=pass_.changed_options(),
        modified=result.modified,
        coverage=result.coverage,
        statistics=dict(result.statistics),
        remarks=tuple(invocation.context.remarks),
        seconds=invocation.seconds,
        peak_memory_growth=invocation.peak_memory_growth,
        latency_ms_before=invocation.latency_ms_before,
        latency_ms_after=invocation.latency_ms_after,
        nodes_before=nodes_before,
        nodes_after=nodes_after,
        weight_bytes_before=bytes_before,
        weight_bytes_after=bytes_after,
        errors=invocation.errors,
        layers=dict(result.layers),
    )
    return report, result


def _check_result(pass_: Pass, result: object) -> None:
    if not isinstance(result, PassResult):
        raise PassError(f"expected a PassResult, found {result!r}")
    coverage = result.coverage
    if coverage is not None and coverage.required and coverage.covered == 0:
        found = f"{coverage}" if coverage.total else f"the model has no {coverage.unit}"
        raise NothingCoveredError(
            f"covered nothing: {found}", hint=f"change the options of {pass_.name!r}, or leave it out"
        )


def _name_pass(error: Exception, pass_: Pass) -> PlanishError:
    """The error with the pass's name in its message; what is not a `PlanishError` becomes a `PassError`."""
    prefix = f"pass {pass_.name!r}"
    if not isinstance(error, PlanishError):
        text = " ".join(str(error).split())
        return PassError(f"{prefix}: {type(error).__name__}: {text}" if text else f"{prefix}: {error!r}")
    if prefix not in error.message:
        error.message = f"{prefix}: {error.message.removeprefix(f'{pass_.name}: ')}"
        error.args = (f"{error.message} — {error.hint}" if error.hint else error.message,)
    return error


def _progress_hook(invocation: Invocation, instruments: Sequence[Instrument]) -> ProgressHook:
    def show(items: Iterator[Any], total: int, description: str) -> Iterator[Any]:
        for instrument in instruments:
            items = instrument.progress(invocation, items, total, description)
        return items

    return show


def size_of(model: ir.Model) -> tuple[int, int]:
    """Nodes (subgraphs included) and bytes of weights of a model's graph."""
    weights = 0
    for graph in model.graphs():
        for value in graph.initializers.values():
            weights += value.const_value.nbytes if value.const_value is not None else 0
    return sum(1 for _ in model.graph.all_nodes()), weights
