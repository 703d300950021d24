"""Pruning together with other passes: what each of them cost and gained on one model.

    python benchmarks/pruning_composition.py                                   # writes results/
    python benchmarks/pruning_composition.py --models sentences-b1 --speedups 2 --distill 0

The dense float model is pruned to a measured speed-up, with or without distillation. Each of these models is
kept; from it come the rows: as it is, or rotated (where the norms allow that) and quantised by GPTQ. Files
run in plain onnxruntime; those of one model are timed in turns. Speed-ups are over the dense float model.

Errors are those of `planish.compile`'s contract check: the graph after a pass against the graph before it, on
one call of the deployment. Files and figures are kept in ``--output``, and what is there is not done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import onnx_ir as ir
import onnxruntime
import planish
import pruning_subjects
import wikilm
from planish.ir import clone, load, save
from planish.ir.errors import PlanishError
from planish.passes import PassResult
from planish.passes.infrastructure.instruments import Instrument, Invocation
from planish.runtime.calibration import CalibrationData
from planish.runtime.measure import interleaved_latency
from pruning_subjects import OnnxFile, Subject
from rich.console import Console
from sentence_embeddings import processor

Kept = TypeVar("Kept", "Base", "Row")
_RESULTS = Path(__file__).parent / "results" / "pruning_composition.md"
_ROTATE = "fold-norms,rotate{rotations=[R1,R2],kind=random-hadamard}"
ROTATIONS = {"wikilm": _ROTATE}
"""Of models whose norms are RMS norms before the blocks; the sentence model's come after."""
FLOAT = "fuse"
"""What a row has behind its base that is not quantised."""
QUANTIZE = {
    "W4A16": "quantize{scheme=W4A16_ASYM,group_size=32,algorithm=gptq,embeddings=false}",
    "W8A8": "quantize{scheme=W8A8,activations=token,algorithm=gptq,embeddings=false}",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the rows besides the models.

    Attributes:
        speedups: that models are pruned to.
        evaluations: of the search for one target.
        steps: of the distillation after pruning; 0 for none.
    """

    speedups: tuple[float, ...]
    evaluations: int
    steps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """A canonical float model that rows start from.

    Attributes:
        name: what was done to the dense model, in short; empty for the dense model itself.
        file: of the model; empty for the dense model, and after a failure.
        asked: the text of the pipeline that it came from.
        reports: of that pipeline's passes, as plain data.
        failure: why there is no model.
    """

    name: str = ""
    file: str = ""
    asked: str = "canonicalize"
    reports: Sequence[Mapping[str, Any]] = ()
    failure: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One file.

    Attributes:
        name: what was done to the dense model, in short.
        passes: those after the base, as text.
        asked: the text of the whole pipeline.
        file: of the compiled model; empty after a failure.
        quality: figures by the metric's name.
        megabytes: of the file.
        reports: of its passes, as plain data; of its base's too where only fusion follows.
        failure: why there is no file.
        milliseconds: of one call.
        speedup: over the first row.
    """

    name: str
    passes: str
    asked: str
    file: str = ""
    quality: Mapping[str, float] = dataclasses.field(default_factory=dict)
    megabytes: float = 0.0
    reports: Sequence[Mapping[str, Any]] = ()
    failure: str = ""
    milliseconds: float = 0.0
    speedup: float = 0.0


def rows_of(base: Base, rotate: str) -> Iterator[Row]:
    """The rows that start from a model, without figures: as it is, and quantised."""
    before = f"{base.name} → " if base.name else ""
    middle, how = (f"{rotate},fuse", "rotate → GPTQ") if rotate else ("fuse", "GPTQ")
    rows = {base.name or "dense": FLOAT}
    rows |= {f"{before}{how} {scheme}": f"{middle},{quantize}" for scheme, quantize in QUANTIZE.items()}
    for name, passes in rows.items():
        yield Row(name=name, passes=passes, asked=f"{base.asked},{passes}")


class Snapshots(Instrument):
    """Keeps the model as pruning and distillation left it, by the pass's name."""

    def __init__(self) -> None:
        self.models: dict[str, ir.Model] = {}

    def after(self, invocation: Invocation, model: ir.Model, result: PassResult) -> None:
        """Keep it."""
        del result
        if invocation.pass_.name in ("prune", "distill"):
            self.models[invocation.pass_.name] = clone(model)


class Work:
    """The files and figures of one model, kept as they are finished.

    Args:
        subject: the model.
        folder: for its files.
        say: takes a line on what was done.
    """

    def __init__(self, subject: Subject, folder: Path, say: Callable[[str], None]) -> None:
        self._subject, self._folder, self._say = subject, folder, say
        self._folder.mkdir(parents=True, exist_ok=True)

    def bases(self, settings: Settings) -> Iterator[Base]:
        """The dense model, and what pruning and distillation make of it."""
        yield Base()
        for speedup in settings.speedups:
            # Channels in the groups that share a scale.
            asked = (
                f"canonicalize,prune{{speedup={speedup:g},batch={self._subject.batch},"
                f"sequence={self._subject.sequence},multiple=32,evaluations={settings.evaluations},"
                f"samples={self._subject.losses}}}"
            )
            names = {"prune": f"prune {speedup:g}×"}
            if settings.steps:
                asked += f",distill{{steps={settings.steps}}}"
                names["distill"] = f"prune {speedup:g}× → distill"
            known = [self._known(Base, name, asked) for name in names.values()]
            yield from [base for base in known if base] if all(known) else self._pruned(names, asked)

    def _pruned(self, names: Mapping[str, str], asked: str) -> Iterator[Base]:
        """One run of the pipeline gives a model for each pass that is named."""
        snapshots = Snapshots()
        try:
            compiled = self._compile(self._subject.graph, asked, snapshots)
        except PlanishError as error:
            self._say(f"{self._subject.name}: {asked}: {error.message}")
            yield Base(name=names["prune"], asked=asked, failure=error.message)
            return
        reports = compiled.report.as_dict()["passes"]
        for pass_name, name in names.items():
            file = self._path(name, "-canonical.onnx")
            save(snapshots.models[pass_name], file)
            end = next(i for i, report in enumerate(reports) if report["name"] == pass_name) + 1
            yield self._keep(Base(name=name, file=file.name, asked=asked, reports=reports[:end]))

    def finished(self, base: Base, row: Row) -> Row:
        """The row with its file and all figures but those of time."""
        if base.failure:
            return dataclasses.replace(row, failure=base.failure)
        known = self._known(Row, row.name, row.asked)
        if known is not None:
            return known
        graph = load(self._folder / base.file) if base.file else self._subject.graph
        try:
            compiled = self._compile(graph, f"canonicalize,{row.passes}")
        except PlanishError as error:
            self._say(f"{self._subject.name}: {row.name}: {error.message}")
            return dataclasses.replace(row, failure=error.message)
        file = self._path(row.name, ".onnx")
        compiled.save(file)
        reports = compiled.report.as_dict()["passes"]
        if row.passes == FLOAT:
            reports = [*base.reports, *reports]
        metric = self._subject.metric
        quality = self._subject.judge(OnnxFile(file))
        self._say(f"{self._subject.name}: {row.name}: {metric.name} {metric.text(quality[metric.name])}")
        return self._keep(
            dataclasses.replace(
                row,
                file=file.name,
                quality=quality,
                megabytes=file.stat().st_size / 1e6,
                reports=reports,
            )
        )

    def _compile(self, graph: ir.Model, passes: str, *instruments: Instrument) -> planish.CompiledModel:
        names = {value.name for value in graph.graph.inputs}
        call = {name: array for name, array in self._subject.deployment_feeds().items() if name in names}
        return planish.compile(
            graph,
            passes,
            # With the decoder's cache, which calls may leave out.
            example_inputs=next(iter(CalibrationData.read([call], graph, None))),
            calibration=self._subject.calibration,
            target=self._subject.target,
            check="contract",
            cache=self._folder / "state",
            instruments=instruments,
        )

    def _path(self, name: str, suffix: str) -> Path:
        return self._folder / f"{''.join(c if c.isalnum() else '-' for c in name.lower())}{suffix}"

    def _keep(self, entry: Kept) -> Kept:
        """Write its figures, from which on it counts as finished."""
        figures = self._path(entry.name, f"-{type(entry).__name__.lower()}.json")
        partial = figures.with_suffix(".partial")
        partial.write_text(json.dumps(dataclasses.asdict(entry)))
        partial.replace(figures)
        return entry

    def _known(self, kind: type[Kept], name: str, asked: str) -> Kept | None:
        """What was finished before by the same pipeline."""
        figures = self._path(name, f"-{kind.__name__.lower()}.json")
        if not figures.exists():
            return None
        entry = kind(**json.loads(figures.read_text()))
        return entry if entry.asked == asked else None

    def timed(self, rows: Sequence[Row], repeats: int) -> list[Row]:
        """With the time of a call, all files in turns."""
        feeds = self._subject.deployment_feeds()
        files = {row.name: OnnxFile(self._folder / row.file).timed(feeds) for row in rows if row.file}
        latency = interleaved_latency(files, repeats=repeats, burst=1)
        dense = latency[rows[0].name]
        return [
            dataclasses.replace(
                row, milliseconds=latency[row.name].median_ms, speedup=latency[row.name].speedup_over(dense)
            )
            if row.file
            else row
            for row in rows
        ]


def lines(subject: Subject, rows: Sequence[Row]) -> Iterator[str]:
    """One model's tables."""
    metrics = subject.metrics
    yield from ("", f"## {subject.title}", "")
    yield f"| pipeline | {' | '.join(metric.name for metric in metrics)} | MB | of dense | speed-up | ms |"
    yield "|---" * (5 + len(metrics)) + "|"
    for row in rows:
        if row.failure:
            yield f"| {row.name} | {row.failure} |" + " |" * (3 + len(metrics))
            continue
        cells = [
            row.name,
            *(metric.text(row.quality[metric.name]) for metric in metrics),
            f"{row.megabytes:.1f}",
            f"{row.megabytes / rows[0].megabytes:.0%}",
            f"{row.speedup:.2f}×",
            f"{row.milliseconds:.2f}",
        ]
        yield f"| {' | '.join(cells)} |"
    yield from ("", "What each pass did, cost and gained:", "")
    yield "| pipeline | pass | covered | weights, MB | nodes | s | cosine to before, mean | KL to before |"
    yield "|---" * 8 + "|"
    for row in rows:
        if not row.failure:
            yield from pass_lines(row)


def pass_lines(row: Row) -> Iterator[str]:
    """A line for each pass of a pipeline, but for what every pipeline begins with."""
    for report in row.reports:
        if report["name"] == "canonicalize":
            continue
        coverage = report["coverage"]
        covered = f"{coverage['covered']} of {coverage['total']} {coverage['unit']}" if coverage else ""
        weights = f"{report['weight_bytes_before'] / 1e6:.1f} → {report['weight_bytes_after'] / 1e6:.1f}"
        error = next(
            (error for name, error in report["errors"].items() if not name.startswith("present")), None
        )
        cells = [
            row.name,
            report["name"],
            covered,
            weights,
            f"{report['nodes_before']} → {report['nodes_after']}",
            f"{report['seconds']:.1f}",
            "" if error is None else f"{error['cosine_mean']:.5f}",
            "" if error is None or error["kl_divergence"] is None else f"{error['kl_divergence']:.4f}",
        ]
        yield f"| {' | '.join(cells)} |"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    wikilm.add_arguments(parser)
    names = ("wikilm", "sentences-b1")
    parser.add_argument("--models", nargs="+", choices=names, default=names[:1])
    parser.add_argument("--speedups", nargs="+", type=float, default=(1.5, 2.0))
    parser.add_argument("--distill", type=int, default=200, help="steps of a distillation after pruning")
    parser.add_argument("--evaluations", type=int, default=50, help="of the search for one target")
    parser.add_argument("--calibration", type=int, help="sentences or windows")
    parser.add_argument("--repeats", type=int, default=32, help="rounds in which each file is timed")
    parser.add_argument("--output", type=Path, default=Path("composition-output"), help="where work is kept")
    parser.add_argument("--report", type=Path, default=_RESULTS, help="Markdown file for the tables")
    return parser.parse_args()


def main() -> None:
    """Compile, time, and write the tables."""
    arguments = parse_arguments()
    settings = Settings(
        speedups=tuple(sorted(arguments.speedups)),
        evaluations=arguments.evaluations,
        steps=arguments.distill,
    )
    console = Console(width=160)
    found = wikilm.WikiLM.find(arguments.shared)
    document = [
        "# Pruning together with rotation and quantisation",
        "",
        f"{processor()}; onnxruntime {onnxruntime.__version__}, default threads. Speed-ups are over the "
        f"dense float model, all files of a model timed in {arguments.repeats} rounds of one call each; "
        "medians of the rounds'. "
        "Calibration is on the calibration text; the sentence model is judged on the benchmark's 240 "
        f"sentences, the language model on {arguments.windows} windows of other text. Distillations have "
        f"{arguments.distill} steps. "
        "*Cosine* and *KL to before*: the graph after a pass against the one before it.",
    ]
    for name in arguments.models:
        subject = pruning_subjects.subject(
            name, found, samples=arguments.calibration, windows=arguments.windows
        )
        work = Work(subject, arguments.output / name, lambda line: console.print(f"[dim]{line}[/dim]"))
        rotate = ROTATIONS.get(name, "")
        rows = [work.finished(base, row) for base in work.bases(settings) for row in rows_of(base, rotate)]
        document += lines(subject, work.timed(rows, arguments.repeats))
    arguments.report.write_text(
        "\n".join([*document, "", "Written by `benchmarks/pruning_composition.py`.", ""])
    )


if __name__ == "__main__":
    main()
