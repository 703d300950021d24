"""Compiles one scaled-down model in a process of its own, and writes down what every phase of it cost.

    python -m planish.planning.worker FOLDER

reads ``FOLDER/task.pickle`` and ``FOLDER/model.onnx``, and writes ``FOLDER/outcome.pickle``. A process of its
own, because the peak memory of one that has already done something says nothing.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..compiler import compile as compile_model
from ..ir.errors import MissingDataError, PlanishError
from ..passes.infrastructure.base import PassResult
from ..passes.infrastructure.instruments import Instrument, Invocation, peak_memory_bytes
from ..passes.infrastructure.pipeline import Pipeline
from ..runtime.provenance import Provenance
from .task import MODEL, OUTCOME, RESULT, TASK, Feeds, Outcome, Phase, Task, phase_of


class _Watched(Sequence[Feeds]):
    """Data that says when somebody looks at it."""

    def __init__(self, data: Sequence[Feeds], asked: set[str], kind: str) -> None:
        self._data, self._asked, self._kind = data, asked, kind

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: Any) -> Any:
        self._asked.add(self._kind)
        return self._data[index]


class _Clock(Instrument):
    """Cuts the time of a compilation, and its peak memory, at the passes."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self.asked: dict[str, set[str]] = {}
        self._start = time.perf_counter()
        _reset_peak()

    def cut(self, name: str) -> None:
        """What was done since the last cut goes by this name."""
        now = time.perf_counter()
        self.phases.append(Phase(name, now - self._start, peak_memory_bytes()))
        self._start = now
        _reset_peak()

    def before(self, invocation: Invocation, model: ir.Model) -> None:
        """Everything before the first pass is reading; data is watched from here on."""
        del model
        if invocation.position == 0:
            self.cut("read")
        asked = self.asked.setdefault(phase_of(invocation.position, invocation.pass_.name), set())
        context = invocation.context
        context.calibration = _Watched(context.calibration, asked, "calibration")
        context.training = _Watched(context.training, asked, "training")
        context.examples = _Watched(context.examples, asked, "examples")

    def after(self, invocation: Invocation, model: ir.Model, result: PassResult) -> None:
        """A pass ends, checks of its result included."""
        del model, result
        self.cut(phase_of(invocation.position, invocation.pass_.name))


def _reset_peak() -> None:
    """Only Linux can: elsewhere a phase's peak is that of the process so far."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _run(folder: Path, task: Task) -> Outcome:
    try:
        pipeline = Pipeline.of(task.passes)  # imports the passes, which is no part of any phase
        clock = _Clock()
        compiled = compile_model(
            folder / MODEL,
            pipeline,
            target=task.target,
            check=task.check,  # type: ignore[arg-type]
            seed=task.seed,
            calibration=list(task.calibration) or None,
            training=list(task.training) or None,
            instruments=(clock,),
        )
        clock.cut("bind")
        compiled.save(folder / RESULT)
        clock.cut("save")
    except PlanishError as error:
        # As text: what an error holds and was raised from need not be fit to be sent to another process.
        lacks_data = isinstance(error, MissingDataError)
        return Outcome(
            phases=(), asked={}, provenance=None, file_bytes=0, error=str(error), lacks_data=lacks_data
        )
    written = [path for path in folder.iterdir() if path.name.startswith(RESULT)]
    return Outcome(
        phases=tuple(clock.phases),
        asked={name: tuple(sorted(kinds)) for name, kinds in clock.asked.items()},
        provenance=Provenance.read(compiled.bound.model.metadata_props),
        file_bytes=sum(path.stat().st_size for path in written),
    )


def main(folder: Path) -> None:
    """Do what the folder says."""
    task: Task = pickle.loads((folder / TASK).read_bytes())
    (folder / OUTCOME).write_bytes(pickle.dumps(_run(folder, task)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
