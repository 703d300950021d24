"""The tables and the plot of `pruning_tasks.py`: accuracy against measured speed-up."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnxruntime
from sentence_embeddings import processor

ONE_SHOT, ONE_SHOT_DISTILLED, GRADUAL = "one-shot", "one-shot, distilled", "gradual"
METHODS = (ONE_SHOT, ONE_SHOT_DISTILLED, GRADUAL)
_DIGITS = ("vit", "cnn")
_DENSE_GOAL, _LOSS_GOAL = 0.98, 0.01
_SPEEDUP_TOLERANCE = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One pruned file.

    Attributes:
        method: how it was made.
        target: the speed-up that was asked for.
        speedup: the dense model's median latency over its own, of the same rounds.
        accuracy: on the test samples.
        megabytes: of the file.
    """

    method: str
    target: float
    speedup: float
    accuracy: float
    megabytes: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskRows:
    """One task's files and the dense one they are compared with.

    Attributes:
        name: of the task.
        title: for headings.
        batch: samples of a timed call.
        sequence: tokens of a sample; 1 for images.
        tests: samples that accuracy is measured on.
        dense_accuracy: of the float model.
        dense_ms: its median latency.
        dense_megabytes: of its file.
        rows: by rising target.
        seconds: that each method took for all targets together.
        failures: the error of each method that gave no files.
    """

    name: str
    title: str
    batch: int
    sequence: int
    tests: int
    dense_accuracy: float
    dense_ms: float
    dense_megabytes: float
    rows: Sequence[Row]
    seconds: Mapping[str, float]
    failures: Mapping[str, str]


def table_lines(task: TaskRows) -> list[str]:
    """One task's table in Markdown."""
    size = f"batch {task.batch}" + (f", {task.sequence} tokens" if task.sequence > 1 else "")
    seconds = ", ".join(f"{method} {seconds:.0f} s" for method, seconds in task.seconds.items())
    return [
        f"## {task.title}",
        "",
        f"Dense: {task.dense_accuracy:.1%} of {task.tests} held-out samples, {task.dense_ms:.1f} ms "
        f"({size}), {task.dense_megabytes:.2f} MB. All targets together took: {seconds}.",
        "",
        "| target | method | measured | accuracy | points over dense | MB |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row.target:g}× | {row.method} | {row.speedup:.2f}× | {row.accuracy:.1%} "
            f"| {100 * (row.accuracy - task.dense_accuracy):+.1f} | {row.megabytes:.2f} |"
            for row in task.rows
        ),
        *(f"| | {method} | {failure} | | | |" for method, failure in task.failures.items()),
    ]


def goal_lines(tasks: Sequence[TaskRows]) -> list[str]:
    """What is asked for, and whether it holds."""
    lines = ["| goal | measured | met |", "|---|---|---|"]
    for task in tasks:
        if task.name not in _DIGITS:
            continue
        met = task.dense_accuracy >= _DENSE_GOAL
        lines.append(_goal(f"{task.title}: dense at least 98 %", f"{task.dense_accuracy:.1%}", met))
        loss = next(
            (
                task.dense_accuracy - row.accuracy
                for row in task.rows
                if (row.method, row.target) == (GRADUAL, 2)
            ),
            None,
        )
        measured = "no file" if loss is None else f"{-100 * loss:+.1f} points"
        met = loss is not None and loss <= _LOSS_GOAL
        lines.append(_goal(f"{task.title}: gradual at 2× within 1 point of dense", measured, met))
    rows = [row for task in tasks for row in task.rows]
    near = sum(abs(row.speedup / row.target - 1) <= _SPEEDUP_TOLERANCE for row in rows)
    met = near == len(rows) and not any(task.failures for task in tasks)
    lines.append(_goal("measured speed-up within 5 % of the target", f"{near} of {len(rows)} files", met))
    return lines


def _goal(text: str, measured: str, met: bool) -> str:
    return f"| {text} | {measured} | {'yes' if met else 'no'} |"


def write(tasks: Sequence[TaskRows], path: Path) -> None:
    """The tables as the repository keeps them, and the plot beside them.

    Raises:
        SystemExit: matplotlib is missing; the tables are written before.
    """
    plot = path.with_suffix(".svg")
    lines = [
        "# Accuracy against measured speed-up",
        "",
        f"{processor()}; onnxruntime {onnxruntime.__version__}, default options. Speed-up: the dense float "
        "model's median latency over the pruned one's, end to end, all files of a task in turns. *One-shot*: "
        "`prune` with all targets; *distilled*: three times the steps of a gradual stage after it; "
        "*gradual*: `prune` and `distill` at 1.25×, 1.5×, 2×, 3× and 4×, each from the model before. "
        "Calibrated and distilled on the training samples.",
        "",
        *goal_lines(tasks),
        "",
        f"![accuracy against measured speed-up]({plot.name})",
    ]
    for task in tasks:
        lines += ["", *table_lines(task)]
    lines += ["", "Written by `benchmarks/pruning_tasks.py`.", ""]
    path.write_text("\n".join(lines))
    draw(tasks, plot)


def draw(tasks: Sequence[TaskRows], path: Path) -> None:
    """Accuracy against measured speed-up, one panel for each task."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("no plot without matplotlib: pip install -e '.[bench]'") from None
    # The same figures give the same file: no date, no random identifiers.
    matplotlib.rcParams["svg.hashsalt"] = "planish"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(tasks), 3.6), layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axis, task in zip(axes, tasks, strict=True):
        axis.axhline(100 * task.dense_accuracy, color="0.6", linewidth=1, label="dense")
        for method, marker in zip(METHODS, "osD", strict=True):
            points = [(row.speedup, 100 * row.accuracy) for row in task.rows if row.method == method]
            if points:
                axis.plot(*zip(*points, strict=True), marker=marker, label=method)
        axis.set(title=task.title, xlabel="measured speed-up")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy, %")
    axes[0].legend()
    figure.savefig(path, metadata={"Date": None})
