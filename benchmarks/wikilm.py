"""The small trained language model of the quality measurements: where it is, its windows, its perplexity.

The model (a Llama with 6.5 M parameters) and its text lie outside the repository, in a folder with
``models/wikilm`` and ``data/wikitext2`` that ``--shared`` or the variable ``PLANISH_SHARED`` names; without
either, in ``shared`` beside the repository.

Protocol: `evaluation.txt` is tokenised whole and cut into windows of 385 tokens with stride 384; tokens 2…385
of each window are predicted from those before them in the window. Perplexity is exp of the mean negative log
likelihood per predicted token; float32, summed in float64.

Only torch, transformers and tokenizers are needed here, so that peers that live in another environment can
import this file too.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers

Array = np.ndarray[Any, Any]
Logits = Callable[[Array], Array]
"""Token ids [batch, sequence] int64 in, logits [batch, sequence, vocabulary] float32 out."""

CONTEXT = 384
EVALUATION_WINDOWS = 60
DENSE_PERPLEXITY = 35.56
"""What the model's notes give for the first 60 windows, in float32."""

_OUTLIER_CHANNELS, _OUTLIER_FACTOR = 4, 50.0
_BATCH = 6
"""Windows that are evaluated together: 38 MB of logits."""


@dataclasses.dataclass(frozen=True)
class WikiLM:
    """The model's folder and its text's folder."""

    model: Path
    data: Path

    @classmethod
    def find(cls, shared: Path | None = None) -> WikiLM:
        """The model below ``shared``, or where the environment says, or beside the repository.

        Raises:
            SystemExit: it is not there; the message says what was looked for and how to point to it.
        """
        beside = Path(__file__).resolve().parents[2] / "shared"
        folder = shared or Path(os.environ.get("PLANISH_SHARED", beside))
        found = cls(folder / "models" / "wikilm", folder / "data" / "wikitext2")
        missing = [
            str(path)
            for path in (found.model / "config.json", found.data / "evaluation.txt")
            if not path.exists()
        ]
        if missing:
            raise SystemExit(
                f"the quality model is not there: no {', '.join(missing)}\n"
                "name the folder that holds models/wikilm and data/wikitext2 by --shared or PLANISH_SHARED"
            )
        return found

    def load(self) -> transformers.LlamaForCausalLM:
        """The model, float32, for inference."""
        return load_causal_lm(self.model)

    def calibration_windows(self, count: int = 128, length: int = CONTEXT) -> Array:
        """``count`` windows of the calibration text, spread evenly over it, [count, length] int64."""
        ids = self._tokens("calibration.txt")
        starts = np.linspace(0, len(ids) - length, count).astype(int)
        return np.stack([ids[start : start + length] for start in starts])

    def evaluation_windows(self, count: int = EVALUATION_WINDOWS) -> Array:
        """The first ``count`` windows of the evaluation text, [count, 385] int64."""
        ids = self._tokens("evaluation.txt")
        starts = range(0, count * CONTEXT, CONTEXT)
        return np.stack([ids[start : start + CONTEXT + 1] for start in starts])

    def _tokens(self, file: str) -> Array:
        tokenizer = tokenizers.Tokenizer.from_file(str(self.model / "tokenizer.json"))
        return np.array(tokenizer.encode((self.data / file).read_text(encoding="utf-8")).ids, np.int64)


def load_causal_lm(folder: Path) -> transformers.LlamaForCausalLM:
    """A transformers model from a folder, float32, for inference, without its progress bars."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--shared`` and ``--windows``, alike in all scripts that use the model."""
    parser.add_argument("--shared", type=Path, help="folder with models/wikilm and data/wikitext2")
    parser.add_argument(
        "--windows", type=int, default=EVALUATION_WINDOWS, help="evaluation windows (the table: 60)"
    )


def make_outlier_twin(module: transformers.LlamaForCausalLM, seed: int = 0) -> None:
    """Give the residual stream's norms outlier channels, in place; the function is unchanged.

    Four random channels of every norm before attention and before the MLP are multiplied by 50, and the same
    input columns of the linears that read the norm are divided by 50.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in module.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                channels = torch.randperm(len(norm.weight), generator=generator)[:_OUTLIER_CHANNELS]
                norm.weight[channels] *= _OUTLIER_FACTOR
                for linear in readers:
                    linear.weight[:, channels] /= _OUTLIER_FACTOR


def perplexity(logits: Logits, windows: Array) -> float:
    """Perplexity per token of ``windows`` [count, length + 1]: each token after its window's earlier ones."""
    total = 0.0
    for start in range(0, len(windows), _BATCH):
        batch = windows[start : start + _BATCH]
        predicted = torch.from_numpy(logits(batch[:, :-1])).flatten(0, 1)
        target = torch.from_numpy(batch[:, 1:]).flatten()
        losses = torch.nn.functional.cross_entropy(predicted, target, reduction="none")
        total += float(losses.double().sum())
    return float(np.exp(total / windows[:, 1:].size))


def module_logits(module: torch.nn.Module) -> Logits:
    """How `perplexity` calls a transformers causal language model."""

    def logits(ids: Array) -> Array:
        with torch.inference_mode():
            return np.asarray(module(input_ids=torch.from_numpy(ids), use_cache=False).logits.numpy())

    return logits


def graph_logits(run: Callable[[Mapping[str, Array]], Mapping[str, Array]], config: Any) -> Logits:
    """How `perplexity` calls anything that takes a decoder graph's inputs by name and gives ``logits``.

    Args:
        run: takes arrays by graph-input name and gives arrays by graph-output name.
        config: the transformers configuration of the model that the graph came from.
    """
    return lambda ids: run(decoder_feeds(ids, config))["logits"]


def decoder_feeds(ids: Array, config: Any) -> dict[str, Array]:
    """The inputs of a decoder graph for ids [batch, sequence] with an empty cache and no padding."""
    batch, length = ids.shape
    feeds = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.broadcast_to(np.arange(length, dtype=np.int64), ids.shape).copy(),
    }
    empty = np.zeros((batch, config.num_key_value_heads, 0, config.head_dim), np.float32)
    for layer in range(config.num_hidden_layers):
        feeds[f"past_key_values.{layer}.key"] = feeds[f"past_key_values.{layer}.value"] = empty
    return feeds


def main() -> None:
    """Check the model: its dense perplexity and that of its outlier twin against the notes' figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    wikilm = WikiLM.find(arguments.shared)
    windows = wikilm.evaluation_windows(arguments.windows)
    module = wikilm.load()
    print(f"dense {perplexity(module_logits(module), windows):.3f}, noted {DENSE_PERPLEXITY} on 60 windows")
    make_outlier_twin(module)
    print(f"outlier twin {perplexity(module_logits(module), windows):.3f}")


if __name__ == "__main__":
    main()
