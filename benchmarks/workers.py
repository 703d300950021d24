"""What several workers bring: seconds of threads, of processes, of processes of Ray; equal bytes.

Three kinds of work that fall into layers, on random models: GPTQ of a decoder, the pruning database of an
encoder, and the sensitivity sweep of allocate. Each is done in turn by all workers, as often as asked, and
the best time counts; processes have started and imported planish by then, and how long that took is said.

    python benchmarks/workers.py            # writes benchmarks/results/workers.md
    python benchmarks/workers.py --quick    # small sizes; prints
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import gptq_cost
import numpy as np
import planish
import pruning_cost
from planish.ir import clone, load
from planish.ir.content_hash import content_hash
from planish.passes.prune import prune
from planish.runtime.process_workers import LocalProcesses
from planish.runtime.ray_workers import RayWorkers
from planish.runtime.workers import LocalWorkers, Workers
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from sentence_embeddings import processor

RESULTS = Path(__file__).parent / "results" / "workers.md"
COLUMNS = ("work", "workers", "seconds", "times as fast as one", "bytes")
_IDLE_LOAD = 0.5
"""Load of a machine on which nothing else runs."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the models."""

    decoder: gptq_cost.Size
    encoder: pruning_cost.Size
    repeats: int


FULL = Sizes(
    gptq_cost.Size(2, hidden=768, inner=2048, heads=12, kv_heads=4, samples=8, tokens=256),
    dataclasses.replace(pruning_cost.QUICK, hidden=256, inner=1024, samples=16),
    repeats=2,
)
QUICK = Sizes(
    gptq_cost.Size(1, hidden=128, inner=384, heads=4, kv_heads=2, samples=4, tokens=64),
    pruning_cost.QUICK,
    repeats=1,
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one piece of work: how long it took, and a hash of what came out."""

    seconds: float
    digest: str


Work = Callable[[Workers], Outcome]


class Works:
    """The three kinds of work."""

    def __init__(self, sizes: Sizes, folder: Path) -> None:
        self._decoder = gptq_cost.decoder(sizes.decoder)
        rng = np.random.default_rng(1)
        shape = (1, sizes.decoder.tokens)
        self._tokens = [
            {"input_ids": rng.integers(0, gptq_cost.VOCABULARY, shape)} for _ in range(sizes.decoder.samples)
        ]
        pruning_cost.write_encoder(sizes.encoder, folder / "encoder.onnx")
        self._encoder = load(folder / "encoder.onnx")
        self._sentences = pruning_cost.calibration(sizes.encoder)

    def gptq(self, workers: Workers) -> Outcome:
        """Of all linears; seconds of the pass, running the model included."""
        compiled = self._compiled(f"canonicalize,{gptq_cost.PASSES}", workers)
        return Outcome(compiled.report.passes[-1].seconds, content_hash(compiled.model))

    def sensitivities(self, workers: Workers) -> Outcome:
        """Of all linears to three schemes; seconds of the pass, choosing among them included."""
        passes = "canonicalize,allocate{candidates=[W2A16,W3A16,W4A16],bits_per_weight=4}"
        compiled = self._compiled(passes, workers)
        report = compiled.report.passes[-1]
        remarks = json.dumps([dataclasses.asdict(remark) for remark in report.remarks])
        return Outcome(report.seconds, hashlib.sha256(remarks.encode()).hexdigest())

    def database(self, workers: Workers) -> Outcome:
        """Of all heads and channels at all levels; seconds of building it, running the model included."""
        with built_databases() as built:
            planish.compile(
                clone(self._encoder),
                "canonicalize,prune{sparsity=0.3,evaluations=1,samples=1}",
                calibration=self._sentences,
                target="portable",
                workers=workers,
            )
        (outcome,) = built
        return outcome

    def _compiled(self, passes: str, workers: Workers) -> Any:
        return planish.compile(
            clone(self._decoder), passes, calibration=self._tokens, target="portable", workers=workers
        )


@contextlib.contextmanager
def built_databases() -> Iterator[list[Outcome]]:
    """Seconds and files of the pruning databases that are built in the block."""
    found: list[Outcome] = []
    real = prune.build_database

    def build(*given: Any, folder: Path, **options: Any) -> Any:
        start = time.perf_counter()
        database = real(*given, folder=folder, **options)
        seconds = time.perf_counter() - start
        digest = hashlib.sha256()
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "numpy") as file:  # which writes its metadata in any order
                digest.update(repr(sorted(file.metadata().items())).encode())
                for name in sorted(file.keys()):
                    digest.update(name.encode() + file.get_tensor(name).tobytes())
        found.append(Outcome(seconds, digest.hexdigest()))
        return database

    prune.build_database = build
    try:
        yield found
    finally:
        prune.build_database = real


def measured(work: Work, hands: dict[str, Workers], repeats: int) -> dict[str, Outcome]:
    """The best time of each, and what came out, which all runs agree on or the benchmark fails."""
    outcomes: dict[str, list[Outcome]] = {name: [] for name in hands}
    for _ in range(repeats):
        for name, workers in hands.items():
            outcomes[name].append(work(workers))
    for name, found in outcomes.items():
        if len({outcome.digest for outcome in found}) > 1:
            raise AssertionError(f"{name}: runs of one kind differ")
    return {name: min(found, key=lambda outcome: outcome.seconds) for name, found in outcomes.items()}


def rows(name: str, outcomes: dict[str, Outcome]) -> list[tuple[str, ...]]:
    """One for each kind of workers; the first is what others are compared with."""
    first = next(iter(outcomes.values()))
    return [
        (
            name,
            hands,
            f"{outcome.seconds:.2f}",
            f"{first.seconds / outcome.seconds:.2f}",
            "the same" if outcome.digest == first.digest else "DIFFERENT",
        )
        for hands, outcome in outcomes.items()
    ]


H = TypeVar("H", bound=Workers)


def started(make: Callable[[], H]) -> tuple[H, float]:
    """Two processes that have imported planish, and how long that took."""
    start = time.perf_counter()
    workers = make()
    list(workers.map(_nothing, None, range(4)))
    return workers, time.perf_counter() - start


def _nothing(shared: None, item: int) -> int:
    del shared
    time.sleep(0.5)  # so that each process has one
    return item


def write_markdown(
    path: Path, table: list[tuple[str, ...]], sizes: Sizes, startup: dict[str, float], load: float
) -> None:
    """The table and how it came to be."""
    decoder, encoder = sizes.decoder, sizes.encoder
    busy = f" **Other work ran beside it** (load {load:.1f} before it began)." if load > _IDLE_LOAD else ""
    lines = [
        "# What several workers bring",
        "",
        f"{processor()}, {os.cpu_count()} cores. GPTQ and sensitivities: {decoder.layers} layers, hidden "
        f"{decoder.hidden}, FFN {decoder.inner}, {decoder.samples} samples of {decoder.tokens} tokens. "
        f"Database: {encoder.layers} layers, hidden {encoder.hidden}, FFN {encoder.inner}. Best of "
        f"{sizes.repeats}, in turn.{busy}",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *("| " + " | ".join(row) + " |" for row in table),
        "",
        "To start two processes that have imported planish took "
        + " and ".join(f"{seconds:.1f} s ({name})" for name, seconds in startup.items())
        + "; that is in no row.",
        "",
        "Running the model on the data, which all rows include, uses every core with one worker, too, and so",
        "do factorisations, which come once for a layer: what workers share is the rest. Threads have all in",
        "one memory and wait for the interpreter's lock between operations; processes do not wait, and are",
        "sent what they work on. One run of the model is measured on one thread in a sweep, whoever does it.",
        "",
        "Written by `benchmarks/workers.py`.",
        "",
    ]
    path.write_text("\n".join(lines))


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models; prints, writes no table")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the table's file")
    arguments = parser.parse_args()
    sizes, load = QUICK if arguments.quick else FULL, os.getloadavg()[0]
    (processes, of_processes), (ray, of_ray) = (
        started(make) for make in (lambda: LocalProcesses(2), lambda: RayWorkers(count=2))
    )
    hands = {
        "1 thread": LocalWorkers(1),
        "2 threads": LocalWorkers(2),
        "2 processes": processes,
        "Ray, 2 processes": ray,
    }
    startup = {"processes": of_processes, "Ray": of_ray}
    table: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as folder:
        works = Works(sizes, Path(folder))
        for name, work in (
            ("GPTQ", works.gptq),
            ("pruning database", works.database),
            ("sensitivity sweep", works.sensitivities),
        ):
            table += rows(name, measured(work, hands, sizes.repeats))
    shown = Table(*COLUMNS)
    for row in table:
        shown.add_row(*row)
    Console(width=120).print(shown, f"started in {startup} s; load before {load:.1f}")
    processes.close()
    ray.close()
    if not arguments.quick:
        write_markdown(arguments.output, table, sizes, startup, load)


if __name__ == "__main__":
    main()
