"""What a search under a budget tries, finds and costs, on the sentence-embedding model.

Three budgets, one after the other: 40 % of the size, 60 % of the time, and whatever a drop of 0.01 allows.
The metric is the mean cosine between the embeddings of sentences and those of the uncompressed model;
calibration has other sentences. Results of long passes are kept between the searches, as `planish search`
keeps them.

    python benchmarks/budget.py              # writes results/budget.md
    python benchmarks/budget.py --trials 4   # of each search; prints only
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import planish
import sentence_model

_RESULTS = Path(__file__).parent / "results" / "budget.md"
_TRIALS = 14
_BUDGETS: Mapping[str, Mapping[str, Any]] = {
    "40 % of the size, at most 0.01 worse": {"size": "40%", "max_drop": 0.01},
    "60 % of the time, at most 0.01 worse": {"latency_ms": "60%", "max_drop": 0.01},
    "the least that is at most 0.01 worse": {"max_drop": 0.01},
}


def _searched(name: str, limits: Mapping[str, Any], trials: int, cache: str) -> list[str]:
    """Lines of the report on one search."""
    module, feeds = sentence_model.load_module(), sentence_model.sentence_feeds()
    held_out, calibration = feeds[::2], feeds[1::2]
    reference = [
        _embed(planish.compile(module, example_inputs=sentence_model.example()), each) for each in held_out
    ]

    def cosine(compiled: planish.CompiledModel) -> float:
        pairs = [(_embed(compiled, each), dense) for each, dense in zip(held_out, reference, strict=True)]
        return float(np.mean([np.mean((ours * theirs).sum(-1)) for ours, theirs in pairs]))

    measured = []
    budget = planish.Budget(
        **limits,
        metric=cosine,
        trials=trials,
        on_trial=lambda point, allowed: measured.append((point, allowed)),
    )
    start = time.perf_counter()
    compiled = planish.compile(
        module,
        budget=budget,
        example_inputs=sentence_model.example(1, 128),
        calibration=calibration,
        cache=cache,
    )
    seconds = time.perf_counter() - start
    front = {point.passes: point.chosen for point in compiled.front}
    rows = [
        f"| {'**chosen**' if front.get(point.passes) else 'front' if point.passes in front else ''} "
        f"| {'yes' if allowed else 'no'} | `{point.label}` | {point.size / 1e6:.1f} | {point.latency_ms:.1f} "
        f"| {point.metric:.4f} |"
        for point, allowed in measured
    ]
    return [
        f"## {name}",
        "",
        f"{len(measured)} models measured in {seconds:.0f} s.",
        "",
        "| | within | beyond merged operations | MB | ms | cosine |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
    ]


def _embed(
    compiled: planish.CompiledModel, feeds: Mapping[str, np.ndarray[Any, Any]]
) -> np.ndarray[Any, Any]:
    (embeddings,) = compiled.run(feeds).values()
    return embeddings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=_TRIALS)
    options = parser.parse_args()
    lines = [
        "# Searches under a budget",
        "",
        f"`python benchmarks/budget.py`; MiniLM (22.7 M parameters), one text of 128 tokens, "
        f"{os.cpu_count()} cores.",
        "",
    ]
    with tempfile.TemporaryDirectory() as cache:
        for name, limits in _BUDGETS.items():
            found = _searched(name, limits, options.trials, cache)
            print("\n".join(found), flush=True)
            lines += found
    if options.trials == _TRIALS:
        _RESULTS.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
