"""What pruning cost at which speed: verdicts, tables and a plot for `pruning_quality`."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnxruntime
from pruning_subjects import Metric
from sentence_embeddings import processor

ZIPLM = "ZipLM"
CLOSE = 0.05
"""Largest relative deviation from a target at which it counts as met."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One method at one target.

    Attributes:
        method: its name.
        target: the speed-up asked for.
        file: name of the pruned file; empty after a failure.
        quality: figures by the metric's name.
        megabytes: of the file.
        seconds: that pruning took.
        failure: why there is no file.
        speedup: over the dense model, measured in turns with it.
        milliseconds: of one call.
    """

    method: str
    target: float
    file: str = ""
    quality: Mapping[str, float] = dataclasses.field(default_factory=dict)
    megabytes: float = math.nan
    seconds: float = math.nan
    failure: str = ""
    speedup: float = math.nan
    milliseconds: float = math.nan

    @property
    def deviation(self) -> float:
        """Of the measured speed-up from the target, relative."""
        return self.speedup / self.target - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """All rows of one model.

    Attributes:
        title: of the model and its deployment.
        metrics: the first is the one that methods are compared by.
        dense: the dense model's figures.
        rows: all methods at all targets.
    """

    title: str
    metrics: tuple[Metric, ...]
    dense: Mapping[str, float]
    rows: Sequence[Row]

    @property
    def metric(self) -> Metric:
        """What methods are compared by."""
        return self.metrics[0]

    @property
    def methods(self) -> list[str]:
        """In order."""
        return list(dict.fromkeys(row.method for row in self.rows))

    @property
    def targets(self) -> list[float]:
        """Rising."""
        return sorted({row.target for row in self.rows})

    def row(self, method: str, target: float) -> Row | None:
        """The row, if that method was run."""
        return next((row for row in self.rows if (row.method, row.target) == (method, target)), None)

    def value(self, row: Row) -> float:
        """The figure that methods are compared by."""
        return row.quality[self.metric.name]

    def curve(self, method: str) -> tuple[list[float], list[float]]:
        """Measured speed-ups, rising from the dense model's 1, and the figures there."""
        points = [(row.speedup, self.value(row)) for row in self.rows if row.method == method and row.file]
        speedups, values = zip(*sorted([(1.0, self.dense[self.metric.name]), *points]), strict=True)
        return list(speedups), list(values)

    def dominating(self, ours: Row) -> list[str]:
        """Methods with a model, for whichever target, that is at least as fast and at least as good."""
        return list(
            dict.fromkeys(
                row.method
                for row in self.rows
                if row.file
                and row.method != ours.method
                and row.speedup >= ours.speedup
                and not self.metric.better(self.value(ours), self.value(row))
            )
        )


def lines(sections: Sequence[Section], header: str, image: str) -> list[str]:
    """The whole document.

    Args:
        sections: one for each model.
        header: what was done.
        image: file name of the plot beside it; empty for none.
    """
    found = [
        "# Quality of pruned models at equal measured speed",
        "",
        f"{processor()}; onnxruntime {onnxruntime.__version__}, default threads. Speed-ups are those of ONNX "
        f"files in plain onnxruntime, over the dense float model. {header}",
    ]
    if image:
        found += ["", f"![Quality against measured speed-up]({image})"]
    for section in sections:
        dense = ", ".join(
            f"{metric.name} {metric.text(section.dense[metric.name])}" for metric in section.metrics
        )
        found += ["", f"## {section.title}", "", f"Dense: {dense}.", ""]
        if ZIPLM in section.methods and len(section.methods) > 1:
            found += [*verdict(section), ""]
        found += [*overview(section), "", *table(section)]
    return [*found, "", "Written by `benchmarks/pruning_quality.py --torch-pruning`.", ""]


