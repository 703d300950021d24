"""Would better scores help? Tokens chosen by the attention that they are really going to get.

The 256 first tokens of each window are reduced to a share of them, the 127 behind are judged (as in
`kv_quality`), but scores may look ahead: at the attention that the judged tokens pay in the full cache. Rows
named `future attention` are what a policy that expects attention can reach at best; `drawn` takes tokens in
proportion to the score, and not those of the highest. The model runs in torch, without anything of planish: a
second way to the numbers of `random`, `recent` and `snapkv`.

    python benchmarks/kv_oracle.py          # writes results/kv_oracle.md
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import wikilm
from torch import Tensor
from torch.nn.functional import avg_pool1d
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_PREFILL, _SINKS, _RECENT = 256, 4, 16
_NAME = "chosen_tokens"
KEEPS = (0.25, 0.5, 0.75)
_RESULTS = Path(__file__).parent / "results" / "kv_oracle.md"

Score = Callable[[Tensor, Tensor], Tensor]
"""Of the full cache's attention [texts, kv_heads, group, tokens, tokens] and values [texts, kv_heads, tokens,
size]: a score of each of the first tokens, [texts, kv_heads, 256]."""


def future(attention: Tensor, _values: Tensor) -> Tensor:
    """What the judged tokens pay."""
    return attention[..., _PREFILL:, :_PREFILL].mean((2, 3))


def future_and_values(attention: Tensor, values: Tensor) -> Tensor:
    """The same times the norm of the value, as Expected Attention has it."""
    return future(attention, values) * values[:, :, :_PREFILL].norm(dim=-1)


def snapkv(attention: Tensor, _values: Tensor) -> Tensor:
    """What the last 16 tokens of those that are reduced paid, pooled over 5."""
    paid = attention[..., _PREFILL - _RECENT : _PREFILL, :_PREFILL].mean((2, 3))
    return avg_pool1d(paid, 5, 1, 2)


def recent(attention: Tensor, _values: Tensor) -> Tensor:
    """The position."""
    return torch.arange(_PREFILL).float().expand(*attention.shape[:2], -1)


def random(attention: Tensor, _values: Tensor) -> Tensor:
    """Any."""
    return torch.rand(*attention.shape[:2], _PREFILL)


def drawn(score: Score) -> Score:
    """In proportion to a score, without replacement (Gumbel's trick)."""

    def perturbed(attention: Tensor, values: Tensor) -> Tensor:
        positive = score(attention, values).clamp_min(1e-30)
        return positive.log() - torch.rand_like(positive).clamp(1e-7, 1 - 1e-7).log().neg().log()

    return perturbed


SCORES: Mapping[str, Score] = {
    "random": random,
    "recent": recent,
    "snapkv": snapkv,
    "snapkv, drawn": drawn(snapkv),
    "future attention": future,
    "future attention, drawn": drawn(future),
    "future attention × ‖v‖": future_and_values,
    "future attention × ‖v‖, drawn": drawn(future_and_values),
}


@dataclasses.dataclass
class Choice:
    """How tokens are chosen while the model runs; no score for the full cache."""

    score: Score | None = None
    kept: int = _PREFILL

    def attend(
        self, _module: Any, queries: Tensor, keys: Tensor, values: Tensor, _mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        """Attention in which the judged tokens see the chosen ones alone, as transformers calls it."""
        texts, heads, tokens, size = queries.shape
        grouped = queries.view(texts, keys.shape[1], -1, tokens, size)
        products = torch.einsum("bkgtd,bksd->bkgts", grouped, keys) * options["scaling"]
        hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        attention = products.masked_fill(hidden, -torch.inf).softmax(-1)
        if self.score is not None:
            gone = self._gone(self.score(attention, values).clone(), tokens)
            gone = gone[:, :, None, None] & (torch.arange(tokens) >= _PREFILL)[:, None]
            attention = products.masked_fill(hidden | gone, -torch.inf).softmax(-1)
        output = torch.einsum("bkgts,bksd->bkgtd", attention, values).reshape(texts, heads, tokens, size)
        return output.transpose(1, 2).contiguous(), None

    def _gone(self, score: Tensor, tokens: int) -> Tensor:
        """[texts, kv_heads, tokens]"""
        score[..., :_SINKS] = torch.inf
        score[..., _PREFILL - _RECENT :] = torch.inf
        gone = torch.zeros(*score.shape[:2], tokens, dtype=torch.bool)
        gone[..., :_PREFILL] = True
        return gone.scatter_(-1, score.topk(self.kept, dim=-1).indices, False)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    wikilm.add_arguments(parser)
    arguments = parser.parse_args()
    small = wikilm.WikiLM.find(arguments.shared)
    windows = torch.tensor(small.evaluation_windows(arguments.windows)[:, : _PREFILL + 128])
    choice = Choice()
    ALL_ATTENTION_FUNCTIONS[_NAME] = choice.attend
    module = small.load()
    module.set_attn_implementation(_NAME)

    def predicted() -> Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            return torch.cat(
                [module(part).logits[:, _PREFILL:-1].log_softmax(-1) for part in windows.split(8)]
            )

    full, targets = predicted(), windows[:, _PREFILL + 1 :, None]

    def cells(found: Tensor) -> str:
        perplexity = torch.exp(-found.gather(-1, targets).mean())
        divergence = (full.exp() * (full - found)).sum(-1).mean()
        same = (full.argmax(-1) == found.argmax(-1)).double().mean()
        return f"{perplexity:.3f} | {divergence:.4f} | {same:.1%} |"

    lines = [
        "# Tokens chosen by attention that is known before",
        "",
        f"Language: {len(windows)} windows, {_PREFILL} tokens reduced to a share (the first {_SINKS} and the "
        f"last {_RECENT} always stay), the 127 behind them judged. Written by `benchmarks/kv_oracle.py`.",
        "",
        "| scores | tokens kept | perplexity | KL to the full cache | same likeliest token |",
        "|---|---|---|---|---|",
        f"| full cache | 100% | {cells(full)}",
    ]
    for keep in KEEPS:
        for name, score in SCORES.items():
            choice.score, choice.kept = score, round(keep * _PREFILL)
            lines.append(f"| {name} | {keep:.0%} | {cells(predicted())}")
            print(lines[-1], flush=True)
    _RESULTS.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
