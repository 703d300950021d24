"""What structured pruning costs: seconds and memory of its phases, for a random encoder of BERT-base's size.

The encoder (12 layers, hidden size 768, FFN 3072, random weights) is written as ONNX, and a fresh process
prunes it to twice its speed with `prune`. Every phase is timed where the pass calls it:

- *latency table*: timing every level of every kind of layer on the target;
- *database*: running the model, collecting moments, pruning every group through its levels, writing files;
- *search*: losses of stitched candidates, coefficients, the dynamic programme;
- *end-to-end latency*: timing whole candidates against the original.

Memory is the process's resident set, sampled while a phase runs; it is what the process holds in all, weights
included. What was measured is written down every second, and the pass keeps its own state, so that a run that
was interrupted goes on where it was when it is started again with the same ``--state``.

    python benchmarks/pruning_cost.py                         # writes benchmarks/results/pruning_cost.md
    python benchmarks/pruning_cost.py --quick                 # a small encoder; prints
    python benchmarks/pruning_cost.py --state FOLDER          # can be interrupted
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import planish
import torch
import transformers
from planish.ir import save
from rich.console import Console
from rich.table import Table
from sentence_embeddings import processor

RESULTS = Path(__file__).parent / "results" / "pruning_cost.md"
VOCABULARY = 30522
_EVERY_SECONDS = 0.02
_WRITTEN_EVERY = 1.0


@dataclasses.dataclass(frozen=True)
class Size:
    """An encoder, its calibration data, and the search."""

    layers: int = 12
    hidden: int = 768
    inner: int = 3072
    heads: int = 12
    vocabulary: int = VOCABULARY
    samples: int = 128
    sequence: int = 128
    evaluations: int = 100
    speedup: float = 2.0

    @property
    def passes(self) -> str:
        """The pipeline that is measured."""
        return (
            f"canonicalize,prune{{speedup={self.speedup},batch=1,sequence={self.sequence},"
            f"evaluations={self.evaluations},samples=32}}"
        )


QUICK = Size(
    layers=2,
    hidden=64,
    inner=256,
    heads=4,
    vocabulary=500,
    samples=16,
    sequence=64,
    evaluations=10,
    speedup=1.2,
)

_PASS = "planish.passes.prune"
PHASES = {
    "latency table": (f"{_PASS}.time_goal", "measured_table"),
    "database": (f"{_PASS}.prune", "build_database"),
    "search": (f"{_PASS}.candidates", "Candidates.find"),
    "end-to-end latency": (f"{_PASS}.deployment", "Deployment.measure"),
}
"""Where the pass calls each of its phases."""
PARTS = {
    "running the model": ("planish.runtime.calibration.stream", "ActivationStream.advance"),
    "moments": (f"{_PASS}.consumers", "Moments.update"),
    "order of removal": (f"{_PASS}.group_levels", "removal"),
    "refits of all levels": (f"{_PASS}.group_levels", "refits"),
    "files": (f"{_PASS}.database", "_Job.write"),
}
"""The parts of the database."""


class Meter:
    """Adds up seconds and notes the largest resident set of whatever is running, and writes both down.

    Args:
        path: of the notes; those of a run before are gone on with.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.notes: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
        self._running: list[tuple[str, float]] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self._write()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Note what the body takes under this name."""
        # Workers run beside the model: what began last need not end first.
        begun = (name, time.perf_counter())
        with self._lock:
            self._running.append(begun)
            note = self.notes.setdefault(name, {"seconds": 0.0, "peak": 0.0, "calls": 0})
        try:
            yield
        finally:
            with self._lock:
                self._running.remove(begun)
                note["seconds"] += time.perf_counter() - begun[1]
                note["calls"] += 1

    def wrap(self, name: str, module: str, attribute: str, *, announce: bool) -> None:
        """Measure a function or method of the package from now on, wherever it is called from.

        Raises:
            AttributeError: it is not there: the package has changed.
        """
        owner: Any = importlib.import_module(module)
        *path, last = attribute.split(".")
        owner = functools.reduce(getattr, path, owner)
        setattr(owner, last, self._measured(name, getattr(owner, last), announce))

    def _measured(self, name: str, function: Callable[..., Any], announce: bool) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            if announce:
                print(f"{name} …", flush=True)
            with self.measure(name):
                result = function(*arguments, **options)
            if announce:
                print(f"{name}: {self.notes[name]['seconds']:.1f} s so far", flush=True)
            return self._each(name, result) if isinstance(result, Iterator) else result

        return call

    def _each(self, name: str, items: Iterator[Any]) -> Iterator[Any]:
        """A generator works when it is asked for the next item."""
        end = object()
        while True:
            with self.measure(name):
                item = next(items, end)
            if item is end:
                return
            yield item

    def _sample(self) -> None:
        written = time.perf_counter()
        while not self._stop.wait(_EVERY_SECONDS):
            resident = resident_bytes()
            with self._lock:
                for name, _ in self._running:
                    self.notes[name]["peak"] = max(self.notes[name]["peak"], resident)
            if time.perf_counter() - written > _WRITTEN_EVERY:
                self._write()
                written = time.perf_counter()

    def _write(self) -> None:
        """What is running counts with what it took so far, in case the process is killed."""
        with self._lock:
            notes = {name: dict(note) for name, note in self.notes.items()}
            for name, start in self._running:
                notes[name]["seconds"] += time.perf_counter() - start
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(notes))
        os.replace(partial, self._path)


def resident_bytes() -> int:
    """Memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def write_encoder(size: Size, path: Path) -> None:
    """A random encoder as ONNX."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
    )
    module = transformers.BertModel(config, add_pooling_layer=False).eval()
    ids = torch.zeros(2, size.sequence, dtype=torch.int64)
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    save(planish.compile(module, "canonicalize", target="portable", example_inputs=example).model, path)


def calibration(size: Size) -> list[dict[str, np.ndarray]]:
    """Random tokens without padding."""
    ids = np.random.default_rng(1).integers(0, size.vocabulary, (size.samples, 1, size.sequence))
    return [{"input_ids": batch, "attention_mask": np.ones_like(batch)} for batch in ids]


def prune(size: Size, folder: Path) -> None:
    """Prune the encoder in ``folder``, in this process, and note what it takes."""
    with Meter(folder / "notes.json") as meter:
        for name, place in PHASES.items():
            meter.wrap(name, *place, announce=True)
        for name, place in PARTS.items():
            meter.wrap(name, *place, announce=False)
        with meter.measure("prune in all"):
            compiled = planish.compile(
                folder / "encoder.onnx", size.passes, calibration=calibration(size), cache=folder / "state"
            )
    for remark in compiled.report.passes[-1].remarks:
        if remark.subject.endswith("x"):
            print(f"{remark.subject}: {remark.text}")


def measure_apart(size: Size, folder: Path) -> dict[str, dict[str, float]]:
    """Prune in a fresh process, so that this one's memory is not in the way; gives its notes."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "encoder.onnx").exists():
        write_encoder(size, folder / "encoder.onnx")
    subprocess.run(
        [sys.executable, __file__, "--worker", str(folder), json.dumps(dataclasses.asdict(size))], check=True
    )
    notes: dict[str, dict[str, float]] = json.loads((folder / "notes.json").read_text())
    return notes


