"""Greedy generation token for token: planish beside transformers and onnxruntime-genai.

Each architecture is a small random decoder, float32. Three prompts of different lengths, alone and together
(padded on the left), are gone on with for 64 tokens by

- transformers' ``generate``: what must come out;
- planish, in place (`raise-cache`) and with caches that grow;
- planish with drafts from the text, and with the prompt in chunks of four;
- onnxruntime-genai, which loads the folder that planish saved. It takes all tokens of an array for text,
  padding too, so its three prompts have one length.

    python benchmarks/same_tokens.py --genai FOLDER      # writes results/same_tokens.md
    python benchmarks/same_tokens.py --only falcon       # prints; without genai, its columns are empty

FOLDER is where ``pip install --no-deps --target FOLDER onnxruntime-genai`` put it; it uses the onnxruntime
that is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import planish
import torch
import transformers
from planish.runtime.generate import PromptLookup
from rich.console import Console

Tokens = npt.NDArray[np.int64]

NEW = 64
_VOCABULARY = 64
_SIZES = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
_TOKENS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
MODELS: Mapping[str, Callable[[], torch.nn.Module]] = {
    "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_GROUPED, **_TOKENS)),
    "Mistral, window 16": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**_GROUPED, **_TOKENS, sliding_window=16)
    ),
    "Qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**_without(_GROUPED, "head_dim"), **_TOKENS)
    ),
    "Qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_GROUPED, **_TOKENS)),
    "Gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**_GROUPED, **_TOKENS)),
    "Gemma 2, window 16": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**_GROUPED, **_TOKENS, sliding_window=16)
    ),
    "Gemma 3, window 16": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**_GROUPED, **_TOKENS, sliding_window=16)
    ),
    "Phi-3": lambda: transformers.Phi3ForCausalLM(
        transformers.Phi3Config(**_without(_GROUPED, "head_dim"), **_TOKENS)
    ),
    "GPT-2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=_VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, **_TOKENS
        )
    ),
    "OPT": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=_VOCABULARY,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=32,
            **_TOKENS,
        )
    ),
    "Falcon, multi-query": lambda: transformers.FalconForCausalLM(
        transformers.FalconConfig(
            **_without(_SIZES, "intermediate_size"),
            multi_query=True,
            alibi=False,
            max_position_embeddings=128,
            **_TOKENS,
        )
    ),
}
_RESULTS = Path(__file__).parent / "results" / "same_tokens.md"


def _without(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != name}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One architecture.

    Attributes:
        name: of the architecture.
        kernel: that its attentions were bound to.
        same: by way of generating and number of prompts, whether all tokens were equal; or the error.
    """

    name: str
    kernel: str
    same: Mapping[tuple[str, int], str]


def prompts() -> tuple[Tokens, Tokens]:
    """Three prompts of 9, 5 and 7 tokens, and their mask, [3, 9]."""
    ids = np.random.default_rng(0).integers(3, _VOCABULARY, (3, 9))
    mask = np.ones_like(ids)
    mask[1, :4], mask[2, :2] = 0, 0
    return ids * mask, mask


def reference(module: torch.nn.Module, ids: Tokens, mask: Tokens) -> Tokens:
    """What transformers generates, [batch, 9 + 64]."""
    tokens: Tokens = module.generate(
        torch.as_tensor(ids),
        attention_mask=torch.as_tensor(mask),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    ).numpy()
    return tokens


def by_genai(site: Path, folder: Path, ids: Tokens) -> Tokens:
    """What onnxruntime-genai generates from a saved folder."""
    if str(site) not in sys.path:
        sys.path.append(str(site))
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(batch_size=len(ids), max_length=ids.shape[1] + NEW, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return np.stack([np.asarray(generator.get_sequence(row), np.int64) for row in range(len(ids))])


def measure(name: str, site: Path | None) -> Row:
    """Generate in every way and compare."""
    torch.manual_seed(0)
    module = MODELS[name]().eval()
    target = planish.get_target("onnxruntime-cpu", threads=1)
    in_place = planish.compile(module, "canonicalize,fuse,raise-cache", target=target)
    growing = planish.compile(module, "canonicalize,fuse", target=target)
    ids, mask = prompts()
    same: dict[tuple[str, int], str] = {}
    with tempfile.TemporaryDirectory() as folder:
        in_place.save(Path(folder) / "decoder")
        for batch in (1, 3):
            given, shown = ids[:batch], mask[:batch]
            expected = reference(module, given, shown)
            ways: dict[str, Callable[[], Tokens]] = {
                "in place": lambda g=given, s=shown: in_place.generate(g, NEW, attention_mask=s),
                "growing": lambda g=given, s=shown: growing.generate(g, NEW, attention_mask=s),
            }
            if batch == 1:
                ways["drafts"] = lambda: in_place.generate(ids[:1], NEW, draft=PromptLookup(shortest=1))
                ways["chunks"] = lambda: in_place.generate(ids[:1], NEW, chunk=4)
            for way, run in ways.items():
                same[way, batch] = outcome(run, expected)
            if site is not None:
                same["genai", batch] = outcome(
                    lambda g=given: by_genai(site, Path(folder) / "decoder", g),
                    reference(module, given, np.ones_like(shown)),
                )
    kernels = {
        binding.kernel for binding in in_place.bound.bindings if binding.op.endswith("CachedAttention")
    }
    return Row(name=name, kernel=", ".join(sorted(kernels)), same=same)


def outcome(run: Callable[[], Tokens], expected: Tokens) -> str:
    """``yes``, how many tokens are equal before the first difference, or the error."""
    try:
        found = run()
    except (planish.PlanishError, RuntimeError) as error:
        return str(error).splitlines()[0]
    if found.shape != expected.shape:
        return f"shape {list(found.shape)}"
    if (found == expected).all():
        return "yes"
    return f"up to {int((found != expected).any(axis=0).argmax()) - expected.shape[1] + NEW} of {NEW}"


def table(rows: list[Row]) -> list[str]:
    """Markdown."""
    columns = [("in place", 1), ("in place", 3), ("growing", 1), ("growing", 3)]
    columns += [("drafts", 1), ("chunks", 1), ("genai", 1), ("genai", 3)]
    names = [f"{way}, {batch} prompt{'s' if batch > 1 else ''}" for way, batch in columns]
    lines = [
        "# Same tokens",
        "",
        f"Whether {NEW} tokens, generated greedily in float32, are those of transformers "
        f"{transformers.__version__}. Written by `benchmarks/same_tokens.py`.",
        "",
        f"| architecture | kernel | {' | '.join(names)} |",
        "|---|---|" + "---|" * len(columns),
    ]
    for row in rows:
        cells = [row.same.get(column, "–") for column in columns]
        lines.append(f"| {row.name} | {row.kernel} | {' | '.join(cells)} |")
    return [*lines, ""]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--genai", type=Path, metavar="FOLDER", help="where onnxruntime-genai is")
    parser.add_argument("--only", default="", help="architectures whose name contains this")
    arguments = parser.parse_args()
    console = Console(width=160, highlight=False)
    rows = []
    for name in MODELS:
        if arguments.only.lower() in name.lower():
            rows.append(measure(name, arguments.genai))
            console.print(f"[dim]{rows[-1]}[/dim]")
    lines = table(rows)
    if arguments.only or arguments.genai is None:
        print("\n".join(lines))
    else:
        _RESULTS.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
