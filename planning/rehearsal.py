"""Compiling a few layers for a short while, several times, to learn what all of them will do and cost.

Let n be how many layers of a kind there are, and x how much data or how many steps a pass works through. What
a compilation does and costs is taken to be affine in both,

    f(n, x) = a + b·n + c·x + d·n·x,

so the four corners of a small rectangle say what f is at the real n and x; d is 0 for memory. With several
kinds of layers, each has an n of its own.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from ..codegen.machine import cache_directory
from ..compiler import SPILL_VARIABLE
from ..ir import save
from ..ir.errors import InputError
from ..passes.infrastructure.base import Pass
from ..passes.infrastructure.facts import facts_of, write_facts
from ..passes.infrastructure.pipeline import Pipeline
from ..runtime.calibration.data import LABELS
from .layers import AlikeLayers
from .quantities import Quantities, quantities
from .scaled_down import scaled_down
from .task import MODEL, OUTCOME, TASK, Feeds, Outcome, Task, phase_of

_SMALL_LAYER = 32 << 20
"""Bytes of a layer below which more of them are rehearsed: a longer lever is steadier."""
_BATCHES = (1, 4)
_STEPS = (2, 6)
"""How many batches and how many training steps the rehearsals work through."""
_WORTH_REPEATING = 10.0
"""Seconds of a compilation below which it is done twice: the faster one was disturbed less."""
_COSTS = ("seconds", "peak")
"""Quantities that are measured, and not counted."""


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What was learned.

    Attributes:
        expected: of the whole compilation.
        asked: by phase, what data its pass looked at.
        layers: how many layers were rehearsed at most, of how many.
        error: what the compilation will fail with; None if nothing is known against it.
        lacks_data: because a pass needs data and there is none.
    """

    expected: Quantities
    asked: Mapping[str, tuple[str, ...]]
    layers: tuple[int, int]
    error: str | None = None
    lacks_data: bool = False


@dataclasses.dataclass(frozen=True)
class Corner:
    """One of the small compilations: how many layers of each kind, and whether with more data and steps."""

    counts: Mapping[str, int]
    more: bool


Progress = Callable[[Sequence[Corner]], Iterator[Corner]]
"""Gives the small compilations one after the other, and shows how far they are."""


def rehearse(
    model: ir.Model,
    layers: Sequence[AlikeLayers],
    task: Task,
    *,
    progress: Progress,
    spill_from: int | None = None,
) -> Rehearsal:
    """Compile small parts of a model and say what the whole will do and cost.

    Args:
        model: in canonical form; its weights are not read.
        layers: its layers.
        task: what the whole is to be compiled with, all data included.
        progress: shows the small compilations as they are done.
        spill_from: bytes of weights from which on new ones are kept in a file.
    """
    pipeline = Pipeline.of(task.passes)
    amounts = _Amounts(pipeline, tuple(_elements(feeds) for feeds in task.calibration))
    everything = {alike.name: len(alike) for alike in layers}
    for few, many in _levers(model, everything, pipeline, works_on_data=len(amounts.both) > 1):
        counts = [few, *({**few, name: many[name]} for name in few if many[name] > few[name])]
        outcomes: dict[tuple[int, bool], Outcome] = {}
        for corner in progress([Corner(n, more) for n in counts for more in amounts.both]):
            part = scaled_down(model, corner.counts, layers)
            small_task = _fitted(amounts.of(task, more=corner.more), part)
            outcome = _compile(part, small_task, spill_from)
            if outcome.error is None and outcome.seconds < _WORTH_REPEATING:
                outcome = outcome.faster(_compile(part, small_task, spill_from))
            outcomes[counts.index(dict(corner.counts)), corner.more] = outcome
            if outcome.error:
                break
        rehearsed = (sum(counts[-1].values()), sum(everything.values()))
        if outcome.lacks_data:
            break
        if outcome.error is None:
            few_data = [quantities(outcomes[index, False]) for index in range(len(counts))]
            all_data = [amounts.extended(outcomes, index) for index in range(len(counts))]
            expected = _all_layers(few_data, all_data, counts, everything)
            return Rehearsal(expected, outcome.asked, rehearsed)
    # With fewer layers an error may come of there being so few; with all of them it will come again.
    return Rehearsal({}, {}, rehearsed, outcome.error, outcome.lacks_data)


def _fitted(task: Task, model: ir.Model) -> Task:
    """The task without data for the caches of layers that are not there."""
    names = {value.name for value in model.graph.inputs} | {LABELS}

    def left(data: Sequence[Feeds]) -> list[Feeds]:
        return [{name: array for name, array in feeds.items() if name in names} for feeds in data]

    return dataclasses.replace(task, calibration=left(task.calibration), training=left(task.training))


