"""How fast is ``canonicalize,fuse`` on large graphs, and how many nodes does it leave, next to its peers?

Each tool gets the same synthetic decoder (see `synthetic_decoder`) as a ModelProto in memory. What is timed
is what the tool does from there, its own conversions included; imports and a first small model come before.
Every run has a process of its own and a time limit. Afterwards onnxruntime runs the result next to the
original: the table gives the largest difference of any output, relative to that output's largest element.

Nodes are counted in the main graph, without Constant nodes.

    python benchmarks/graph_speed.py                        # writes benchmarks/results/graph_speed.md
    python benchmarks/graph_speed.py --nodes 1000           # prints only
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from synthetic_decoder import HEADS, HIDDEN, decoder, feeds, layers_for

SIZES = (1000, 3000, 10000)
ROUNDS = 3
TIME_LIMIT = 300.0
"""Seconds that one run of one tool may take, start-up and check included."""
RESULTS = Path(__file__).parent / "results" / "graph_speed.md"
TOLERANCE = 1e-3
"""float32 through hundreds of layers in other association; a wrong rewrite is off by far more."""


def planish(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnx_ir as ir
    from planish.codegen import get_target
    from planish.passes.canonicalize import Canonicalize
    from planish.passes.fuse import Fuse
    from planish.passes.infrastructure.base import PassContext

    graph = ir.from_proto(model)
    context = PassContext(target=get_target("portable"))
    Canonicalize().run(graph, context)
    Fuse().run(graph, context)
    return ir.to_proto(graph)


def onnxscript(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnx_ir as ir
    import onnxscript.optimizer
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    graph = ir.from_proto(model)
    onnxscript.optimizer.optimize(graph)
    optimize_for_ort(graph)
    return ir.to_proto(graph)


def onnxslim(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxslim

    result = onnxslim.slim(model)
    assert isinstance(result, onnx.ModelProto)
    return result


def onnxsim(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxsim

    # Without its own runs of both models on random inputs, which are a check and no part of the work.
    result, _ = onnxsim.simplify(model, check_n=0)
    return result


def onnxruntime_transformers(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnxruntime.transformers.optimizer import optimize_model

    # From a ModelProto it fails at reading its own temporary file, so it gets a path. "gpt2" is the type that
    # onnxruntime's own Llama script uses.
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "model.onnx"))
        onnx.save(model, path)
        return optimize_model(path, model_type="gpt2", num_heads=HEADS, hidden_size=HIDDEN).model


TOOLS: dict[str, tuple[str, Callable[[onnx.ModelProto], onnx.ModelProto]]] = {
    "planish": ("planish `canonicalize,fuse`", planish),
    "onnxscript": ("onnxscript `optimize` + `optimize_for_ort`", onnxscript),
    "onnxslim": ("onnxslim `slim`", onnxslim),
    "onnxsim": ("onnxsim `simplify`", onnxsim),
    "onnxruntime": ("onnxruntime `transformers.optimizer`", onnxruntime_transformers),
}


@dataclasses.dataclass
class Outcome:
    """What one run said: seconds, nodes left and the largest relative difference; or why it failed."""

    seconds: float = math.nan
    cpu_seconds: float = math.nan
    nodes: int = 0
    difference: float = math.nan
    failure: str = ""


def count(model: onnx.ModelProto) -> int:
    return sum(node.op_type != "Constant" for node in model.graph.node)


def outputs_of(model: onnx.ModelProto, layers: int) -> dict[str, np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    taken = {value.name for value in session.get_inputs()}
    given = {name: array for name, array in feeds(layers).items() if name in taken}
    return dict(zip(names, session.run(names, given), strict=True))


def difference(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    if found.keys() != expected.keys():
        return math.inf
    return max(
        float(np.abs(found[name] - array).max() / np.abs(array).max()) for name, array in expected.items()
    )


def work(tool: str, nodes: int, reference: Path) -> Outcome:
    """One run, in this process."""
    optimise, layers = TOOLS[tool][1], layers_for(nodes)
    optimise(decoder(1))
    model = decoder(layers)
    start, cpu_start = time.perf_counter(), time.process_time()
    result = optimise(model)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    outcome = Outcome(seconds, cpu_seconds, count(result))
    with np.load(reference) as expected:
        outcome.difference = difference(outputs_of(result, layers), dict(expected))
    return outcome


def run(tool: str, nodes: int, reference: Path, limit: float) -> Outcome:
    """One run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "outcome.json")
        arguments = ["--worker", tool, "--nodes", str(nodes), "--reference", str(reference)]
        command = [sys.executable, __file__, *arguments, "--answer", str(answer)]
        try:
            done = subprocess.run(command, timeout=limit, capture_output=True, text=True, cwd=folder)
        except subprocess.TimeoutExpired:
            return Outcome(failure=f"not done after {limit:.0f} s")
        if done.returncode or not answer.exists():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            return Outcome(failure=(lines[-1] if lines else f"exit code {done.returncode}")[:160])
        return Outcome(**json.loads(answer.read_text()))


