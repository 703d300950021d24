"""Speed of a decoder, token by token and of its prompt: planish beside onnxruntime-genai and llama.cpp.

The model is a random Llama of 16 layers, hidden size 1,024, 16 heads of queries and 4 of keys and values,
batch 1. Every contender is brought to a context (its cache filled), and then all of them generate bursts of
tokens in turns; after each burst they are set back. A contender's figure is the median of its bursts. The
time to the first token is that of a prompt of 512 tokens and one token behind it, again in turns.

    python benchmarks/decode_speed.py --genai FOLDER            # writes results/decode_speed.md
    python benchmarks/decode_speed.py --contexts 128 --bursts 3 --only W4A16

onnxruntime-genai is given the same weights by its own builder (int4, groups of 128); FOLDER is where
``pip install --no-deps --target FOLDER onnxruntime-genai`` put it. llama.cpp runs where ``llama_cpp`` can be
imported and ``--gguf`` names the model in Q4_0.

The bandwidth that figures are compared with is that of summing 1 GB of floats with all cores, measured in the
same run; a token has to read all weights but the embedding table, and the cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import planish
import torch
import transformers
from planish.runtime.compiled_model import CompiledModel
from rich.console import Console
from sentence_embeddings import processor

Tokens = npt.NDArray[np.int64]

LAYERS, HIDDEN, HEADS, KV_HEADS, INNER, VOCABULARY = 16, 1024, 16, 4, 2816, 32000
CONTEXTS = (128, 1024, 4096, 16384)
_CHUNK = 256
_PROMPT = 512
_WEIGHTS = "quantize{scheme=W4A16,group_size=128,ignore=[]}"
_BY_CHANNEL = "quantize{scheme=W4A8,group_size=-1,ignore=[]}"
SCHEMES: Mapping[str, str] = {
    "float32": "canonicalize,fuse,raise-cache,last-logits",
    "W4A16": f"canonicalize,fuse,{_WEIGHTS},raise-cache,last-logits",
    "W4A16, int8 cache": f"canonicalize,fuse,kv-cache{{bits=8}},{_WEIGHTS},last-logits",
    "W4A16, int4 cache": f"canonicalize,fuse,kv-cache{{bits=4}},{_WEIGHTS},last-logits",
    "W4A8 by channel": f"canonicalize,fuse,{_BY_CHANNEL},raise-cache,last-logits",
}
_FAST_PREFILL = ("W4A16", "W4A8 by channel")
"""Schemes whose prompts are also run by kernels of their own."""
_RESULTS = Path(__file__).parent / "results" / "decode_speed.md"


class Contender(Protocol):
    """One way to generate."""

    name: str
    bytes_per_token: float
    """Of weights and cache that a token reads at the present context."""

    def fill(self, context: int) -> None:
        """Have a cache of so many tokens."""

    def burst(self, tokens: int) -> float:
        """Generate so many tokens from there, and go back: seconds."""

    def first_token(self, prompt: Tokens) -> float:
        """Run a prompt [length] with an empty cache: seconds until its first token."""


class Planish:
    """A compiled model.

    Args:
        name: as the table shows it.
        compiled: the model.
    """

    def __init__(self, name: str, compiled: CompiledModel) -> None:
        self.name, self.compiled = name, compiled
        self._weights = _bytes_read(compiled)

    def fill(self, context: int) -> None:
        """Run random tokens in chunks."""
        room = context + 64
        self._decoder = self.compiled.decoder(capacity=room)
        ids = np.random.default_rng(0).integers(0, VOCABULARY, (1, context))
        for start in range(0, context, _CHUNK):
            self._decoder.forward(ids[:, start : start + _CHUNK])
        cache = self._decoder.cache
        self.bytes_per_token = self._weights + cache.bytes * context / room

    def burst(self, tokens: int) -> float:
        """Greedy, as `generate` does it."""
        start, length = time.perf_counter(), self._decoder.length
        token = np.array([[1]])
        for _ in range(tokens):
            token = self._decoder.forward(token)[:, -1].argmax(axis=-1)[:, None]
        seconds = time.perf_counter() - start
        self._decoder.truncate(length)
        return seconds

    def first_token(self, prompt: Tokens, *, fast: bool = False) -> float:
        """By the kernels that decode, or by those for many tokens."""
        decoder = self.compiled.decoder(capacity=len(prompt) + 1, fast_prefill=fast)
        start = time.perf_counter()
        decoder.forward(prompt[None])[:, -1].argmax(axis=-1)
        return time.perf_counter() - start


class FastPrefill(Planish):
    """A compiled model whose prompts are run by kernels of their own."""

    def first_token(self, prompt: Tokens, *, fast: bool = True) -> float:
        """See `Planish`."""
        return super().first_token(prompt, fast=fast)


def _bytes_read(compiled: CompiledModel) -> int:
    """Weights but embedding tables, of which a token reads one row."""
    graph = compiled.bound.model.graph
    tables = {
        value.name
        for node in graph
        if node.op_type in ("Gather", "GatherBlockQuantized")
        for value in node.inputs
        if value is not None and value.is_initializer()
    }
    return sum(
        value.const_value.nbytes
        for name, value in graph.initializers.items()
        if name not in tables and value.const_value is not None
    )


class GenAI:
    """onnxruntime-genai on a folder.

    Args:
        name: as the table shows it.
        folder: with ``genai_config.json``.
        weights: bytes that a token reads.
    """

    def __init__(self, name: str, folder: Path, weights: int) -> None:
        import onnxruntime_genai as genai

        self.name, self._weights, self._genai = name, weights, genai
        self._model = genai.Model(str(folder))

    def fill(self, context: int) -> None:
        """Append random tokens in chunks."""
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=context + 64, do_sample=False)
        self._generator = self._genai.Generator(self._model, parameters)
        ids = np.random.default_rng(0).integers(3, VOCABULARY, context).astype(np.int32)
        for start in range(0, context, _CHUNK):
            self._generator.append_tokens(ids[start : start + _CHUNK])
        self._context = context
        cache = 2 * LAYERS * KV_HEADS * (HIDDEN // HEADS) * 4 * context
        self.bytes_per_token = self._weights + cache

    def burst(self, tokens: int) -> float:
        """Greedy."""
        self._generator.rewind_to(self._context - 1)
        self._generator.append_tokens(np.array([1], np.int32))
        start = time.perf_counter()
        for _ in range(tokens):
            self._generator.generate_next_token()
        seconds = time.perf_counter() - start
        self._generator.rewind_to(self._context)
        return seconds

    def first_token(self, prompt: Tokens) -> float:
        """All of the prompt at once."""
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=len(prompt) + 8, do_sample=False)
        generator = self._genai.Generator(self._model, parameters)
        start = time.perf_counter()
        generator.append_tokens(prompt.astype(np.int32))
        generator.generate_next_token()
        return time.perf_counter() - start


class LlamaCpp:
    """llama.cpp by its Python binding.

    Args:
        path: of a GGUF file.
    """

    name = "llama.cpp, Q4_0"

    def __init__(self, path: Path) -> None:
        import llama_cpp

        threads = torch.get_num_threads()
        self._model = llama_cpp.Llama(
            str(path), n_ctx=max(CONTEXTS) + 128, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self._weights = path.stat().st_size

    def fill(self, context: int) -> None:
        """Evaluate random tokens."""
        self._model.reset()
        self._model.eval(np.random.default_rng(0).integers(3, VOCABULARY, context).tolist())
        self._context = context
        # Its cache is float16.
        self.bytes_per_token = self._weights + 2 * LAYERS * KV_HEADS * (HIDDEN // HEADS) * 2 * context

    def burst(self, tokens: int) -> float:
        """The same token again and again: what is chosen does not matter for the time."""
        start = time.perf_counter()
        for _ in range(tokens):
            self._model.eval([1])
        seconds = time.perf_counter() - start
        self._model.n_tokens = self._context
        self._model._ctx.kv_cache_seq_rm(-1, self._context, -1)
        return seconds

    def first_token(self, prompt: Tokens) -> float:
        """All of the prompt; the token itself is next to nothing."""
        self._model.reset()
        start = time.perf_counter()
        self._model.eval(prompt.tolist())
        return time.perf_counter() - start


def module() -> torch.nn.Module:
    """The random Llama."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=max(CONTEXTS) + 128,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


