"""`planish.plan`: what a pipeline will cover, bind, write, need and cost, before any weight is read."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..codegen import get_target
from ..codegen.target import Target
from ..compiler import chosen_recipe, read_model, spill_from
from ..ir import clone
from ..passes.infrastructure.driver import run_pipeline, size_of
from ..passes.infrastructure.facts import facts_of
from ..passes.infrastructure.pipeline import Pipeline
from ..passes.infrastructure.report import PassReport
from ..runtime.calibration import CalibrationData
from .layers import AlikeLayers, alike_layers
from .made_up_data import made_up_data
from .order import advice
from .quantities import Quantities
from .rehearsal import Progress, Rehearsal, rehearse
from .task import Task, phase_of

Feeds = Mapping[str, np.ndarray[Any, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedPass:
    """What one pass will do and cost.

    Attributes:
        name: the pass.
        options: its options that differ from their defaults.
        covered: how many layers, or whatever it looks at, it will cover.
        total: of how many; 0 where it does not count.
        unit: what it counts.
        skipped: what it will leave alone: name (``*`` for any number), reason and how many.
        weight_bytes: of all weights after it.
        nodes: of the graph after it.
        seconds: wall time.
        peak_memory: the most memory that the process will hold in it, in bytes; None where not known.
        data: what data it looks at: ``calibration``, ``training``, ``examples``.
    """

    name: str
    options: Mapping[str, Any]
    covered: int
    total: int
    unit: str
    skipped: tuple[tuple[str, str, int], ...]
    weight_bytes: int
    nodes: int
    seconds: float
    peak_memory: int | None
    data: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a compilation will do and cost.

    Attributes:
        pipeline: what was asked for, which is legal.
        target: where the result will run.
        better: the same passes in an order that makes more sense; None if nothing is to be said against this.
        reasons: why that is better.
        passes: in their order; empty where the compilation will fail.
        kernels: how many nodes will be bound to each.
        forms: weights by the form in which they will be stored: how many, and their bytes.
        weight_bytes: of the model as it is.
        file_bytes: of what will be written.
        seconds: of the whole compilation, reading and writing included.
        peak_memory: the most memory that a process which does nothing else will hold, in bytes.
        made_up: how many samples of data were made up, because the pipeline needs data and none was given.
        inputs: names, types and shapes of what data must give.
        layers: how many layers were rehearsed, of how many.
        probe_seconds: how long making the plan took.
        error: what the compilation will fail with; None if nothing is known against it.
    """

    pipeline: str
    target: str
    better: str | None
    reasons: tuple[str, ...]
    passes: tuple[PlannedPass, ...]
    kernels: Mapping[str, int]
    forms: Mapping[str, tuple[int, int]]
    weight_bytes: int
    file_bytes: int
    seconds: float
    peak_memory: int | None
    made_up: int
    inputs: tuple[str, ...]
    layers: tuple[int, int]
    probe_seconds: float
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        return dataclasses.asdict(self)


def plan(
    model: Any,
    passes: Any = None,
    *,
    preset: str | None = None,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    calibration: Any = None,
    training: Any = None,
    samples: int = 128,
    target: str | Target | None = None,
    check: str = "verify",
    seed: int | None = None,
    progress: Progress = iter,
) -> Plan:
    """Say what `planish.compile` with the same arguments will do and cost.

    The model is brought into canonical form without reading its weights. Then a few of its layers, with
    made-up weights, are compiled in processes of their own: one layer of each kind and a few, with one batch
    of the data and a few. What all layers and all data will cost is extrapolated from that.

    Args:
        model: as for `planish.compile`.
        passes: likewise.
        preset: likewise.
        example_inputs: likewise.
        dynamic_shapes: likewise.
        calibration: likewise. Where it is needed and absent, samples are made up.
        training: likewise.
        samples: how much data is going to be given, where none is given now.
        target: likewise.
        check: ``"verify"`` or ``"none"``, likewise.
        seed: likewise.
        progress: wraps the list of small compilations, to show how far they are.

    Raises:
        PipelineError: the pipeline is not legal; the message suggests one that is.
        PlanishError: the model or the data cannot be read.
    """
    start = time.perf_counter()
    recipe = chosen_recipe(passes, preset)
    chosen: str | Target = target or recipe.target or "onnxruntime-cpu"
    tracing = time.perf_counter()
    source = read_model(model, example_inputs, dynamic_shapes)
    # Rehearsals read files; only a module is traced, and that was just done.
    is_file = isinstance(model, str | os.PathLike)
    reading = 0.0 if is_file else time.perf_counter() - tracing
    planner = _Planner(
        graph=source.graph,
        pipeline=recipe.pipeline,
        target=get_target(chosen) if isinstance(chosen, str) else chosen,
        check=check,
        seed=recipe.seed or 0 if seed is None else seed,
    )

    def data(given: Any, *, labels: bool = False) -> Sequence[Feeds]:
        if given is None:
            return ()
        return CalibrationData.read(given, source.graph, source.signature, labels=labels)

    found = planner.rehearsed(data(calibration), data(training, labels=True), samples, progress)
    return planner.plan(found, reading, time.perf_counter() - start)


