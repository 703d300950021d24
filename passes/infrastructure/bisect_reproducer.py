"""What is left of a failure that a bisection found: the smallest model, pass and inputs that still show it.

The model before the culprit is cut to a window of its nodes, whose inputs get the values that they have in
the whole model. Both ends of the window are found by binary search, and every cut is tried: the window must
be good before the pass, and fail after it as the whole model does.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ...codegen.target import Target
from ...ir import clone, save
from ...ir.errors import PlanishError
from ...ir.files import replacing, write_text
from ...ir.outline import outline
from ...ir.window import window
from ...runtime.reference import run_model
from .base import Feeds, Pass
from .bisect import BisectResult, Failure, first_bad
from .bisect_judges import Check, judge_of
from .bisect_layers import layers_of, without_layers
from .driver import run_pipeline
from .facts import facts_of, set_facts, write_facts
from .instruments import BisectLimit
from .pipeline import Pipeline


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Something that fails: a model, the passes that break it, and what they are run on."""

    model: ir.Model
    pipeline: Pipeline
    examples: tuple[Feeds, ...] = ()
    calibration: tuple[Feeds, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """How to find out whether a case fails.

    Attributes:
        target: as in `bisect`.
        seed: as in `bisect`.
        check: as in `bisect`.
        tolerance: as in `bisect`.
        error: see `BisectResult.error`: what the failure looks like.
    """

    target: Target
    seed: int = 0
    check: Check | None = None
    tolerance: float | None = None
    error: tuple[type[BaseException], ...] = ()

    def run(self, case: Case, limit: int) -> ir.Model:
        """The case's model after its first ``limit`` passes."""
        model = clone(case.model)
        run_pipeline(
            model,
            case.pipeline,
            target=self.target,
            examples=case.examples,
            calibration=case.calibration,
            seed=self.seed,
            instruments=[BisectLimit(limit)],
        )
        return model

    def fails(self, case: Case) -> bool:
        """Whether the passes break the model as they do where it was found."""
        count = len(case.pipeline)
        try:
            judge = judge_of(case.model, case.pipeline, case.examples, self.check, self.tolerance)
            if judge.reason(0, case.model) is not None:
                return False
            reason = judge.reason(count, self.run(case, count))
        except PlanishError as error:
            return Failure.of(error).kind == self.error
        return reason is not None and not self.error


def smallest_case(
    model: ir.Model,
    pipeline: Pipeline,
    result: BisectResult,
    trial: Trial,
    *,
    examples: Sequence[Feeds] = (),
    calibration: Sequence[Feeds] = (),
) -> Case:
    """Reduce what a bisection found.

    Args:
        model: the input model; not changed.
        pipeline: what was searched.
        result: what was found; there is a culprit.
        trial: how to try a case, as it was searched.
        examples: as in `bisect`.
        calibration: as in `bisect`.

    Returns:
        A case that fails. Where the culprit alone does not break the model before it, as when errors of
        several passes add up, that is the input model with all passes up to the culprit.
    """
    assert result.culprit is not None
    until = Pipeline(pipeline.passes[: result.position + 1])
    whole = Case(model=model, pipeline=until, examples=tuple(examples[:1]), calibration=tuple(calibration))
    before = dataclasses.replace(whole, model=trial.run(whole, result.position))
    for pass_ in _narrowed(result.culprit, before.model, result.layer):
        for number in range(max(1, len(examples))):
            case = dataclasses.replace(
                before, pipeline=Pipeline((pass_,)), examples=tuple(examples[number : number + 1])
            )
            if trial.fails(case):
                return _fitting_options(_reduced(case, trial), result, trial)
    return whole


def _narrowed(culprit: Pass, model: ir.Model, layer: str) -> list[Pass]:
    """The culprit on its layer alone, where it can be told so, and as it is."""
    if not layer or without_layers(culprit, ()) is None:
        return [culprit]
    others = [name for name in layers_of(culprit, outline(model)) if name != layer]
    limited = without_layers(culprit, others) if others else None
    return [culprit] if limited is None else [limited, culprit]


def _reduced(case: Case, trial: Trial) -> Case:
    """The smallest window of the case's model that still fails."""

    def fails(start: int, stop: int, outputs: Sequence[str] | None = None) -> Case | None:
        try:
            smaller = _cut(case, start, stop, outputs)
        except PlanishError:
            return None  # onnxruntime cannot give what the window would read
        return smaller if trial.fails(smaller) else None

    count = len(case.model.graph)
    stop = first_bad(lambda stop: fails(0, stop) is not None, count)
    length = first_bad(lambda length: fails(stop - length, stop) is not None, stop)
    start = stop - length
    found = fails(start, stop)
    if found is None:  # the graph's own outputs, which no node reads, are needed
        return case
    alone = [
        smaller
        for value in found.model.graph.outputs
        if (smaller := fails(start, stop, [value.name or ""])) is not None
    ]
    return min(alone, key=lambda smaller: len(smaller.model.graph), default=found)


def _cut(case: Case, start: int, stop: int, outputs: Sequence[str] | None) -> Case:
    model = window(case.model, start, stop, outputs)
    set_facts(model, facts_of(case.model))
    examples, calibration = (
        tuple(_values_at(case.model, model, feeds) for feeds in batches)
        for batches in (case.examples, case.calibration)
    )
    for value in model.graph.inputs:
        for feeds in (*examples, *calibration)[:1]:
            array = feeds[value.name or ""]
            value.dtype = value.dtype or ir.DataType.from_numpy(array.dtype)
            value.shape = value.shape if value.shape is not None else ir.Shape([None] * array.ndim)
    return dataclasses.replace(case, model=model, examples=examples, calibration=calibration)


def _values_at(whole: ir.Model, part: ir.Model, feeds: Feeds) -> Feeds:
    """What the inputs of a window are in the whole model, given that model's inputs."""
    names = [value.name or "" for value in part.graph.inputs]
    inner = [name for name in names if name not in feeds]
    values = {**feeds, **(run_model(whole, feeds, inner) if inner else {})}
    return {name: values[name] for name in names}


def _fitting_options(case: Case, result: BisectResult, trial: Trial) -> Case:
    """The same case without options that speak of layers which are no longer in the model."""
    assert result.culprit is not None
    for pass_ in _narrowed(result.culprit, case.model, result.layer):
        shorter = dataclasses.replace(case, pipeline=Pipeline((pass_,)))
        if trial.fails(shorter):
            return shorter
    return case


def write_case(folder: Path, case: Case, trial: Trial, options: Sequence[str] = ()) -> str:
    """Write a case as ``model.onnx``, ``pipeline.txt``, the inputs and ``reproduce.sh``.

    Args:
        folder: where to; made if it is missing.
        case: what fails.
        trial: how to see that.
        options: of `planish bisect`, that say what "fails" means.

    Returns:
        The command in ``reproduce.sh``, which finds the culprit again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = clone(case.model)
    write_facts(model, facts_of(model))
    save(model, folder / "model.onnx")
    write_text(folder / "pipeline.txt", f"{case.pipeline}\n")
    words = ["planish", "bisect", str(folder / "model.onnx"), "--passes", str(case.pipeline)]
    words += ["--target", trial.target.name, "--seed", str(trial.seed), *options]
    for feeds in case.examples:
        _write_arrays(folder / "inputs.npz", feeds)
        words += ["--inputs", str(folder / "inputs.npz")]
    for number, feeds in enumerate(case.calibration):
        path = folder / f"calibration_{number}.npz"
        _write_arrays(path, feeds)
        words += ["--calibration", str(path)]
    command = shlex.join(words)
    write_text(folder / "reproduce.sh", f"{command}\n")
    return command


def _write_arrays(path: Path, feeds: Feeds) -> None:
    with replacing(path) as (file,):
        np.savez(file, allow_pickle=False, **feeds)