def bandwidth() -> float:
    """Bytes per second of summing 1 GB with all cores: the median of seven."""
    data = torch.ones(2**28)
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - start)
    return data.nbytes / statistics.median(seconds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One contender at one context.

    Attributes:
        tokens_per_second: median over bursts.
        ratio: to the best peer; median over rounds.
        share: of the bandwidth.
    """

    tokens_per_second: float
    ratio: float | None
    share: float


def measure(
    contenders: Sequence[Contender], context: int, *, bursts: int, tokens: int, limit: float
) -> dict[str, Figure]:
    """All contenders in turns at one context."""
    for contender in contenders:
        contender.fill(context)
        contender.burst(2)
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for _ in range(bursts):
        for contender in contenders:
            seconds[contender.name].append(contender.burst(tokens))
    peers = [contender.name for contender in contenders if not isinstance(contender, Planish)]
    best = min(peers, key=lambda name: statistics.median(seconds[name]), default=None)
    figures = {}
    for contender in contenders:
        own = seconds[contender.name]
        speed = tokens / statistics.median(own)
        ratio = None
        if best is not None:
            ratio = statistics.median(peer / mine for peer, mine in zip(seconds[best], own, strict=True))
        figures[contender.name] = Figure(
            tokens_per_second=speed, ratio=ratio, share=speed * contender.bytes_per_token / limit
        )
    return figures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefill:
    """One contender's time to the first token.

    Attributes:
        seconds: median.
        memory: bytes by which the process grew for kernels of its own; None without them.
    """

    seconds: float
    memory: int | None = None


def measure_prefill(contenders: Sequence[Contender], rounds: int) -> dict[str, Prefill]:
    """All contenders in turns, and those with kernels for prompts besides."""
    prompt = np.random.default_rng(0).integers(3, VOCABULARY, _PROMPT)
    running = list(contenders)
    grown: dict[str, int] = {}
    for contender in contenders:
        if isinstance(contender, Planish) and contender.name.removeprefix("planish ") in _FAST_PREFILL:
            fast = FastPrefill(f"{contender.name}, own kernels for prompts", contender.compiled)
            before = resident()
            fast.first_token(prompt)
            grown[fast.name] = resident() - before
            running.append(fast)
    seconds: dict[str, list[float]] = {contender.name: [] for contender in running}
    for contender in running:
        contender.first_token(prompt)
    for _ in range(rounds):
        for contender in running:
            seconds[contender.name].append(contender.first_token(prompt))
    return {
        name: Prefill(seconds=statistics.median(times), memory=grown.get(name))
        for name, times in seconds.items()
    }


def resident(name: str = "VmRSS") -> int:
    """Of this process, in bytes: now, or at its peak (``VmHWM``)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def prefill_lines(found: Mapping[str, Prefill]) -> list[str]:
    """Markdown."""
    return [
        "## Time to the first token",
        "",
        f"A prompt of {_PROMPT} tokens, with an empty cache.",
        "",
        "| | ms | more memory, MB |",
        "|---|---|---|",
        *(
            f"| {name} | {1000 * one.seconds:.0f} | {one.memory / 1e6 if one.memory else 0:.0f} |"
            for name, one in found.items()
        ),
        "",
    ]


def lines(found: Mapping[int, Mapping[str, Figure]], limit: float, machine: str) -> list[str]:
    """Markdown."""
    contexts = list(found)
    names = list(next(iter(found.values())))
    result = [
        "# Decode speed",
        "",
        f"A random Llama ({LAYERS} layers, hidden {HIDDEN}, {HEADS} heads of queries and {KV_HEADS} of keys "
        f"and values), batch 1, on {machine}. Tokens per second; × is the ratio to the better peer, % the "
        f"share of {limit / 1e9:.1f} GB/s. Written by `benchmarks/decode_speed.py`.",
        "",
        "| context | " + " | ".join(f"{context:,}" for context in contexts) + " |",
        "|---|" + "---|" * len(contexts),
    ]
    for name in names:
        cells = [_cell(found[context][name]) for context in contexts]
        result.append(f"| {name} | {' | '.join(cells)} |")
    return [*result, ""]


def _cell(figure: Figure) -> str:
    ratio = "" if figure.ratio is None else f", {figure.ratio:.2f} ×"
    return f"{figure.tokens_per_second:.0f} ({figure.share:.0%}{ratio})"


def contenders_of(arguments: argparse.Namespace, source: torch.nn.Module) -> list[Contender]:
    """Compile planish's schemes, and open the peers that are there."""
    found: list[Contender] = []
    calibration = [{"input_ids": np.random.default_rng(1).integers(0, VOCABULARY, (4, 128))}]
    compiled: dict[str, CompiledModel] = {}
    for name, passes in SCHEMES.items():
        if arguments.only in name:
            compiled[name] = planish.compile(source, passes, calibration=calibration)
            found.append(Planish(f"planish {name}", compiled[name]))
    if arguments.genai is not None:
        sys.path.append(str(arguments.genai))
        folder = build_for_genai(source, arguments.output)
        size = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".onnx", ".data"))
        found.append(GenAI("onnxruntime-genai, int4", folder, size - VOCABULARY * HIDDEN * 4))
    if arguments.gguf is not None:
        found.append(LlamaCpp(arguments.gguf))
    return found


