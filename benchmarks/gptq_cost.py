"""What GPTQ costs as a model gets deeper: seconds, and memory over the model's own size.

A random decoder (grouped-query attention, gated MLP) is written as ONNX with its weights beside it, and a
fresh process loads it memory-mapped and quantises it: 12 layers with 64 samples of 512 random tokens, and,
for the growth, 6, 12 and 24 layers with 16. Memory is the process's peak over what it held before it loaded
the model: all of it, pages of the mapped file included, and the anonymous part alone, which cannot be
dropped.

    python benchmarks/gptq_cost.py            # writes benchmarks/results/gptq_cost.md
    python benchmarks/gptq_cost.py --quick    # small sizes; prints
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import itertools
import json
import pstats
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import planish
from planish.ir import save
from planish.passes.infrastructure.pipeline import Pipeline
from rich.console import Console
from sentence_embeddings import processor

VOCABULARY = 2048
PASSES = "quantize{scheme=W4A16_ASYM,group_size=128,algorithm=gptq,embeddings=false}"
_SAMPLING_SECONDS = 0.02


@dataclasses.dataclass(frozen=True)
class Size:
    """A decoder and its calibration data."""

    layers: int
    hidden: int = 1024
    inner: int = 2816
    heads: int = 16
    kv_heads: int = 4
    samples: int = 64
    tokens: int = 512


FULL = Size(12)
DEPTHS = tuple(Size(layers, samples=16) for layers in (6, 12, 24))
QUICK = tuple(
    Size(layers, hidden=256, inner=768, heads=8, kv_heads=2, samples=8, tokens=128) for layers in (2, 4, 8)
)


class _Builder:
    """Collects the nodes and random weights of a decoder."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []

    def weight(self, name: str, *shape: int) -> ir.Value:
        array = self._rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[0]))
        self.weights.append(ir.val(name, const_value=ir.tensor(array, name=name)))
        return self.weights[-1]

    def op(self, kind: str, *inputs: ir.Value, name: str = "", **attributes: Any) -> ir.Value:
        name = name or f"{kind.lower()}_{len(self.nodes)}"
        node = ir.node(kind, inputs, attributes, name=f"{name}.node", version=23)
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]

    def linear(self, x: ir.Value, path: str, rows: int, columns: int, name: str = "") -> ir.Value:
        return self.op("MatMul", x, self.weight(f"{path}.weight", rows, columns), name=name or path)

    def norm(self, x: ir.Value, path: str, size: int) -> ir.Value:
        ones = ir.val(
            f"{path}.weight", const_value=ir.tensor(np.ones(size, np.float32), name=f"{path}.weight")
        )
        self.weights.append(ones)
        return self.op("RMSNormalization", x, ones, axis=-1, epsilon=1e-5, name=path)


def decoder(size: Size) -> ir.Model:
    """Token ids [batch, sequence] in, logits [batch, sequence, vocabulary] out; without a cache."""
    b, head = _Builder(), size.hidden // size.heads
    ids = ir.val("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
    x = b.op("Gather", b.weight("model.embed_tokens.weight", VOCABULARY, size.hidden), ids)
    for index in range(size.layers):
        path = f"model.layers.{index}"
        normed = b.norm(x, f"{path}.input_layernorm", size.hidden)
        q = b.linear(normed, f"{path}.self_attn.q_proj", size.hidden, size.heads * head)
        k = b.linear(normed, f"{path}.self_attn.k_proj", size.hidden, size.kv_heads * head)
        v = b.linear(normed, f"{path}.self_attn.v_proj", size.hidden, size.kv_heads * head)
        attended = b.op("Attention", q, k, v, q_num_heads=size.heads, kv_num_heads=size.kv_heads, is_causal=1)
        x = b.op("Add", x, b.linear(attended, f"{path}.self_attn.o_proj", size.heads * head, size.hidden))
        normed = b.norm(x, f"{path}.post_attention_layernorm", size.hidden)
        gate = b.linear(normed, f"{path}.mlp.gate_proj", size.hidden, size.inner)
        up = b.linear(normed, f"{path}.mlp.up_proj", size.hidden, size.inner)
        gated = b.op("Mul", b.op("Mul", gate, b.op("Sigmoid", gate)), up)
        x = b.op("Add", x, b.linear(gated, f"{path}.mlp.down_proj", size.inner, size.hidden))
    logits = b.linear(b.norm(x, "model.norm", size.hidden), "lm_head", size.hidden, VOCABULARY, name="logits")
    logits.type = ir.TensorType(ir.DataType.FLOAT)
    logits.shape = ir.Shape(["batch_size", "sequence_length", VOCABULARY])
    graph = ir.Graph(
        [ids], [logits], nodes=b.nodes, initializers=b.weights, opset_imports={"": 23}, name="decoder"
    )
    return ir.Model(graph, ir_version=11)


class MemoryWatch:
    """The largest resident memory of this process while it is open, over what it was before, in bytes."""

    def __init__(self) -> None:
        self.total = self.anonymous = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._before = _memory()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLING_SECONDS):
            now = _memory()
            self.total = max(self.total, now["VmRSS"] - self._before["VmRSS"])
            self.anonymous = max(self.anonymous, now["RssAnon"] - self._before["RssAnon"])


