"""GPTQ side by side with the implementations that people use: the same model, data and scheme, judged alike.

Each implementation quantises the linears of a model in a process of its own, in turns; its dequantised
weights are put back into the torch model, and that model's perplexity is measured here. Two models: the
trained one of `wikilm`, and a larger random decoder for wall time alone.

    python benchmarks/gptq_peers.py                       # planish, onnxruntime, nncf: the `bench` extra
    python benchmarks/gptq_peers.py --peer gptqmodel=/path/to/its/bin/python --peer llmcompressor=…

onnxruntime and nncf come with ``.[bench]``. The others want other versions of torch and transformers, so each
lives in an environment of its own that is named by its interpreter. Seen to run on CPU with torch 2.13 and
transformers 5.23, installed first, though their own requirements are narrower (then ``--no-deps``):
llmcompressor 0.14.0.1, neural-compressor-pt 3.10 (which needs accelerate and does not ask for it) and
gptqmodel 7.7.0. Not: auto-gptq 0.7.1, which imports what transformers 5 no longer has.

Writes ``benchmarks/results/gptq_peers.md``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import planish
import tokenizers
import torch
import transformers
import wikilm
from gptq_workers import WORKERS
from rich.console import Console
from safetensors.numpy import load_file
from sentence_embeddings import processor

Array = np.ndarray[Any, Any]
OURS, PUBLISHED = "planish", "planish-as-published"
BUNDLED = (OURS, PUBLISHED, "onnxruntime", "nncf")
"""Run with this interpreter; the others with the one that --peer names."""
_TIMEOUT_SECONDS = 3600


@dataclass(frozen=True)
class Scheme:
    """Bits, rows that share a grid (−1: all of a channel's), and whether the grid has zero points."""

    bits: int
    group_size: int
    symmetric: bool = False

    def __str__(self) -> str:
        group = "per channel" if self.group_size < 0 else f"g{self.group_size}"
        return f"W{self.bits} {group} {'symmetric' if self.symmetric else 'asymmetric'}"


SCHEMES = (Scheme(4, 32),)
RANDOM_SCHEME = Scheme(4, 128)


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is quantised, and on what."""

    name: str
    module: transformers.LlamaForCausalLM
    calibration: Array
    evaluation: Array | None
    """Windows to measure perplexity on; None measures time only."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run of one implementation."""

    model: str
    scheme: Scheme
    implementation: str
    version: str = ""
    seconds: float = float("nan")
    perplexity: float = float("nan")
    failure: str = ""


def trained_model(found: wikilm.WikiLM, arguments: argparse.Namespace) -> Model:
    """The trained model with its calibration and evaluation windows."""
    return Model(
        name="wikilm",
        module=found.load(),
        calibration=found.calibration_windows(arguments.calibration),
        evaluation=found.evaluation_windows(arguments.windows),
    )


def random_model(layers: int, hidden: int, samples: int) -> Model:
    """A random decoder; 512 random tokens a sample."""
    config = transformers.LlamaConfig(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (samples, 512))
    return Model(
        name=f"random decoder, {layers} layers of {hidden}",
        module=transformers.LlamaForCausalLM(config).eval(),
        calibration=tokens,
        evaluation=None,
    )


def write_job(model: Model, scheme: Scheme, folder: Path) -> None:
    """The folder that a worker reads; the model's files are written once."""
    if not (folder / "model").exists():
        model.module.save_pretrained(folder / "model")
        # Some implementations load a tokenizer with every model, and never use it here.
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
        transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder / "model")
        # Canonical and not fused: plain MatMuls, whose weights carry the modules' names.
        planish.compile(model.module, "canonicalize", target="portable").save(folder / "model.onnx")
        np.save(folder / "calibration.npy", model.calibration)
    job = {"bits": scheme.bits, "group_size": scheme.group_size, "symmetric": scheme.symmetric}
    (folder / "job.json").write_text(json.dumps(job))


