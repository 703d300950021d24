"""A compilation that is killed twenty times: does it end with the same bytes, and what does going on cost?

A random decoder is quantised by GPTQ in a process of its own, which keeps what it computes. The process is
killed (SIGKILL) at twenty seeded moments, counted from when it begins to compile, each within a fifth of
what it takes undisturbed, and started again; runs that end before are not killed any more. Then it is left to
end, and once more, when all is kept.

    python benchmarks/resume.py            # writes benchmarks/results/resume.md
    python benchmarks/resume.py --quick    # a small decoder, five kills; prints
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gptq_cost
import numpy as np
import planish
from planish.ir import save
from planish.passes.infrastructure.pipeline import Pipeline
from rich.console import Console
from rich.table import Table
from sentence_embeddings import processor

RESULTS = Path(__file__).parent / "results" / "resume.md"
COLUMNS = ("run", "seconds of compiling", "seconds, imports included", "times undisturbed", "bytes")
BEGUN = "begun"
FULL = gptq_cost.Size(4, hidden=512, inner=1408, heads=8, kv_heads=2, samples=8, tokens=128)
QUICK = gptq_cost.Size(2, hidden=128, inner=384, heads=4, kv_heads=2, samples=2, tokens=32)
_LATEST = 0.2
"""Of the undisturbed time, when a run is killed at the latest: late enough that runs get further at all."""
_IDLE_LOAD = 0.5
"""Load of a machine on which nothing else runs."""


@dataclasses.dataclass(frozen=True)
class Spent:
    """What runs took.

    Attributes:
        compiling: seconds since they began to compile.
        whole: seconds, starting Python and importing included.
        kills: how many of them were killed.
    """

    compiling: float
    whole: float
    kills: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.compiling + other.compiling, self.whole + other.whole, self.kills + other.kills)


def compile_in(folder: Path, output: str, cache: str, tokens: int, samples: int) -> None:
    """Quantise the decoder in ``folder``, in this process."""
    rng = np.random.default_rng(1)
    data = [{"input_ids": rng.integers(0, gptq_cost.VOCABULARY, (1, tokens))} for _ in range(samples)]
    passes = Pipeline.of(f"canonicalize,{gptq_cost.PASSES}")  # which imports them
    print(BEGUN, flush=True)
    compiled = planish.compile(
        folder / "decoder.onnx",
        passes,
        calibration=data,
        target="portable",
        cache=folder / cache,
    )
    compiled.save(folder / output)


class Runs:
    """Runs of one compilation."""

    def __init__(self, size: gptq_cost.Size, folder: Path) -> None:
        self._size, self._folder = size, folder
        save(gptq_cost.decoder(size), folder / "decoder.onnx")

    def run(self, output: str, cache: str, killed_after: float | None = None) -> Spent:
        """One, perhaps killed so many seconds after it began to compile."""
        size = self._size
        given = (self._folder, output, cache, size.tokens, size.samples)
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, __file__, "--worker", *map(str, given)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        if process.stdout.readline().strip() != BEGUN:
            raise RuntimeError("the process ended before it began to compile")
        begun = time.perf_counter()
        killed = False
        try:
            process.wait(killed_after)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed = True
        end = time.perf_counter()
        if not killed and process.returncode:
            raise RuntimeError(f"the process ended with {process.returncode}")
        return Spent(end - begun, end - start, int(killed))

    def kept(self, cache: str) -> tuple[int, int]:
        """Results in a cache, and the bytes of all its files."""
        files = [path for path in (self._folder / cache).rglob("*") if path.is_file()]
        return sum(path.suffix == ".result" for path in files), sum(path.stat().st_size for path in files)

    def content(self, output: str) -> bytes:
        """Of a file that a run wrote."""
        return (self._folder / output).read_bytes()


def measured(runs: Runs, kills: int) -> tuple[list[tuple[str, ...]], str]:
    """The table, and a sentence on what was kept."""
    undisturbed = runs.run("whole.onnx", "other")
    moments = np.random.default_rng(0).uniform(0, _LATEST, kills) * undisturbed.compiling
    interrupted = Spent(0, 0)
    progress = []
    for moment in moments:
        interrupted += runs.run("resumed.onnx", "cache", float(moment))
        progress.append(runs.kept("cache")[0])
    last = runs.run("resumed.onnx", "cache")
    resumed = runs.content("resumed.onnx")
    results, size = runs.kept("cache")
    repeated = runs.run("repeated.onnx", "cache")
    expected = runs.content("whole.onnx")

    def row(name: str, spent: Spent, content: bytes) -> tuple[str, ...]:
        same = "the same" if content == expected else "DIFFERENT"
        return (
            name,
            f"{spent.compiling:.1f}",
            f"{spent.whole:.1f}",
            f"{spent.compiling / undisturbed.compiling:.2f}",
            same,
        )

    table = [
        row("undisturbed", undisturbed, expected),
        row(f"killed {interrupted.kills} times, then left to end: all runs", interrupted + last, resumed),
        row("… the last of them", last, resumed),
        row("once more, all kept", repeated, runs.content("repeated.onnx")),
    ]
    quarter, half = progress[len(progress) // 4], progress[len(progress) // 2]
    text = (
        f"{progress[0]}, {quarter}, {half} and {progress[-1]} of {results} groups of layers were kept after "
        "the first run, a quarter, half and all of them. "
        f"The cache has {size / 1e6:.1f} MB, the file that is written {len(expected) / 1e6:.1f} MB."
    )
    return table, text


def write_markdown(
    path: Path, table: list[tuple[str, ...]], text: str, size: gptq_cost.Size, load: float
) -> None:
    """The table and how it came to be."""
    busy = f" **Other work ran beside it** (load {load:.1f} before it began)." if load > _IDLE_LOAD else ""
    lines = [
        "# What an interrupted compilation costs",
        "",
        f"{processor()}, {os.cpu_count()} cores. A random decoder of {size.layers} layers, hidden "
        f"{size.hidden}, FFN {size.inner}; {size.samples} samples of {size.tokens} tokens; "
        f"`canonicalize,{gptq_cost.PASSES}`.{busy}",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *("| " + " | ".join(row) + " |" for row in table),
        "",
        text + " What is not kept is loading, canonicalising, and running the model from layer to layer.",
        "",
        "Written by `benchmarks/resume.py`.",
        "",
    ]
    path.write_text("\n".join(lines))


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small decoder; prints, writes no table")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the table's file")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        folder, output, cache, *sizes = arguments.worker
        compile_in(Path(folder), output, cache, *map(int, sizes))
        return
    size, load = QUICK if arguments.quick else FULL, os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        table, text = measured(Runs(size, Path(temporary)), 5 if arguments.quick else 20)
    shown = Table(*COLUMNS)
    for row in table:
        shown.add_row(*row)
    Console(width=130).print(shown, text, f"load before {load:.1f}")
    if not arguments.quick:
        write_markdown(arguments.output, table, text, size, load)


if __name__ == "__main__":
    main()