class _Planner:
    """The model in canonical form, and what is to be done to it."""

    def __init__(self, *, graph: ir.Model, pipeline: Pipeline, target: Target, check: str, seed: int) -> None:
        facts = facts_of(graph)
        pipeline.check_legal(facts)
        self.pipeline, self.target, self.check, self.seed = pipeline, target, check, seed
        self.better = advice(pipeline, facts)
        self.source_nodes, self.weight_bytes = size_of(graph)
        self.model = clone(graph)
        self.canonicalized: PassReport | None = None
        if any(pass_.name == "canonicalize" for pass_ in pipeline):
            (self.canonicalized,) = run_pipeline(
                self.model, Pipeline.of("canonicalize"), target=target
            ).passes
        self.layers: Sequence[AlikeLayers] = alike_layers(self.model, pipeline)
        self.made_up = 0

    def rehearsed(
        self, calibration: Sequence[Feeds], training: Sequence[Feeds], samples: int, progress: Progress
    ) -> Rehearsal:
        """Rehearse with the data that there are; if that is too little, with made-up data."""

        def run(data: Sequence[Feeds]) -> Rehearsal:
            task = Task(
                passes=str(self.pipeline),
                target=self.target,
                check=self.check,
                seed=self.seed,
                calibration=tuple(data),
                training=tuple(training),
            )
            return rehearse(self.model, self.layers, task, progress=progress, spill_from=self._spill_from())

        found = run(calibration)
        if not found.lacks_data or calibration:
            return found
        made_up = made_up_data(self.model, samples)
        self.made_up = samples
        return run(made_up)

    def _spill_from(self) -> int:
        """So that the small models are kept where the whole one will be: in memory, or in a file."""
        return 0 if self.weight_bytes >= spill_from() else self.weight_bytes * 2 + 1

    def plan(self, found: Rehearsal, reading: float, probe_seconds: float) -> Plan:
        """What the rehearsal means."""
        expected = dict(found.expected)
        if self.canonicalized is not None:
            position = [pass_.name for pass_ in self.pipeline].index("canonicalize")
            # The rehearsals began in canonical form: how long it takes to get there was seen on the whole.
            phase = phase_of(position, "canonicalize")
            expected["seconds", phase] = max(
                expected.get(("seconds", phase), 0.0), self.canonicalized.seconds
            )
            expected["nodes", phase] = self.canonicalized.nodes_after
        if ("seconds", "read") in expected:
            expected["seconds", "read"] = max(expected["seconds", "read"], reading)
        return Plan(
            pipeline=str(self.pipeline),
            target=self.target.name,
            better=str(self.better[0]) if self.better else None,
            reasons=tuple(self.better[1]) if self.better else (),
            passes=() if found.error else tuple(self._passes(expected, found.asked)),
            kernels=_counts(expected, "kernel"),
            forms=_forms(expected),
            weight_bytes=self.weight_bytes,
            file_bytes=round(expected.get(("file",), 0)),
            seconds=sum(number for key, number in expected.items() if key[0] == "seconds"),
            peak_memory=max(
                (round(number) for key, number in expected.items() if key[0] == "peak"), default=None
            ),
            made_up=self.made_up,
            inputs=tuple(_declared(value) for value in self.model.graph.inputs),
            layers=found.layers,
            probe_seconds=probe_seconds,
            error=found.error,
        )

    def _passes(self, expected: Quantities, asked: Mapping[str, tuple[str, ...]]) -> Iterator[PlannedPass]:
        for position, pass_ in enumerate(self.pipeline):
            phase = phase_of(position, pass_.name)
            unit = next((key[2] for key in expected if key[:2] == ("looked at", phase)), "")
            peak = expected.get(("peak", phase))
            yield PlannedPass(
                name=pass_.name,
                options=pass_.changed_options(),
                covered=round(expected.get(("covered", phase, unit), 0)),
                total=round(expected.get(("looked at", phase, unit), 0)),
                unit=unit,
                skipped=tuple(
                    (key[2], key[3], round(count))
                    for key, count in expected.items()
                    if key[:2] == ("skipped", phase) and round(count)
                ),
                weight_bytes=round(expected[("weights", phase)]),
                nodes=round(expected[("nodes", phase)]),
                seconds=expected[("seconds", phase)],
                peak_memory=None if peak is None else round(peak),
                data=asked.get(phase, ()),
            )


def _counts(expected: Quantities, kind: str) -> dict[str, int]:
    return {key[1]: round(count) for key, count in expected.items() if key[0] == kind and round(count)}


def _forms(expected: Quantities) -> dict[str, tuple[int, int]]:
    return {
        form: (count, round(expected["form bytes", form]))
        for form, count in _counts(expected, "form").items()
    }


def _declared(value: ir.Value) -> str:
    dtype = value.dtype.name.lower() if value.dtype is not None else "?"
    return f"{value.name} {dtype}{list(map(str, value.shape or ()))}".replace("'", "")