def run(implementation: str, interpreter: str, model: Model, scheme: Scheme, folder: Path) -> Result:
    """One implementation in a process of its own, and what its weights are worth."""
    for name in ("weights.safetensors", "result.json"):
        (folder / name).unlink(missing_ok=True)
    worker = Path(__file__).with_name("gptq_workers.py")
    process = subprocess.run(
        [interpreter, str(worker), implementation, str(folder)],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_SECONDS,
        check=False,
    )
    subject = {"model": model.name, "scheme": scheme, "implementation": implementation}
    if process.returncode:
        lines = process.stderr.strip().splitlines() or ["no message"]
        return Result(**subject, failure=lines[-1][:200])
    outcome = json.loads((folder / "result.json").read_text())
    value = float("nan")
    if model.evaluation is not None:
        value = quantized_perplexity(model, load_file(folder / "weights.safetensors"))
    return Result(**subject, **outcome, perplexity=value)


def quantized_perplexity(model: Model, weights: Mapping[str, Array]) -> float:
    """Perplexity of the model with other weights in all of its linears but the head.

    Raises:
        ValueError: the implementation left a linear out, or invented one.
    """
    linears = {
        name: module
        for name, module in model.module.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    if set(linears) != set(weights):
        raise ValueError(f"other linears than asked for: {sorted(set(linears) ^ set(weights))}")
    dense = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    assert model.evaluation is not None
    try:
        with torch.no_grad():
            for name, linear in linears.items():
                linear.weight.copy_(torch.from_numpy(weights[name]))
        return wikilm.perplexity(wikilm.module_logits(model.module), model.evaluation)
    finally:
        with torch.no_grad():
            for name, linear in linears.items():
                linear.weight.copy_(dense[name])


def results(
    model: Model, schemes: Sequence[Scheme], interpreters: Mapping[str, str], console: Console
) -> Iterator[Result]:
    """Every implementation on every scheme, in turns."""
    with tempfile.TemporaryDirectory() as temporary:
        for scheme in schemes:
            write_job(model, scheme, Path(temporary))
            for implementation, interpreter in interpreters.items():
                result = run(implementation, interpreter, model, scheme, Path(temporary))
                said = result.failure or f"{result.perplexity:.3f}, {result.seconds:.1f} s"
                console.print(f"{model.name}: {scheme}: {implementation}: {said}")
                yield result


def table(rows: Sequence[Result], dense: float | None) -> list[str]:
    """One model's table: perplexity and seconds, and both relative to ours."""
    ours = {row.scheme: row for row in rows if row.implementation == OURS}
    lines = [
        "| scheme | implementation | perplexity | gap to dense | ours / theirs | seconds | ours / theirs |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"{row.implementation} {row.version}"
        if row.failure:
            lines.append(f"| {row.scheme} | {name} | {row.failure} | | | | |")
            continue
        mine = ours.get(row.scheme, row)
        quality = ["", "", ""]
        if dense is not None:
            gap = f"{row.perplexity / dense - 1:+.2%}"
            quality = [f"{row.perplexity:.3f}", gap, f"{mine.perplexity / row.perplexity:.4f}"]
        cells = [*quality, f"{row.seconds:.1f}", f"{mine.seconds / row.seconds:.2f}"]
        lines.append(f"| {row.scheme} | {name} | " + " | ".join(cells) + " |")
    return lines


def verdict(rows: Sequence[Result]) -> list[str]:
    """The goals: perplexity no more than 0.5 % worse than any peer's, time no more than theirs."""
    lines = ["| | goal | met | not met against |", "|---|---|---|---|"]
    for name in (OURS, PUBLISHED):
        ours = {
            (row.model, row.scheme): row for row in rows if row.implementation == name and not row.failure
        }
        pairs = [
            (ours[row.model, row.scheme], row)
            for row in rows
            if row.implementation not in (OURS, PUBLISHED)
            and not row.failure
            and (row.model, row.scheme) in ours
        ]
        judged = [(mine, row) for mine, row in pairs if row.perplexity == row.perplexity]
        worse = [_where(row) for mine, row in judged if mine.perplexity > 1.005 * row.perplexity]
        slower = [_where(row) for mine, row in pairs if mine.seconds > row.seconds]
        for goal, missed, total in (
            ("perplexity at most 0.5 % worse", worse, len(judged)),
            ("time at most theirs", slower, len(pairs)),
        ):
            met = f"{total - len(missed)} of {total}"
            lines.append(f"| {name} | {goal} | {met} | {'; '.join(missed) or 'none'} |")
    return lines


def _where(row: Result) -> str:
    return f"{row.implementation} on {row.model}, {row.scheme}"


def write_markdown(path: Path, rows: Sequence[Result], dense: float, arguments: argparse.Namespace) -> None:
    """The tables as the repository keeps them."""
    lines = [
        "# GPTQ against other implementations, on CPU",
        "",
        f"{processor()}; torch {torch.__version__}. All linears but the head, 1 % damping (NNCF: 10 %). "
        "planish runs with its defaults (columns reordered, clipping searched, result refined) and, "
        "*as published*, without any of that, as the peers do. "
        f"Calibration on {arguments.calibration} windows of {wikilm.CONTEXT} tokens. "
        f"Perplexity of the dequantised weights in the torch model, {arguments.windows} windows; dense "
        f"{dense:.3f}. Seconds from a loaded model to quantised weights. Each run is a process of its own, "
        "in turns.",
        "",
        *verdict(rows),
    ]
    for model in dict.fromkeys(row.model for row in rows):
        part = [row for row in rows if row.model == model]
        lines += ["", f"## {model}", "", *table(part, dense if model == "wikilm" else None)]
    lines += ["", "Written by `benchmarks/gptq_peers.py`.", ""]
    path.write_text("\n".join(lines))


def interpreters_of(arguments: argparse.Namespace) -> dict[str, str]:
    """Which interpreter runs which implementation."""
    found = dict.fromkeys(BUNDLED, sys.executable)
    for text in arguments.peer:
        name, _, interpreter = text.partition("=")
        if name not in WORKERS or shutil.which(interpreter) is None:
            raise SystemExit(
                f"--peer {text}: expected NAME=INTERPRETER, NAME one of {', '.join(sorted(WORKERS))}"
            )
        found[name] = interpreter
    only = arguments.only or found
    return {name: interpreter for name, interpreter in found.items() if name in (*only, OURS, PUBLISHED)}


def main() -> None:
    """Run and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    wikilm.add_arguments(parser)
    parser.add_argument("--calibration", type=int, default=48, help="calibration windows")
    parser.add_argument("--peer", action="append", default=[], help="NAME=INTERPRETER of its environment")
    parser.add_argument("--only", nargs="*", help="only these implementations (and planish)")
    parser.add_argument("--quick", action="store_true", help="one scheme, a small random decoder, no table")
    arguments = parser.parse_args()
    console = Console()
    interpreters = interpreters_of(arguments)
    trained = trained_model(wikilm.WikiLM.find(arguments.shared), arguments)
    assert trained.evaluation is not None
    dense = wikilm.perplexity(wikilm.module_logits(trained.module), trained.evaluation)
    console.print(f"dense {dense:.3f}")
    decoder = random_model(2, 256, 8) if arguments.quick else random_model(2, 512, 16)
    rows: list[Result] = []
    for model, schemes in ((trained, SCHEMES), (decoder, (RANDOM_SCHEME,))):
        for result in results(model, schemes, interpreters, console):
            rows.append(result)
            if not arguments.quick:
                # After each, so that an interruption loses one implementation and not all.
                write_markdown(Path(__file__).parent / "results" / "gptq_peers.md", rows, dense, arguments)


if __name__ == "__main__":
    main()