def measure(nodes: int, rounds: int, limit: float) -> dict[str, Outcome]:
    """All tools at one size, interleaved; a tool that fails or is slow is run once."""
    outcomes: dict[str, list[Outcome]] = {tool: [] for tool in TOOLS}
    with tempfile.TemporaryDirectory() as folder:
        reference, layers = Path(folder, "reference.npz"), layers_for(nodes)
        np.savez(reference, **outputs_of(decoder(layers), layers))
        for _ in range(rounds):
            for tool, earlier in outcomes.items():
                if earlier and (earlier[-1].failure or earlier[-1].seconds > limit / 20):
                    continue
                earlier.append(run(tool, nodes, reference, limit))
                print(f"{nodes:6} {tool:12} {earlier[-1]}", flush=True)
    return {tool: _summary(runs) for tool, runs in outcomes.items()}


def _summary(runs: list[Outcome]) -> Outcome:
    return dataclasses.replace(
        runs[-1],
        seconds=statistics.median(run.seconds for run in runs),
        cpu_seconds=statistics.median(run.cpu_seconds for run in runs),
    )


def table(results: dict[int, dict[str, Outcome]], rounds: int) -> str:
    """The results as Markdown."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("onnxscript", "onnxslim", "onnxsim", "onnxruntime")
    )
    lines = [
        "# Graph speed",
        "",
        f"`python benchmarks/graph_speed.py`; {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"{versions}.",
        f"Seconds are the median of {rounds} interleaved runs, or of one where a run takes longer than "
        f"{TIME_LIMIT / 20:.0f} s.",
        "CPU seconds, of which the ratio is taken, depend little on what else the machine does at the time.",
        "",
        "| nodes before | tool | seconds | CPU seconds | times planish | nodes left | largest difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for nodes, outcomes in results.items():
        before = count(decoder(layers_for(nodes)))
        for tool, outcome in outcomes.items():
            name = TOOLS[tool][0]
            if outcome.failure:
                lines.append(f"| {before} | {name} | – | – | – | – | {outcome.failure} |")
                continue
            times = outcome.cpu_seconds / outcomes["planish"].cpu_seconds
            wrong = "" if outcome.difference <= TOLERANCE else " (wrong)"
            lines.append(
                f"| {before} | {name} | {outcome.seconds:.2f} | {outcome.cpu_seconds:.2f} | {times:.1f} "
                f"| {outcome.nodes} | {outcome.difference:.0e}{wrong} |"
            )
    return "\n".join([*lines, "", *_growth(results), ""])


def _growth(results: dict[int, dict[str, Outcome]]) -> list[str]:
    sizes = {nodes: outcomes["planish"].cpu_seconds for nodes, outcomes in results.items()}
    if len(sizes) < 2:
        return []
    small, large = min(sizes), max(sizes)
    exponent = math.log(sizes[large] / sizes[small]) / math.log(large / small)
    return [f"planish from {small} to {large} nodes: CPU time grows as nodes^{exponent:.2f}."]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, help="one size only; prints instead of writing the table")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--limit", type=float, default=TIME_LIMIT, help="seconds that one run may take")
    parser.add_argument("--worker", choices=TOOLS, help=argparse.SUPPRESS)
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        outcome = work(options.worker, options.nodes, options.reference)
        options.answer.write_text(json.dumps(dataclasses.asdict(outcome)))
        return 0
    sizes = (options.nodes,) if options.nodes else SIZES
    results = {nodes: measure(nodes, options.rounds, options.limit) for nodes in sizes}
    text = table(results, options.rounds)
    print(text)
    if not options.nodes:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text)
    ours = [outcomes["planish"] for outcomes in results.values()]
    return int(any(outcome.failure or not outcome.difference <= TOLERANCE for outcome in ours))


if __name__ == "__main__":
    raise SystemExit(main())
