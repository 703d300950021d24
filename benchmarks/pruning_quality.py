"""Quality against measured speed: ZipLM beside simpler criteria, depth pruning, 2SSP and Torch-Pruning.

Every method prunes the same model to the same speed-ups over the dense float model, which planish compiled
with ``canonicalize,fuse``. Then all files of one model and target are timed in turns in this process, in
plain onnxruntime, and judged. What counts is this last measurement, not what a method said of itself.

    python benchmarks/pruning_quality.py --torch-pruning FOLDER                # everything; writes results/
    python benchmarks/pruning_quality.py --models wikilm --targets 2 --methods ZipLM Taylor --evaluations 20

How to get FOLDER says ``torch_pruning_worker.py``; without it there are no such rows. The plot needs
matplotlib, which ``.[bench]`` has. The results in the repository are written if nothing is left out, or to
``--report``; otherwise tables are printed. Files, figures and search states are kept in ``--output``, and
what is there is not done again: an interrupted run goes on, and changed code wants a fresh folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import planish
import pruning_report
import pruning_subjects
import torch_pruning_worker
import wikilm
from planish.ir.errors import PlanishError
from planish.runtime.measure import interleaved_latency
from pruning_report import ZIPLM, Row, Section
from pruning_subjects import DENSE, OnnxFile, Subject
from rich.console import Console

TARGETS = (1.25, 1.5, 2.0, 3.0, 4.0)
_WIDTH = "prune{speedup=$speedup,$deployment,evaluations=$evaluations,samples=$samples,criterion="
_DEPTH = "drop-blocks{speedup=$speedup,$deployment,samples=$samples,method="
METHODS = {
    ZIPLM: _WIDTH + "obs}",
    "magnitude": _WIDTH + "magnitude}",
    "Wanda": _WIDTH + "wanda}",
    "Taylor": _WIDTH + "taylor}",
    "depth, greedy": _DEPTH + "greedy}",
    "depth, entropy": _DEPTH + "entropy}",
    "2SSP": "two-stage{speedup=$speedup,$deployment,samples=$samples}",
}
"""Each method's passes between ``canonicalize`` and ``fuse``."""
PEER = "Torch-Pruning"
LEFT_OUT = {"sentences-b8": (*(method for method in METHODS if method != ZIPLM), PEER)}
"""Models whose times alone matter: the same weights are compared at another batch size."""
_WORKER_SECONDS = 6 * 3600
_RESULTS = Path(__file__).parent / "results" / "pruning_quality.md"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the rows besides the models.

    Attributes:
        targets: speed-ups, rising.
        methods: names of `METHODS`, and `PEER`.
        evaluations: of the search for one target.
        samples: calibration sentences or windows; None for as many as suit the model.
        site: where Torch-Pruning is; None leaves it out.
        shared: where the language model is, if it was named.
        folder: where work is kept.
    """

    targets: tuple[float, ...]
    methods: tuple[str, ...]
    evaluations: int
    samples: int | None
    site: Path | None
    shared: Path | None
    folder: Path


class Work:
    """The files and figures of one model, kept as they are finished.

    Args:
        subject: the model.
        settings: what is done with it.
        say: takes a line on what was done.
    """

    def __init__(self, subject: Subject, settings: Settings, say: Callable[[str], None]) -> None:
        self._subject, self._settings, self._say = subject, settings, say
        self._folder = settings.folder / subject.name
        self._folder.mkdir(parents=True, exist_ok=True)
        self.dense = self._folder / "dense.onnx"
        if not self.dense.exists():
            planish.compile(subject.graph, DENSE, target=subject.target).save(self.dense)

    def rows(self) -> Iterator[Row]:
        """A row for each method and target, in the tables' order; what has no file says why."""
        for method in self._settings.methods:
            if method in LEFT_OUT.get(self._subject.name, ()):
                continue
            if method in METHODS:
                yield from self._method_rows(method)
            elif self._settings.site is not None:
                for variant in torch_pruning_worker.variants(self._subject.name):
                    yield from self._peer_rows(variant)

    def _method_rows(self, method: str) -> Iterator[Row]:
        for target in self._settings.targets:
            known = self._known(method, target)
            yield known or self._pruned(method, target)

    def _pruned(self, method: str, target: float) -> Row:
        """Compile, save, judge and note; a refusal by the compiler is the row's outcome."""
        start = time.perf_counter()
        passes = f"canonicalize,{self._passes(method, target)},fuse"
        try:
            compiled = planish.compile(
                self._subject.graph,
                passes,
                calibration=self._subject.calibration,
                target=self._subject.target,
                # One folder for all targets of a method: they share its levels, times and losses.
                cache=self._folder / "state" / _slug(method),
            )
        except PlanishError as error:
            self._say(f"{self._subject.name}: {method} {target:g}×: {error.message}")
            return Row(method=method, target=target, failure=error.message)
        seconds = time.perf_counter() - start
        file = self._file(method, target)
        compiled.save(file)
        return self._note(Row(method=method, target=target, file=file.name, seconds=seconds))

    def _passes(self, method: str, target: float) -> str:
        return string.Template(METHODS[method]).substitute(
            speedup=f"{target:g}",
            deployment=f"batch={self._subject.batch},sequence={self._subject.sequence}",
            evaluations=self._settings.evaluations,
            samples=self._subject.losses,
        )

    def _peer_rows(self, variant: str) -> Iterator[Row]:
        """Torch-Pruning in a process of its own; it finds all missing targets of a variant together."""
        method = f"{PEER}: {variant}"
        known = {target: self._known(method, target) for target in self._settings.targets}
        missing = [target for target, row in known.items() if row is None]
        found = self._run_peer(method, variant, missing) if missing else {}
        for target, row in known.items():
            yield row or found[target]

    def _run_peer(self, method: str, variant: str, targets: Sequence[float]) -> dict[float, Row]:
        job = self._folder / _slug(method)
        shutil.rmtree(job, ignore_errors=True)
        job.mkdir()
        shutil.copy(self.dense, job / "dense.onnx")
        order = {
            "subject": self._subject.name,
            "variant": variant,
            "targets": list(targets),
            "samples": self._settings.samples,
            "shared": None if self._settings.shared is None else str(self._settings.shared.resolve()),
        }
        (job / "job.json").write_text(json.dumps(order))
        start = time.perf_counter()
        process = subprocess.run(
            [sys.executable, torch_pruning_worker.__file__, str(job), "--site", str(self._settings.site)],
            stderr=subprocess.PIPE,
            text=True,
            timeout=_WORKER_SECONDS,
            check=False,
        )
        seconds = (time.perf_counter() - start) / len(targets)
        why = (process.stderr.strip().splitlines() or ["no message"])[-1]
        rows = {target: self._peer_row(method, target, job, seconds, why) for target in targets}
        shutil.rmtree(job)
        return rows

    def _peer_row(self, method: str, target: float, job: Path, seconds: float, why: str) -> Row:
        answer = job / f"{target:g}.json"
        result = json.loads(answer.read_text()) if answer.exists() else {"failure": why}
        if "failure" in result:
            self._say(f"{self._subject.name}: {method} {target:g}×: {result['failure']}")
            return Row(method=method, target=target, failure=result["failure"])
        file = self._file(method, target)
        # Copied: two targets may have the same file.
        shutil.copy(job / result["file"], file)
        return self._note(Row(method=method, target=target, file=file.name, seconds=seconds))

    def _note(self, row: Row) -> Row:
        """Judge the file and keep the figures, from which on the row counts as finished."""
        path = self._folder / row.file
        judged = dataclasses.replace(
            row, quality=self._subject.judge(OnnxFile(path)), megabytes=path.stat().st_size / 1e6
        )
        figures = path.with_suffix(".json")
        partial = figures.with_suffix(".partial")
        partial.write_text(json.dumps(dataclasses.asdict(judged)))
        partial.replace(figures)
        metric = self._subject.metric
        self._say(
            f"{self._subject.name}: {row.method} {row.target:g}×: {metric.name} "
            f"{metric.text(judged.quality[metric.name])}, {row.seconds:.0f} s"
        )
        return judged

    def _known(self, method: str, target: float) -> Row | None:
        figures = self._file(method, target).with_suffix(".json")
        return Row(**json.loads(figures.read_text())) if figures.exists() else None

    def _file(self, method: str, target: float) -> Path:
        return self._folder / f"{_slug(method)}-{target:g}.onnx"

    def timed(self, rows: Sequence[Row], repeats: int) -> list[Row]:
        """The rows with their speed-ups: all files of a target in turns with the dense one."""
        feeds = self._subject.deployment_feeds()
        timed: dict[tuple[str, float], Row] = {}
        for target in dict.fromkeys(row.target for row in rows):
            files = {row.method: row for row in rows if row.target == target and not row.failure}
            runs = {"dense": OnnxFile(self.dense).timed(feeds)}
            runs |= {method: OnnxFile(self._folder / row.file).timed(feeds) for method, row in files.items()}
            latency = interleaved_latency(runs, repeats=repeats, burst=1)
            for method, row in files.items():
                speedup = latency[method].speedup_over(latency["dense"])
                timed[method, target] = dataclasses.replace(
                    row, speedup=speedup, milliseconds=latency[method].median_ms
                )
        return [timed.get((row.method, row.target), row) for row in rows]