def verdict(section: Section) -> Iterator[str]:
    """For each target: whether ZipLM met it, and which methods it beats.

    A method may have landed at another speed than ZipLM, so the last but one column names those that have a
    model which is at least as fast as ZipLM's and at least as good.
    """
    name = section.metric.name
    yield (
        f"| target | ZipLM measured | within {CLOSE:.0%} | {name} | beats | does not beat "
        "| as fast and as good | did not reach the target |"
    )
    yield "|---" * 8 + "|"
    for target in section.targets:
        ours = section.row(ZIPLM, target)
        assert ours is not None
        if ours.failure:
            yield f"| {target:g}× | {ours.failure} | | | | | | |"
            continue
        value = section.value(ours)
        others = [row for row in section.rows if row.target == target and row.method != ZIPLM]
        reached = {row.method: row for row in others if not row.failure}
        beaten = [
            method for method, row in reached.items() if section.metric.better(value, section.value(row))
        ]
        cells = [
            f"{target:g}×",
            f"{ours.speedup:.2f}× ({ours.deviation:+.1%})",
            "yes" if abs(ours.deviation) <= CLOSE else "no",
            section.metric.text(value),
            f"{len(beaten)} of {len(reached)}",
            "; ".join(_with_value(section, row) for m, row in reached.items() if m not in beaten) or "none",
            "; ".join(section.dominating(ours)) or "none",
            "; ".join(row.method for row in others if row.failure) or "none",
        ]
        yield f"| {' | '.join(cells)} |"


def _with_value(section: Section, row: Row) -> str:
    return f"{row.method} ({section.metric.text(section.value(row))} at {row.speedup:.2f}×)"


def overview(section: Section) -> Iterator[str]:
    """Methods down, targets across: the figure and the measured speed-up."""
    yield f"| {section.metric.name} | " + " | ".join(f"{target:g}×" for target in section.targets) + " |"
    yield "|---" * (1 + len(section.targets)) + "|"
    for method in section.methods:
        cells = []
        for target in section.targets:
            row = section.row(method, target)
            if row is None or row.failure:
                cells.append("–")
            else:
                cells.append(f"{section.metric.text(section.value(row))} ({row.speedup:.2f}×)")
        yield f"| {method} | {' | '.join(cells)} |"


def table(section: Section) -> Iterator[str]:
    """Every figure of every row."""
    names = [metric.name for metric in section.metrics]
    yield f"| target | method | speed-up | off | ms | {' | '.join(names)} | MB | s |"
    yield "|---" * (7 + len(names)) + "|"
    for target in section.targets:
        for method in section.methods:
            row = section.row(method, target)
            if row is None:
                continue
            if row.failure:
                yield f"| {target:g}× | {method} | {row.failure} |" + " |" * (5 + len(names))
                continue
            cells = [
                f"{target:g}×",
                method,
                f"{row.speedup:.2f}×",
                f"{row.deviation:+.1%}",
                f"{row.milliseconds:.2f}",
                *(metric.text(row.quality[metric.name]) for metric in section.metrics),
                f"{row.megabytes:.1f}",
                f"{row.seconds:.0f}",
            ]
            yield f"| {' | '.join(cells)} |"


def require_matplotlib() -> None:
    """Before the work of hours whose result it is to draw.

    Raises:
        SystemExit: it is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("the plot needs matplotlib: pip install -e '.[bench]'")


def plot(sections: Sequence[Section], path: Path) -> None:
    """Quality against measured speed-up, one panel for each model, one line for each method."""
    import matplotlib

    matplotlib.use("svg")
    # The same figures give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "planish"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(sections), figsize=(5.5 * len(sections), 5), squeeze=False)
    methods = list(dict.fromkeys(method for section in sections for method in section.methods))
    colours = pyplot.get_cmap("tab20")
    for panel, section in zip(axes[0], sections, strict=True):
        for number, method in enumerate(methods):
            if method not in section.methods:
                continue
            ours = method == ZIPLM
            panel.plot(
                *section.curve(method),
                marker="o",
                markersize=4,
                label=method,
                color="black" if ours else colours(number % 20),
                linewidth=2.5 if ours else 1.2,
                zorder=3 if ours else 2,
            )
        panel.set(title=section.title, xlabel="measured speed-up over dense", ylabel=section.metric.name)
        if not section.metric.higher_is_better:
            panel.set_yscale("log")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