def _levers(
    model: ir.Model, everything: dict[str, int], pipeline: Pipeline, *, works_on_data: bool
) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    """How many layers of each kind to rehearse, and how many for the second point; better ones later.

    The second layer takes memory that all further ones use again. Where a layer is short work, because there
    are no data to go through, rehearsals begin behind it.
    """
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    small = size < _SMALL_LAYER * max(1, sum(everything.values()))
    if all(pass_.works_by_layer for pass_ in pipeline):
        first = (1, 3) if small else (1, 2) if works_on_data else (2, 4)
        for few, many in dict.fromkeys([first, (2, 4)]):
            # A rehearsal of nearly everything says less than one of everything.
            if sum(min(n, many) for n in everything.values()) < sum(everything.values()) / 1.5:
                yield (
                    {name: min(n, few) for name, n in everything.items()},
                    {name: min(n, many) for name, n in everything.items()},
                )
    yield everything, everything


@dataclasses.dataclass(frozen=True)
class _Amounts:
    """How much of the data and of the steps is rehearsed, and how to get from there to all of it."""

    pipeline: Pipeline
    batches: tuple[int, ...]
    """How large each batch of the data is."""

    @property
    def both(self) -> tuple[bool, ...]:
        """Whether there is anything that a rehearsal can do less of."""
        return (
            (False,) if all(self._done(pass_, more=False) == 1 for pass_ in self.pipeline) else (False, True)
        )

    def of(self, task: Task, *, more: bool) -> Task:
        """The task with less data and fewer steps."""
        passes = [
            pass_
            if (steps := pass_.training_steps) is None
            else dataclasses.replace(pass_, steps=min(_STEPS[more], steps))  # type: ignore[call-arg]
            for pass_ in self.pipeline
        ]
        return dataclasses.replace(
            task,
            passes=str(Pipeline(tuple(passes))),
            calibration=task.calibration[: _BATCHES[more]],
            training=task.training[: _STEPS[more]],
        )

    def extended(self, outcomes: Mapping[tuple[int, bool], Outcome], index: int) -> Quantities:
        """From the rehearsed amounts of work to all of it. Only costs depend on them, not the graph."""
        less = quantities(outcomes[index, False])
        if self.both == (False,):
            return less
        more = quantities(outcomes[index, True])
        result = dict(less)
        for position, pass_ in enumerate(self.pipeline):
            for key in [(kind, phase_of(position, pass_.name)) for kind in _COSTS]:
                if key in less and key in more:
                    result[key] += self._factor(pass_) * max(0.0, more[key] - less[key])
        return result

    def _factor(self, pass_: Pass) -> float:
        """How often the step from the smaller rehearsal to the larger one leads to the whole."""
        less, more = (self._done(pass_, more=more) for more in (False, True))
        return (1 - less) / (more - less) if more > less else 0.0

    def _done(self, pass_: Pass, *, more: bool) -> float:
        """The share of a pass's steps, or of its data, that a rehearsal works through."""
        steps = pass_.training_steps
        if steps is not None:
            return min(_STEPS[more], steps) / steps
        limit = getattr(pass_, "samples", None)
        used = self.batches[:limit] if isinstance(limit, int) else self.batches
        return sum(used[: _BATCHES[more]]) / sum(used) if used else 1.0


def _elements(feeds: Feeds) -> int:
    """Of the largest input, to which work is proportional; padding counts, as it does when it is run."""
    return max((array.size for array in feeds.values()), default=1)


def _all_layers(
    few_data: Sequence[Quantities],
    all_data: Sequence[Quantities],
    counts: Sequence[Mapping[str, int]],
    everything: Mapping[str, int],
) -> Quantities:
    """From a few layers of each kind to all of them: the plane through the points.

    Only one group of layers has its data in memory at a time, so what a layer adds to the peak does not
    depend on the data, and is taken from where it is disturbed least.
    """
    base = all_data[0]
    result = dict(base)
    for index, more in enumerate(counts[1:], start=1):
        (name,) = (name for name in more if more[name] > counts[0][name])
        factor = (everything[name] - counts[0][name]) / (more[name] - counts[0][name])
        for key in base.keys() | all_data[index].keys():
            points = few_data if key[0] == "peak" else all_data
            slope = points[index].get(key, 0.0) - points[0].get(key, 0.0)
            if key[0] in _COSTS:
                slope = max(slope, 0.0)  # no layer gives time back: what is below is noise
            result[key] = result.get(key, 0.0) + factor * slope
    return result


def _compile(model: ir.Model, task: Task, spill_from: int | None) -> Outcome:
    """Compile a model in a process of its own."""
    write_facts(model, facts_of(model))
    root = cache_directory()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="planish-plan-", dir=root) as name:
        folder = Path(name)
        save(model, folder / MODEL)
        (folder / TASK).write_bytes(pickle.dumps(task))
        environment = {**os.environ, **({} if spill_from is None else {SPILL_VARIABLE: str(spill_from)})}
        command = [sys.executable, "-m", "planish.planning.worker", name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            outcome: Outcome = pickle.loads((folder / OUTCOME).read_bytes())
            return outcome
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    raise InputError(
        f"the rehearsal of a small part of the model ended with code {done.returncode}: {last}",
        hint="compile the model itself to see more",
    )
