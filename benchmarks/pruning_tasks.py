"""What pruning to a measured speed-up costs where right and wrong can be counted: three classifiers.

A vision transformer and a residual network on scikit-learn's digits, and the sentence-embedding model with a
head that tells which library a docstring is from. Each is pruned to four speed-ups: in one shot, in one shot
with distillation, and gradually, with distillation after every step. All of a task's files are timed in turns
with the dense float model, in plain onnxruntime.

    python benchmarks/pruning_tasks.py                        # everything; writes results/pruning_tasks.md
    python benchmarks/pruning_tasks.py --only "vit: gradual"  # rows whose name contains a text; prints them

Trained models, pruned files, and what an interrupted run goes on from are kept in ``--output``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import planish
import tasks_digits
import tasks_report
import tasks_text
from planish.ir import clone
from planish.ir.errors import PlanishError
from planish.passes import PassResult
from planish.passes.distill import Distill
from planish.passes.infrastructure.instruments import Instrument, Invocation, ProgressBars
from planish.passes.prune import Prune
from rich.console import Console
from tasks_classifier import Task, accuracy, latencies, open_file
from tasks_report import GRADUAL, ONE_SHOT, Row, TaskRows

TARGETS = (1.5, 2.0, 3.0, 4.0)
STAGES = (1.25, *TARGETS)
"""Of the gradual way."""
_STAGES_TO_TWO = 3
"""Distillations on the gradual way to 2×: after one shot, as many steps follow in one."""
TASKS: Mapping[str, Callable[[Path, int | None, Callable[[str], None]], Task]] = {
    "vit": tasks_digits.vision_transformer,
    "cnn": tasks_digits.residual_network,
    "text": tasks_text.text_classifier,
}
_CALIBRATION = 1024
"""Training samples that the layers' statistics are taken from."""
_RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides a method's results besides the task.

    Attributes:
        steps: of a distillation.
        evaluations: of the search for one target.
        samples: that the search's losses are measured on.
        targets: speed-ups.
    """

    steps: int
    evaluations: int
    samples: int
    targets: tuple[float, ...] = TARGETS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a method gave.

    Attributes:
        files: by speed-up that was asked for; none after a failure.
        seconds: that it took for all of them.
        failure: the error that ended it.
    """

    files: Mapping[float, Path]
    seconds: float
    failure: str = ""


class Snapshots(Instrument):
    """Keeps the model as it is after each distillation, by the speed-up that it was pruned to."""

    def __init__(self) -> None:
        self.models: dict[str, ir.Model] = {}
        self._label = ""

    def after(self, invocation: Invocation, model: ir.Model, result: PassResult) -> None:
        """Note the speed-up, or keep the model."""
        del result
        if isinstance(invocation.pass_, Prune):
            self._label = label(*invocation.pass_.speedup)
        elif isinstance(invocation.pass_, Distill):
            self.models[self._label] = clone(model)


def label(target: float) -> str:
    """As `prune` calls what it found for a target."""
    return f"{target:g}x"


class Pruner:
    """One task's models, pruned; their files stay in a folder.

    Args:
        task: the classifier.
        settings: a method whose files were made with others is run again.
        folder: exists.
        console: where progress is shown.
    """

    def __init__(self, task: Task, settings: Settings, folder: Path, console: Console) -> None:
        self._task, self._settings, self._folder, self._console = task, settings, folder, console
        self._calibration = task.calibration(_CALIBRATION)

    def dense(self) -> Path:
        """The file of the float model, not pruned."""
        path = self._folder / "dense.onnx"
        if not path.exists():
            self._compile("canonicalize,fuse").save(path)
        return path

    def pruned(self, method: str) -> Outcome:
        """Run a method, unless its files are there. A failure is told, and tried again next time."""
        folder = self._folder / method.replace(" ", "-").replace(",", "")
        folder.mkdir(exist_ok=True)
        files = {target: folder / f"{label(target)}.onnx" for target in self._settings.targets}
        # Through JSON, as what is read: a tuple comes back as a list.
        settings = json.loads(json.dumps(dataclasses.asdict(self._settings)))
        done = folder / "done.json"
        if done.exists():
            known = json.loads(done.read_text())
            if known["settings"] == settings:
                return Outcome(files=files, seconds=known["seconds"])
        start = time.perf_counter()
        try:
            models = self._models(method)
        except PlanishError as error:
            return Outcome(files={}, seconds=time.perf_counter() - start, failure=str(error))
        for target, path in files.items():
            models[label(target)].save(path)
        seconds = time.perf_counter() - start
        done.write_text(json.dumps({"seconds": seconds, "settings": settings}, indent=1))
        return Outcome(files=files, seconds=seconds)

    def _models(self, method: str) -> dict[str, planish.CompiledModel]:
        if method == GRADUAL:
            return self._gradual(self._folder / "gradual-state")
        # With and without distillation from the same state: what was found once need not be found again.
        state = self._folder / "one-shot-state"
        distill = "" if method == ONE_SHOT else f",{self._distill(_STAGES_TO_TWO)}"
        compiled = self._compile(f"canonicalize,{self._prune(*self._settings.targets)}{distill},fuse", state)
        return {**compiled.alternatives, label(max(self._settings.targets)): compiled}

    def _gradual(self, state: Path) -> dict[str, planish.CompiledModel]:
        """Rising targets on one way; each target's model is taken from it after its distillation."""
        targets = self._settings.targets
        stages = [stage for stage in sorted({*STAGES, *targets}) if stage <= max(targets)]
        way = ",".join(f"{self._prune(stage)},{self._distill()}" for stage in stages)
        snapshots = Snapshots()
        self._compile(f"canonicalize,{way}", state, snapshots)
        wanted = {label(target) for target in targets}
        return {
            name: planish.compile(model, "canonicalize,fuse")
            for name, model in snapshots.models.items()
            if name in wanted
        }

    def _prune(self, *targets: float) -> str:
        options = {
            "speedup": f"[{','.join(f'{target:g}' for target in targets)}]",
            "batch": self._task.batch,
            "sequence": self._task.sequence,
            "evaluations": self._settings.evaluations,
            "samples": self._settings.samples,
        }
        return f"prune{{{','.join(f'{name}={value}' for name, value in options.items())}}}"

    def _distill(self, stages: int = 1) -> str:
        return f"distill{{steps={stages * self._settings.steps},{self._task.distill}}}"

    def _compile(
        self, passes: str, state: Path | None = None, *instruments: Instrument
    ) -> planish.CompiledModel:
        with ProgressBars(self._console) as bars:
            return planish.compile(
                self._task.module,
                passes,
                example_inputs=self._task.example(),
                calibration=self._calibration,
                training=[self._task.training],
                cache=state,
                instruments=(bars, *instruments),
            )


