"""The main job: a real sentence-embedding model, compiled to float, 8 and 4 bits, measured side by side.

The model comes in twice, as an `nn.Module` and as an ONNX file, and leaves as ONNX files that plain
onnxruntime loads. All models are timed in the same run, in turns; the yardstick is onnxruntime's float32 on
torch's own export. ``--peers`` adds the recipes that people use today.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import platform
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import peers
import planish
import sentence_model as job
from planish.runtime.measure import Latency, interleaved_latency
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

Array = np.ndarray[Any, Any]
YARDSTICK = "onnxruntime float32, torch's export"
SHAPES = ((1, 32), (1, 128), (1, 256), (32, 128))
PIPELINES = {
    "float": "canonicalize,fuse",
    "W8A8": "canonicalize,fuse,quantize{scheme=W8A8}",
    "W8A8 per token": "canonicalize,fuse,quantize{scheme=W8A8,activations=token}",
    "W8A16": "canonicalize,fuse,quantize{scheme=W8A16}",
    "W4A16": "canonicalize,fuse,quantize{scheme=W4A16_ASYM,group_size=32}",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One model of the table: how to run it, and the file it is."""

    name: str
    embed: Callable[[Mapping[str, Array]], Array]
    file: Path


def compiled_rows(module: job.SentenceEmbedder, exported: Path, folder: Path) -> list[Row]:
    """Compile every pipeline from the module, and the float and W8A8 ones from the ONNX file too."""
    rows = []
    # The kernels are chosen for the numbers of tokens that will be run.
    target = planish.get_target("onnxruntime-cpu", rows=tuple(batch * sequence for batch, sequence in SHAPES))
    for name, passes in PIPELINES.items():
        compiled = planish.compile(module, passes, example_inputs=job.example(), target=target)
        rows.append(
            _saved(f"planish {name}", compiled, folder / f"module-{name.lower().replace(' ', '-')}.onnx")
        )
        if name in ("float", "W8A8"):
            from_file = planish.compile(exported, passes, target=target)
            rows.append(
                _saved(f"planish {name}, from ONNX file", from_file, folder / f"onnx-{name.lower()}.onnx")
            )
    return rows


def _saved(name: str, compiled: planish.CompiledModel, path: Path) -> Row:
    """Save, and run the file with plain onnxruntime, as somebody would who only received it."""
    compiled.save(path)
    return Row(name=name, embed=peers.OnnxruntimePeer(path), file=path)


def peer_rows(exported: Path, folder: Path) -> list[Row]:
    """The recipes in use today."""
    optimized = peers.transformers_optimizer(
        peers.torchscript_export(folder / "torchscript.onnx"), folder / "optimizer.onnx"
    )
    rows = [
        Row(name=name, embed=peer, file=peer.path)
        for name, peer in {
            "onnxruntime optimizer float32": peers.OnnxruntimePeer(optimized),
            "onnxruntime optimizer + quantize_dynamic": peers.OnnxruntimePeer(
                peers.dynamic_int8(optimized, folder / "optimizer-int8.onnx")
            ),
            "quantize_dynamic on torch's export": peers.OnnxruntimePeer(
                peers.dynamic_int8(exported, folder / "exported-int8.onnx")
            ),
            "OpenVINO float32": peers.OpenVinoPeer(exported, folder / "openvino.xml", precision="f32"),
            "OpenVINO + NNCF int8": peers.OpenVinoPeer(
                exported, folder / "openvino-int8.xml", precision="f32", int8=True
            ),
        }.items()
    ]
    if peers.openvino_runs_bfloat16():
        bfloat16 = peers.OpenVinoPeer(exported, folder / "openvino-bf16.xml", precision="bf16")
        rows.append(Row(name="OpenVINO bfloat16", embed=bfloat16, file=bfloat16.path))
    return rows


def measure(rows: list[Row], reference: Array, repeats: int, console: Console) -> Table:
    """Time and judge every row; one table, latencies as ratios to the first row's."""
    latencies = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("timing, in turns", total=len(SHAPES))
        for batch, sequence in SHAPES:
            feeds = job.random_feeds(batch, sequence)
            latencies[batch, sequence] = interleaved_latency(
                {row.name: functools.partial(row.embed, feeds) for row in rows},
                repeats=repeats if batch == 1 else max(4, repeats // 4),
            )
            progress.advance(task)
    table = Table(
        "model",
        "MB",
        *(f"b{batch} s{sequence}" for batch, sequence in SHAPES),
        "cosine mean",
        "cosine min",
        "nearest",
    )
    for row in rows:
        quality = job.judge(row.embed, reference)
        ratios = [_cell(latencies[shape], row.name, rows[0].name) for shape in SHAPES]
        table.add_row(
            row.name,
            f"{row.file.stat().st_size / 1e6:.1f}",
            *ratios,
            f"{quality.cosine_mean:.4f}",
            f"{quality.cosine_min:.4f}",
            f"{quality.nearest_agreement:.1%}",
        )
    return table


def _cell(latency: Mapping[str, Latency], name: str, yardstick: str) -> str:
    ratio = latency[name].median_ms / latency[yardstick].median_ms
    return f"{latency[name].median_ms:.1f} ms" if name == yardstick else f"{ratio:.2f} ×"


def write_markdown(table: Table, path: Path) -> None:
    """The table as the repository keeps it, with the machine that it was measured on."""
    cells = [list(column.cells) for column in table.columns]
    lines = [
        "# The main job: all-MiniLM-L6-v2 on CPU",
        "",
        f"{processor()}; onnxruntime {onnxruntime.__version__}, default threads. Latency relative to the "
        "first row (smaller is faster), medians of runs in turns; cosine and nearest neighbour against the "
        "float32 torch module over 240 sentences.",
        "",
        "| " + " | ".join(str(column.header) for column in table.columns) + " |",
        "|" + "---|" * len(table.columns),
        *("| " + " | ".join(str(cell) for cell in row) + " |" for row in zip(*cells, strict=True)),
        "",
        "Written by `benchmarks/sentence_embeddings.py --peers`.",
        "",
    ]
    path.write_text("\n".join(lines))


def processor() -> str:
    """The processor's name and the vector extensions that decide which kernels are fast."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields = dict(
        (part.strip() for part in line.split(":", 1)) for line in info.read_text().splitlines() if ":" in line
    )
    flags = fields.get("flags", "").split()
    extensions = [name for name in ("avx2", "avx512f", "avx512_vnni", "amx_int8") if name in flags]
    return f"{fields.get('model name', platform.machine())} ({', '.join(extensions)}), {platform.system()}"


def main() -> None:
    """Run the job and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peers", action="store_true", help="add today's recipes; writes the results table")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="where the files go")
    parser.add_argument("--repeats", type=int, default=48, help="timed calls of each model at batch 1")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    console = Console(width=140)
    module = job.load_module()
    reference = job.reference_embeddings(module)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        exported = peers.dynamo_export(module, folder / "exported.onnx")
        rows = [Row(name=YARDSTICK, embed=peers.OnnxruntimePeer(exported), file=exported)]
        rows += compiled_rows(module, exported, arguments.output)
        if arguments.peers:
            rows += peer_rows(exported, folder)
        table = measure(rows, reference, arguments.repeats, console)
    console.print(table)
    console.print(f"files: {arguments.output.resolve()}")
    if arguments.peers:
        write_markdown(table, Path(__file__).parent / "results" / "sentence_embeddings.md")


if __name__ == "__main__":
    main()