def rows(notes: dict[str, dict[str, float]]) -> list[list[str]]:
    """Phases, the parts of the database below it, and the sum.

    Raises:
        LookupError: one was never called: the package has changed, and the table would be wrong.
    """
    names = ["latency table", "database", *PARTS, "search", "end-to-end latency", "prune in all"]
    missing = [name for name in names if name not in notes]
    if missing:
        raise LookupError(f"{missing[0]} was never called")
    return [
        [
            f"… {name}" if name in PARTS else name,
            f"{notes[name]['seconds']:.1f}",
            f"{notes[name]['peak'] / 1e6:.0f}",
            f"{notes[name]['calls']:.0f}",
        ]
        for name in names
    ]


COLUMNS = ["phase", "seconds", "peak memory, MB", "calls"]


def write_markdown(path: Path, table: list[list[str]], size: Size, weights: int) -> None:
    """The table as the repository keeps it."""
    lines = [
        "# What structured pruning costs",
        "",
        f"{processor()}. A random encoder, {size.layers} layers, hidden size {size.hidden}, FFN "
        f"{size.inner}, {size.heads} heads, {weights / 1e6:.0f} MB; {size.samples} samples of "
        f"{size.sequence} tokens; `{size.passes}`. Memory is all that the process holds, weights included. "
        "Parts of the database are measured within it.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *("| " + " | ".join(row) + " |" for row in table),
        "",
        "Written by `benchmarks/pruning_cost.py`.",
        "",
    ]
    path.write_text("\n".join(lines))


def main() -> None:
    """Prune the encoder and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small encoder; prints, writes no table")
    parser.add_argument("--state", type=Path, help="folder that an interrupted run goes on from")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the table's file")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        folder, size = arguments.worker
        prune(Size(**json.loads(size)), Path(folder))
        return
    size = QUICK if arguments.quick else Size()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.state or Path(temporary)
        found = rows(measure_apart(size, folder))
        weights = (folder / "encoder.onnx").stat().st_size
    table = Table(*COLUMNS)
    for row in found:
        table.add_row(*row)
    Console(width=140).print(table)
    if not arguments.quick:
        write_markdown(arguments.output, found, size, weights)


if __name__ == "__main__":
    main()