def build_for_genai(source: torch.nn.Module, output: Path) -> Path:
    """Save the module for transformers and let onnxruntime-genai's builder make an int4 model of it."""
    from onnxruntime_genai.models import builder

    folder, checkpoint = output / "genai-int4", output / "checkpoint"
    if not (folder / "genai_config.json").exists():
        source.save_pretrained(checkpoint)
        options: dict[str, Any] = {"int4_block_size": 128, "int4_accuracy_level": 4}
        builder.create_model(
            "", str(checkpoint), str(folder), "int4", "cpu", str(output / "cache"), **options
        )
    return folder


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--genai", type=Path, metavar="FOLDER", help="where onnxruntime-genai is")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the model in Q4_0, for llama.cpp")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="tokens in the cache")
    parser.add_argument("--bursts", type=int, default=9, help="of each contender")
    parser.add_argument("--tokens", type=int, default=16, help="of a burst")
    parser.add_argument("--only", default="", help="planish's schemes whose name contains this")
    parser.add_argument("--output", type=Path, default=Path("demo-output/decode-speed"), help="work folder")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    console = Console(width=160, highlight=False)
    contenders = contenders_of(arguments, module())
    limit = bandwidth()
    found = {}
    for context in arguments.contexts:
        found[context] = measure(
            contenders, context, bursts=arguments.bursts, tokens=arguments.tokens, limit=limit
        )
        console.print(f"[dim]{context}: {found[context]}[/dim]")
    prefill = measure_prefill(contenders, arguments.bursts)
    console.print(f"[dim]{prefill}[/dim]")
    text = "\n".join([*lines(found, limit, processor()), *prefill_lines(prefill)])
    if arguments.only or tuple(arguments.contexts) != CONTEXTS or arguments.genai is None:
        print(text)
    else:
        _RESULTS.write_text(text)


if __name__ == "__main__":
    main()