def _memory() -> dict[str, int]:
    """Bytes of this process by the kernel's names: VmRSS, and the part RssAnon of it."""
    fields = (line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(text.split()[0]) * 1024 for name, text in fields if name in ("VmRSS", "RssAnon")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What quantising one decoder took: bytes, and seconds as a whole and by part."""

    layers: int
    samples: int
    weights: int
    peak: int
    anonymous: int
    seconds: float
    runs: float
    covariance: float
    algorithm: float


def measure(size: Size, folder: Path) -> Cost:
    """Quantise the decoder in ``folder``, in this process."""
    path = folder / "decoder.onnx"
    rng = np.random.default_rng(1)
    calibration = [{"input_ids": rng.integers(0, VOCABULARY, (1, size.tokens))} for _ in range(size.samples)]
    passes = Pipeline.of(f"canonicalize,{PASSES}")
    profile = cProfile.Profile()
    with MemoryWatch() as memory:
        start = time.perf_counter()
        profile.enable()
        planish.compile(path, passes, calibration=calibration, target="portable")
        profile.disable()
        seconds = time.perf_counter() - start
    stats = pstats.Stats(profile)
    return Cost(
        layers=size.layers,
        samples=size.samples,
        weights=sum(file.stat().st_size for file in folder.iterdir()),
        peak=memory.total,
        anonymous=memory.anonymous,
        seconds=seconds,
        runs=_cumulative(stats, "calibration/stream.py", "advance"),
        covariance=_cumulative(stats, "calibration/statistics.py", "update"),
        algorithm=_cumulative(stats, "algorithms/gptq.py", "__call__"),
    )


def _cumulative(stats: pstats.Stats, file: str, function: str) -> float:
    """Seconds in a function of the package and in what it called.

    Raises:
        LookupError: it was never called: the package has changed, and the split would be wrong.
    """
    entries: dict[Any, Any] = stats.stats  # type: ignore[attr-defined]
    found = [
        entry[3] for (path, _, name), entry in entries.items() if path.endswith(file) and name == function
    ]
    if not found:
        raise LookupError(f"{function} of {file} was never called")
    return float(sum(found))


def measure_apart(size: Size, folder: Path) -> Cost:
    """Write the decoder, and quantise it in a fresh process: this one's memory is not in the way."""
    save(decoder(size), folder / "decoder.onnx", external_data=True)
    process = subprocess.run(
        [sys.executable, __file__, "--worker", str(folder), json.dumps(dataclasses.asdict(size))],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Cost(**json.loads(process.stdout.splitlines()[-1]))


def table(costs: list[Cost]) -> list[str]:
    """One row for each depth, and what one more layer takes."""
    lines = [
        "| layers | samples | weights, MB | seconds | running the model | covariances | GPTQ | a layer, s "
        "| peak, MB | peak / weights | anonymous, MB | anonymous / weights |",
        "|---" * 12 + "|",
    ]
    for cost in costs:
        cells = [
            f"{cost.layers}",
            f"{cost.samples}",
            f"{cost.weights / 1e6:.0f}",
            f"{cost.seconds:.1f}",
            f"{cost.runs:.1f}",
            f"{cost.covariance:.1f}",
            f"{cost.algorithm:.1f}",
            f"{cost.seconds / cost.layers:.2f}",
            f"{cost.peak / 1e6:.0f}",
            f"{cost.peak / cost.weights:.2f}",
            f"{cost.anonymous / 1e6:.0f}",
            f"{cost.anonymous / cost.weights:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def growth(costs: list[Cost]) -> list[str]:
    """How both grow from each depth to the next."""
    lines = [
        "",
        "| from – to layers | seconds | weights | peak grows by, of the weights' growth |",
        "|---|---|---|---|",
    ]
    for small, large in itertools.pairwise(costs):
        share = (large.peak - small.peak) / (large.weights - small.weights)
        lines.append(
            f"| {small.layers} – {large.layers} | {large.seconds / small.seconds:.2f} × "
            f"| {large.weights / small.weights:.2f} × | {share:.2f} |"
        )
    return lines


def main() -> None:
    """Measure every depth and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes; prints, writes no table")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        folder, size = arguments.worker
        print(json.dumps(dataclasses.asdict(measure(Size(**json.loads(size)), Path(folder)))))
        return
    console = Console(width=140)
    costs = []
    for size in QUICK if arguments.quick else (FULL, *DEPTHS):
        with tempfile.TemporaryDirectory() as folder:
            costs.append(measure_apart(size, Path(folder)))
        console.print(str(costs[-1]))
    lines = [*table(costs), *growth(costs if arguments.quick else costs[1:])]
    console.print("\n".join(lines), highlight=False)
    if not arguments.quick:
        write_markdown(Path(__file__).parent / "results" / "gptq_cost.md", lines, FULL)


def write_markdown(path: Path, lines: list[str], size: Size) -> None:
    """The table as the repository keeps it."""
    head = [
        "# The cost of GPTQ and how it grows with depth",
        "",
        f"{processor()}. Random decoders, hidden {size.hidden}, FFN {size.inner}, {size.heads} heads, "
        f"{size.kv_heads} KV heads, vocabulary {VOCABULARY}; samples of {size.tokens} tokens; "
        f"`{PASSES}`. The model is memory-mapped from its file. Peak: resident memory over what the "
        "process held before loading the model, mapped pages of the file included; anonymous: without them.",
        "",
    ]
    path.write_text("\n".join([*head, *lines, "", "Written by `benchmarks/gptq_cost.py`.", ""]))


if __name__ == "__main__":
    main()
