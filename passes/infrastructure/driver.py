"""The pass driver: runs a pipeline's passes in order, with instruments around each."""

from __future__ import annotations

import collections
import contextlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import onnx_ir as ir

from ...codegen.target import Target
from ...ir import clone
from ...ir.errors import NothingCoveredError, PassError, PlanishError
from .base import Feeds, Pass, PassContext, PassResult, ProgressHook
from .facts import facts_after, facts_of, set_facts
from .instruments import Instrument, Invocation, TimeAndMemory, peak_memory_bytes
from .pipeline import Pipeline
from .report import PassReport, PipelineReport


def run_pipeline(
    model: ir.Model,
    pipeline: Pipeline,
    *,
    target: Target,
    examples: Sequence[Feeds] = (),
    calibration: Iterable[Feeds] = (),
    seed: int = 0,
    instruments: Sequence[Instrument] = (),
) -> PipelineReport:
    """Run the passes of a pipeline on a model, in place and in order.

    Args:
        model: rewritten in place. After an error it is as the failing pass left it.
        pipeline: the passes; their order is checked before the first runs.
        target: what passes may ask about kernels and costs.
        examples: real inputs by graph-input name, for passes that look at activations.
        calibration: further inputs, streamed; an iterator is read once and kept.
        seed: seeds every pass together with its name, so that adding a pass leaves the others' randomness.
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
    instruments = (*instruments, TimeAndMemory())
    reports: list[PassReport] = []
    runs_of: collections.Counter[str] = collections.Counter()
    for position, pass_ in enumerate(pipeline):
        context = PassContext(
            target=target,
            examples=examples,
            calibration=calibration,
            seed=(seed, zlib.crc32(pass_.name.encode()), runs_of[pass_.name]),
        )
        runs_of[pass_.name] += 1
        invocation = Invocation(pass_, position, pipeline, context, seed)
        context.on_progress = _progress_hook(invocation, instruments)
        # Every instrument is asked, so that one that counts invocations sees them all.
        votes = [instrument.should_run(invocation, model) for instrument in instruments]
        if all(votes):
            reports.append(_run_pass(invocation, model, instruments))
    return PipelineReport(
        pipeline=str(pipeline),
        target=target.name,
        seed=seed,
        passes=tuple(reports),
        peak_memory=peak_memory_bytes(),
    )


def _run_pass(invocation: Invocation, model: ir.Model, instruments: Sequence[Instrument]) -> PassReport:
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
    return PassReport(
        name=pass_.name,
        options=pass_.changed_options(),
        modified=result.modified,
        coverage=result.coverage,
        statistics=dict(result.statistics),
        remarks=tuple(invocation.context.remarks),
        seconds=invocation.seconds,
        peak_memory_growth=invocation.peak_memory_growth,
        nodes_before=nodes_before,
        nodes_after=nodes_after,
        weight_bytes_before=bytes_before,
        weight_bytes_after=bytes_after,
        errors=invocation.errors,
    )


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
        error.message = f"{prefix}: {error.message}"
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
