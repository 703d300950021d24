"""Speed of a decoder, token by token and of its prompt: planish beside onnxruntime-genai and llama.cpp.

The model is a random Llama of 16 layers, hidden size 1,024, 16 heads of queries and 4 of keys and values,
batch 1. Every contender is brought to a context (peers run it, planish's caches are filled with random
numbers), and then all of them generate bursts of tokens in turns; after each burst they are set back. A
contender's figure is the median of its bursts. The time to the first token is that of a prompt of 512 tokens
and one token behind it, again in turns.

    python benchmarks/decode_speed.py --peers FOLDER            # writes decode_speed.md and first_token.md
    python benchmarks/decode_speed.py --peers FOLDER --prompts  # only the second
    python benchmarks/decode_speed.py --contexts 128 --bursts 3 --only W4A16

The peers are given the same weights: onnxruntime-genai by its own builder (int4, groups of 128), llama.cpp in
Q4_0. FOLDER is where ``pip install --target FOLDER onnxruntime-genai llama-cpp-python gguf`` put them.

The bandwidth that figures are compared with is that of summing 1 GB of floats with all cores, measured in the
same run; a token has to read all weights but the embedding table, and the cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import operator
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import decoder_peers
import numpy as np
import onnx_ir as ir
import planish
import torch
import transformers
from decoder_peers import ROOM, Tokens
from planish.ir import clone
from planish.runtime.compiled_model import CompiledModel
from rich.console import Console
from sentence_embeddings import processor

LAYERS, HIDDEN, HEADS, KV_HEADS, INNER, VOCABULARY = 16, 1024, 16, 4, 2816, 32000
CONTEXTS = (128, 1024, 4096, 16384)
_PROMPT = 512
_PAUSE = 0.1
"""Seconds."""
_WEIGHTS = "quantize{scheme=W4A16,group_size=128,ignore=[],algorithm=rtn}"
_BY_CHANNEL = "quantize{scheme=W4A8,group_size=-1,ignore=[],algorithm=rtn}"
SCHEMES: Mapping[str, str] = {
    "float32": "canonicalize,fuse,raise-cache,last-logits",
    "W4A16": f"canonicalize,fuse,{_WEIGHTS},raise-cache,last-logits",
    "W4A16, int8 cache": f"canonicalize,fuse,kv-cache{{bits=8}},{_WEIGHTS},last-logits",
    "W4A16, int4 cache": f"canonicalize,fuse,kv-cache{{bits=4}},{_WEIGHTS},last-logits",
    "W4A8 by channel": f"canonicalize,fuse,{_BY_CHANNEL},raise-cache,last-logits",
}
_TWO_SETS = ("W4A16", "W4A8 by channel")
"""Schemes that are also run by two sets of kernels: for prompts, and for one token."""
_RESULTS = Path(__file__).parent / "results" / "decode_speed.md"
_FIRST_TOKEN = _RESULTS.with_name("first_token.md")


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
        fast_prefill: with kernels of their own for prompts.
    """

    def __init__(self, name: str, compiled: CompiledModel, *, fast_prefill: bool = False) -> None:
        self.name, self._compiled, self._fast_prefill = name, compiled, fast_prefill
        self._weights = _bytes_read(compiled)

    def fill(self, context: int) -> None:
        """Random numbers for a cache: how long a token takes does not depend on them."""
        self._decoder = self._compiled.decoder(capacity=context + ROOM, fast_prefill=self._fast_prefill)
        rng = np.random.default_rng(0)
        kept = {
            slot.present: (10 * rng.standard_normal((1, slot.heads, context, slot.size))).astype(slot.dtype)
            for slot in self._decoder.cache.slots
        }
        self._decoder.restore(decoder_peers.context_of(configuration(), context)[None], kept)
        cache = self._decoder.cache.bytes
        self.bytes_per_token = self._weights + cache * context / (context + ROOM)

    def burst(self, tokens: int) -> float:
        """Greedy, as `generate` does it."""
        start, length = time.perf_counter(), self._decoder.length
        token = np.array([[1]])
        for _ in range(tokens):
            token = self._decoder.forward(token)[:, -1].argmax(axis=-1)[:, None]
        seconds = time.perf_counter() - start
        self._decoder.truncate(length)
        return seconds

    def first_token(self, prompt: Tokens) -> float:
        """Run a prompt [length] with an empty cache: seconds until its first token."""
        decoder = self._compiled.decoder(capacity=len(prompt) + 1, fast_prefill=self._fast_prefill)
        start = time.perf_counter()
        decoder.forward(prompt[None])[:, -1].argmax(axis=-1)
        return time.perf_counter() - start

    def more_memory(self) -> int:
        """What its kernels for prompts take, as stated: bytes."""
        stated = (self._compiled.memory(1, _PROMPT, fast_prefill=fast).total for fast in (True, False))
        return operator.sub(*stated) if self._fast_prefill else 0


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