def _slug(name: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in name.lower())


def sections(settings: Settings, arguments: argparse.Namespace, say: Callable[[str], None]) -> list[Section]:
    """Everything pruned first, one model after another; then everything timed, when nothing else runs."""
    found = wikilm.WikiLM.find(arguments.shared)
    prepared: list[tuple[Subject, Work, list[Row]]] = []
    for name in arguments.models:
        subject = pruning_subjects.subject(name, found, samples=settings.samples, windows=arguments.windows)
        work = Work(subject, settings, say)
        prepared.append((subject, work, list(work.rows())))
    finished = []
    for subject, work, rows in prepared:
        say(f"{subject.name}: timing")
        finished.append(
            Section(
                title=subject.title,
                metrics=subject.metrics,
                dense=subject.judge(OnnxFile(work.dense)),
                rows=work.timed(rows, arguments.repeats),
            )
        )
    return finished


def header(settings: Settings, arguments: argparse.Namespace) -> str:
    """What was done, in a paragraph."""
    return (
        f"All files of a model and target are timed together with the dense model in {arguments.repeats} "
        "rounds of one call each; a speed-up is the median of the rounds'. Each search looks at "
        f"{settings.evaluations} candidates, and at a quarter as many where it is repeated near the "
        "goal. Calibration is on the calibration text; the sentence model is judged on the benchmark's 240 "
        f"sentences, the language model on {arguments.windows} windows of its evaluation text. Nothing is "
        "trained after pruning. At batch 8 only ZipLM is run."
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    wikilm.add_arguments(parser)
    every = (*METHODS, PEER)
    parser.add_argument("--models", nargs="+", choices=pruning_subjects.NAMES, default=pruning_subjects.NAMES)
    parser.add_argument("--targets", nargs="+", type=float, default=TARGETS, help="speed-ups")
    parser.add_argument("--methods", nargs="+", choices=every, default=every, metavar="METHOD")
    parser.add_argument("--torch-pruning", type=Path, metavar="FOLDER", help="where it is installed")
    parser.add_argument("--evaluations", type=int, default=50, help="of the search for one target")
    parser.add_argument("--calibration", type=int, help="sentences or windows")
    parser.add_argument("--repeats", type=int, default=24, help="rounds in which each file is timed")
    parser.add_argument("--output", type=Path, default=Path("pruning-output"), help="where the work is kept")
    parser.add_argument("--report", type=Path, help="Markdown file for the tables; the plot comes beside it")
    return parser.parse_args()


def main() -> None:
    """Prune, time, and write the tables and the plot."""
    arguments = parse_arguments()
    settings = Settings(
        targets=tuple(sorted(arguments.targets)),
        methods=tuple(method for method in (*METHODS, PEER) if method in arguments.methods),
        evaluations=arguments.evaluations,
        samples=arguments.calibration,
        site=arguments.torch_pruning,
        shared=arguments.shared,
        folder=arguments.output,
    )
    console = Console(width=160)
    is_whole = (
        settings.site is not None
        and set(arguments.models) == set(pruning_subjects.NAMES)
        and set(settings.targets) == set(TARGETS)
        and settings.methods == (*METHODS, PEER)
    )
    path = arguments.report or (_RESULTS if is_whole else None)
    if path is not None:
        pruning_report.require_matplotlib()
    finished = sections(settings, arguments, lambda line: console.print(f"[dim]{line}[/dim]"))
    image = "" if path is None else path.with_suffix(".svg").name
    lines = pruning_report.lines(finished, header(settings, arguments), image)
    if path is None:
        print("\n".join(lines))
        return
    path.write_text("\n".join(lines))
    pruning_report.plot(finished, path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
