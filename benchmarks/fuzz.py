"""Random graphs through random pipelines: does onnxruntime say the same before and after?

What has to hold is said in `fuzz_case`. Cases run in processes of their own, one after the other, so that a
crash is a result like any other. Each follows from its seed alone; one that fails is made smaller by leaving
out passes, options and blocks, and told with the command that runs it again.

    python benchmarks/fuzz.py --cases 3000               # seeds 0 to 2999; writes results/fuzz.md
    python benchmarks/fuzz.py --seed 9000 --minutes 30   # as many as there is time for; prints only
    python benchmarks/fuzz.py --case 17 --passes "canonicalize,fuse" --blocks 0,2
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "fuzz.md"
FIRST_SEED = 0
OF_ONE_PROCESS = 1000
"""Cases that one process runs: traced architectures are traced once in each."""
MADE_FAMILIES = ("tokens", "decoder", "image", "rows")

Row = dict[str, Any]


def run_here(seeds: Sequence[int]) -> None:
    """Run cases in this process and print one line of JSON for each."""
    prepare()
    from fuzz_case import Case, run_case, smaller

    for seed in seeds:
        start = time.perf_counter()
        case = Case(seed=seed)
        outcome = run_case(case)
        row = {"seed": seed, "seconds": time.perf_counter() - start, **dataclasses.asdict(outcome)}
        if outcome.failure:
            row["again"] = command(*smaller(case, outcome))
        print(json.dumps(row), flush=True)


def prepare() -> None:
    """Let kernels be chosen after a few runs: what they take does not matter here. One core is enough."""
    from planish.codegen import microbenchmark

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    warnings.simplefilter("ignore")
    microbenchmark._SECONDS_PER_CANDIDATE = 0


def command(case: Any, outcome: Any) -> str:
    """What runs a case again."""
    words = f'--case {case.seed} --passes "{case.pipeline or outcome.pipeline}"'
    return words if case.blocks is None else f"{words} --blocks {','.join(map(str, case.blocks)) or 'none'}"


def run_elsewhere(seeds: range, stop: float) -> Iterator[Row]:
    """Run cases in other processes until ``stop``; a process that dies has found something."""
    while seeds and time.time() < stop:
        chunk, done = seeds[:OF_ONE_PROCESS], 0
        arguments = [sys.executable, __file__, "--run", str(chunk.start), str(chunk.stop)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                done += 1
                yield json.loads(line)
                if time.time() > stop:
                    process.kill()
                    return
        if done < len(chunk):
            failure = f"the process died with {process.returncode}"
            yield {"seed": chunk[done], "family": "?", "pipeline": "?", "failure": failure, "again": ""}
            done += 1
        seeds = seeds[done:]


def report(rows: Sequence[Row]) -> str:
    """The results as Markdown."""
    failures = [row for row in rows if row["failure"]]
    exact = [row for row in rows if row.get("is_exact")]
    compared = sum(bool(row.get("ran")) for row in rows)
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("onnxruntime", "onnx", "onnx-ir", "torch")
    )
    worst = max((row["error"] for row in exact if not row["failure"]), default=0.0)
    lines = [
        "# Fuzzing",
        "",
        "Random graphs and small traced architectures with random weights, through random legal pipelines of",
        "all passes, compared with the original in onnxruntime without graph optimisation. Written by",
        f"`benchmarks/fuzz.py`: {len(rows)} cases, seeds {rows[0]['seed']} to {rows[-1]['seed']}, in "
        f"{sum(row.get('seconds', 0.0) for row in rows) / 60:.0f} minutes; {versions}.",
        "",
        f"**{len(failures)} failures.** In {compared} cases outputs were compared, in {len(exact)} of them",
        f"after exact passes alone: there the largest error was {worst:.2g} of what is allowed (the sum of",
        "the passes' tolerances, 1e-4 each, relative to the largest number of the output; or 64 times the",
        "model's own answer to a rounding of its weights). After approximate passes outputs are finite and",
        "within the errors that the passes reported.",
        "",
        *_families(rows),
        "",
        *_passes(rows),
        "",
        *_refusals(rows),
    ]
    if failures:
        lines += ["", "## Failures", "", "| seed | again | what |", "|---|---|---|"]
        lines += [f"| {row['seed']} | `{row['again']}` | {_shortened(row['failure'])} |" for row in failures]
    return "\n".join(lines) + "\n"


def _shortened(failure: str) -> str:
    """The beginning of what failed, without the folders of this machine, for a table."""
    return re.sub(r"[^\s\"]*/site-packages/", "", failure)[:300].replace("|", "¦")


def _families(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| graph | cases | exact passes only | approximate | passes that refused | failures |",
        "|---|---|---|---|---|---|",
    ]
    found = collections.Counter(row["family"] for row in rows)
    for family in sorted(found, key=lambda family: (family not in MADE_FAMILIES, family)):
        own = [row for row in rows if row["family"] == family]
        exact = sum(bool(row.get("is_exact")) for row in own)
        refused = sum(len(row.get("refusals", ())) for row in own)
        failed = sum(bool(row["failure"]) for row in own)
        lines.append(f"| {family} | {len(own)} | {exact} | {len(own) - exact} | {refused} | {failed} |")
    return lines


def _passes(rows: Sequence[Row]) -> list[str]:
    ran = collections.Counter(name for row in rows for name in row.get("ran", ()))
    refused = collections.Counter(refusal["name"] for row in rows for refusal in row.get("refusals", ()))
    lines = ["| pass | ran | refused |", "|---|---|---|"]
    for name in sorted(ran.keys() | refused.keys(), key=str.lower):
        lines.append(f"| {name} | {ran[name]} | {refused[name]} |")
    return lines


def _refusals(rows: Sequence[Row]) -> list[str]:
    reasons = collections.Counter(
        (refusal["name"], refusal["reason"]) for row in rows for refusal in row.get("refusals", ())
    )
    lines = [
        "## Refusals",
        "",
        "Names and numbers of a single model are left out.",
        "",
        "| pass | times | reason |",
    ]
    lines.append("|---|---|---|")
    for (name, reason), count in sorted(reasons.items(), key=lambda item: (item[0][0], -item[1])):
        lines.append(f"| {name} | {count} | {reason.replace('|', '¦')} |")
    return lines


def run_again(arguments: argparse.Namespace) -> int:
    """Run one case, perhaps a part of it, and say all that is known about it."""
    prepare()
    from fuzz_case import Case, run_case
    from planish.passes.infrastructure.pipeline import Pipeline

    blocks = None
    if arguments.blocks is not None:
        blocks = tuple(map(int, arguments.blocks.split(","))) if arguments.blocks != "none" else ()
    pipeline = None if arguments.passes is None else Pipeline.of(arguments.passes)
    outcome = run_case(Case(seed=arguments.case, blocks=blocks, pipeline=pipeline))
    for name, value in dataclasses.asdict(outcome).items():
        print(f"{name}: {value}")
    return int(bool(outcome.failure))


def _kept(log: Path | None, seeds: range) -> list[Row]:
    """What an earlier run has written about the first of these seeds."""
    if log is None or not log.exists():
        return []
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return [row for row, seed in zip(rows, seeds, strict=False) if row["seed"] == seed]


def main() -> int:
    """Run cases; 1 if any of them fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, help="how many; without --minutes 3000")
    parser.add_argument("--seed", type=int, default=FIRST_SEED, help="of the first case")
    parser.add_argument("--minutes", type=float, help="stop after so many")
    parser.add_argument("--log", type=Path, help="keep results here, and go on from those that are there")
    parser.add_argument("--case", type=int, help="run this one again")
    parser.add_argument("--passes", help="of that case; those of its seed if absent")
    parser.add_argument("--blocks", help="numbers of the blocks to build of that case")
    parser.add_argument("--run", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run_here(range(*arguments.run))
        return 0
    if arguments.case is not None:
        return run_again(arguments)
    count = arguments.cases or (3000 if arguments.minutes is None else 10**6)
    seeds = range(arguments.seed, arguments.seed + count)
    stop = time.time() + 60 * (arguments.minutes or 10**6)
    rows = _kept(arguments.log, seeds)
    with tempfile.TemporaryDirectory() as cache, open(arguments.log or os.devnull, "a") as log:
        os.environ["PLANISH_CACHE_DIR"] = cache
        for row in run_elsewhere(seeds[len(rows) :], stop):
            rows.append(row)
            print(json.dumps(row), file=log, flush=True)
            if row["failure"]:
                print(f"seed {row['seed']}: {row['failure'][:400]}\n    {row['again']}", flush=True)
    text = report(rows)
    print(text)
    if arguments.seed == FIRST_SEED and arguments.minutes is None:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text, encoding="utf-8")
    return int(any(row["failure"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