def configuration() -> transformers.LlamaConfig:
    """Of the random Llama."""
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=max(CONTEXTS) + 128,
        tie_word_embeddings=False,
    )


def module() -> transformers.LlamaForCausalLM:
    """The random Llama."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(configuration()).eval()


def traced(source: transformers.LlamaForCausalLM) -> ir.Model:
    """Its graph, from which all schemes are compiled: tracing takes most of the time."""
    return planish.compile(source, "canonicalize", target="portable").model


def compiled(graph: ir.Model, passes: str) -> CompiledModel:
    """By one scheme; random tokens are data enough for random weights."""
    calibration = [{"input_ids": np.random.default_rng(1).integers(0, VOCABULARY, (4, 128))}]
    return planish.compile(clone(graph), passes, calibration=calibration)


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
            # Threads of the one before spin for a while when they have nothing to do.
            time.sleep(_PAUSE)
            contender.burst(2)
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


def measure_prefill(contenders: Sequence[Contender], rounds: int) -> dict[str, float]:
    """Seconds to the first token, all contenders in turns."""
    prompt = np.random.default_rng(0).integers(3, VOCABULARY, _PROMPT)
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        contender.first_token(prompt)
    for _ in range(rounds):
        for contender in contenders:
            time.sleep(_PAUSE)
            seconds[contender.name].append(contender.first_token(prompt))
    return {name: statistics.median(times) for name, times in seconds.items()}


def prefill_lines(contenders: Sequence[Contender], found: Mapping[str, float], machine: str) -> list[str]:
    """Markdown."""
    return [
        "# Time to the first token",
        "",
        f"A prompt of {_PROMPT} tokens with an empty cache; the model of decode_speed.md on {machine}. What "
        "kernels of their own for prompts take is as `memory` states it. Written by "
        "`benchmarks/decode_speed.py`.",
        "",
        "| | ms | more memory, MB |",
        "|---|---|---|",
        *(
            f"| {one.name} | {1000 * found[one.name]:.0f} | {_more_memory(one) / 1e6:.0f} |"
            for one in contenders
        ),
        "",
    ]


def _more_memory(contender: Contender) -> int:
    return contender.more_memory() if isinstance(contender, Planish) else 0


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


def contenders_of(arguments: argparse.Namespace, source: transformers.LlamaForCausalLM) -> list[Contender]:
    """Compile planish's schemes, and open the peers that are there."""
    found: list[Contender] = []
    graph = traced(source)
    for name, passes in SCHEMES.items():
        if arguments.only in name:
            model = compiled(graph, passes)
            found.append(Planish(f"planish {name}", model))
            if name in _TWO_SETS:
                found.append(Planish(f"planish {name}, two sets of kernels", model, fast_prefill=True))
    if arguments.peers is not None:
        sys.path.append(str(arguments.peers))
        found += peers(source, arguments.output)
    return found


def peers(source: transformers.LlamaForCausalLM, output: Path) -> list[Contender]:
    """Those that can be imported."""
    config, found = source.config, list[Contender]()
    if importlib.util.find_spec("onnxruntime_genai"):
        folder = decoder_peers.build_for_genai(source, output)
        found.append(decoder_peers.GenAI("onnxruntime-genai, int4", config, folder))
    if importlib.util.find_spec("llama_cpp"):
        found.append(decoder_peers.LlamaCpp(config, decoder_peers.write_gguf(source, output)))
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="where the peers are installed")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="tokens in the cache")
    parser.add_argument("--bursts", type=int, default=9, help="of each contender")
    parser.add_argument("--tokens", type=int, default=16, help="of a burst")
    parser.add_argument("--prompts", action="store_true", help="only the time to the first token")
    parser.add_argument("--only", default="", help="planish's schemes whose name contains this")
    parser.add_argument("--output", type=Path, default=Path("demo-output/decode-speed"), help="work folder")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    console = Console(width=160, highlight=False)
    contenders = contenders_of(arguments, module())
    limit = bandwidth()
    found = {}
    for context in () if arguments.prompts else arguments.contexts:
        found[context] = measure(
            contenders, context, bursts=arguments.bursts, tokens=arguments.tokens, limit=limit
        )
        console.print(f"[dim]{context}: {found[context]}[/dim]")
    prefill = measure_prefill(contenders, arguments.bursts)
    console.print(f"[dim]{prefill}[/dim]")
    texts = {_FIRST_TOKEN: "\n".join(prefill_lines(contenders, prefill, processor()))}
    if not arguments.prompts:
        texts[_RESULTS] = "\n".join(lines(found, limit, processor()))
    for path, text in texts.items():
        if arguments.only or tuple(arguments.contexts) != CONTEXTS or arguments.peers is None:
            print(text)
        else:
            path.write_text(text)


if __name__ == "__main__":
    main()