def measure(task: Task, pruner: Pruner, methods: Sequence[str], console: Console) -> TaskRows:
    """Run the methods, then judge and time all of their files together with the dense one."""
    outcomes = {}
    for method in methods:
        outcomes[method] = pruner.pruned(method)
        said = outcomes[method].failure or f"{outcomes[method].seconds:.0f} s"
        console.print(f"{task.name}: {method}: {said}")
    files = {("dense", 1.0): pruner.dense()} | {
        (method, target): path
        for method, outcome in outcomes.items()
        for target, path in outcome.files.items()
    }
    sessions = {key: open_file(path) for key, path in files.items()}
    times = latencies(sessions, task.deployment_feeds())
    judged = {
        (method, target): Row(
            method=method,
            target=target,
            speedup=times[method, target].speedup_over(times["dense", 1.0]),
            accuracy=accuracy(sessions[method, target], task.test),
            megabytes=path.stat().st_size / 1e6,
        )
        for (method, target), path in files.items()
    }
    whole = judged.pop(("dense", 1.0))
    return TaskRows(
        name=task.name,
        title=task.title,
        batch=task.batch,
        sequence=task.sequence,
        tests=len(task.test["labels"]),
        dense_accuracy=whole.accuracy,
        dense_ms=times["dense", 1.0].median_ms,
        dense_megabytes=whole.megabytes,
        rows=sorted(judged.values(), key=lambda row: row.target),
        seconds={method: outcome.seconds for method, outcome in outcomes.items()},
        failures={method: outcome.failure for method, outcome in outcomes.items() if outcome.failure},
    )


def main() -> None:
    """Prune, measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name contains this; prints, writes no table")
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS, help="speed-ups; prints only")
    parser.add_argument("--epochs", type=int, help="of training the dense models; the tasks' own if absent")
    parser.add_argument("--steps", type=int, help="of each distillation; the tasks' own if absent")
    parser.add_argument("--evaluations", type=int, default=200, help="losses per search")
    parser.add_argument("--samples", type=int, default=128, help="that losses are measured on")
    parser.add_argument("--output", type=Path, default=Path("demo-output/pruning-tasks"), help="work folder")
    arguments = parser.parse_args()
    console = Console(width=120, highlight=False)
    found = []
    for name, make in TASKS.items():
        methods = [method for method in tasks_report.METHODS if arguments.only in f"{name}: {method}"]
        if not methods:
            continue
        folder = arguments.output / name
        folder.mkdir(parents=True, exist_ok=True)
        task = make(
            folder, arguments.epochs, lambda text, name=name: console.print(f"[dim]{name}: {text}[/dim]")
        )
        settings = Settings(
            steps=arguments.steps or task.steps,
            evaluations=arguments.evaluations,
            samples=arguments.samples,
            targets=tuple(sorted(arguments.targets)),
        )
        found.append(measure(task, Pruner(task, settings, folder, console), methods, console))
        console.print("\n".join(tasks_report.table_lines(found[-1])), soft_wrap=True)
    if not arguments.only and tuple(arguments.targets) == TARGETS:
        tasks_report.write(found, _RESULTS / "pruning_tasks.md")


if __name__ == "__main__":
    main()
