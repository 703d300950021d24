"""A small model that recalls facts from its context, and the texts that it is asked about.

A text is filler in which facts are scattered, a key and its value side by side, then questions:

    f f k₁ v₁ f f f k₂ v₂ f … ? k₂ ! v₂  ? k₁ ! v₁ …

The model (a Llama with four layers of 128) first learns to repeat random tokens, which gives it heads that
find what followed the same token before; then it is trained on texts of facts, on the answers alone, of
growing length. Without the first part the second takes ten times as long. Nothing of this is language: what
matters is that without the right keys and values in the cache an answer can only be guessed, 1 in 40.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import transformers

Tokens = npt.NDArray[np.int64]

ASK, ANSWER = 1, 2
_FIRST_FILLER, _FILLERS = 3, 40
_FIRST_KEY = _FIRST_FILLER + _FILLERS
_KEYS = 40
_FIRST_VALUE = _FIRST_KEY + _KEYS
_VALUES = 40
VOCABULARY = _FIRST_VALUE + _VALUES
LONGEST = 512
"""Tokens of a text before its questions."""
SHORTEST = 40
_FACTS = 12
_TOKENS = 2048
"""Of a batch, or less."""
_REPEATING = 0.5
"""The part of the steps in which tokens are repeated."""
_RATE = 2e-3
_IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Texts:
    """Several texts of one length.

    Attributes:
        ids: [texts, length], without questions.
        keys, values: [texts, facts], as tokens.
        positions: [texts, facts], where each key stands.
    """

    ids: Tokens
    keys: Tokens
    values: Tokens
    positions: Tokens


def texts(rng: np.random.Generator, count: int, length: int, facts: int = _FACTS) -> Texts:
    """Random texts; the facts of one have different keys, and lie spread over its whole length."""
    ids = rng.integers(_FIRST_FILLER, _FIRST_FILLER + _FILLERS, (count, length))
    keys = np.stack([rng.permutation(_KEYS)[:facts] for _ in range(count)]) + _FIRST_KEY
    values = rng.integers(0, _VALUES, (count, facts)) + _FIRST_VALUE
    # One fact in each of as many equal parts, at a random place of it.
    part = length // facts
    positions = np.arange(facts) * part + rng.integers(0, part - 1, (count, facts))
    rows = np.arange(count)[:, None]
    ids[rows, positions], ids[rows, positions + 1] = keys, values
    return Texts(ids, keys, values, positions)


def with_questions(rng: np.random.Generator, given: Texts, questions: int) -> tuple[Tokens, Tokens]:
    """Training data: ids [texts, length + 4 · questions], and labels, which are the answers alone."""
    count, facts = given.keys.shape
    chosen = np.stack([rng.permutation(facts)[:questions] for _ in range(count)])
    rows = np.arange(count)[:, None]
    asked = np.stack(
        [
            np.full_like(chosen, ASK),
            given.keys[rows, chosen],
            np.full_like(chosen, ANSWER),
            given.values[rows, chosen],
        ],
        axis=-1,
    ).reshape(count, -1)
    ids = np.concatenate([given.ids, asked], axis=1)
    labels = np.full_like(ids, _IGNORED)
    labels[:, given.ids.shape[1] + 3 :: 4] = given.values[rows, chosen]
    return ids, labels


def module() -> transformers.LlamaForCausalLM:
    """The model before training."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LONGEST + 64,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)


def trained(folder: Path, say: Callable[[str], None], *, seed: int = 0, steps: int = 1000) -> torch.nn.Module:
    """The trained model; kept in a folder, and read from there the next time."""
    torch.manual_seed(seed)
    model = module()
    path = folder / f"recall-{seed}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    optimiser = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=steps, pct_start=0.05)
    rng = np.random.default_rng(seed)
    for step, (ids, labels) in enumerate(_batches(rng, steps)):
        states, judged = model.model(ids).last_hidden_state[:, :-1], labels[:, 1:] != _IGNORED
        loss = torch.nn.functional.cross_entropy(model.lm_head(states[judged]), labels[:, 1:][judged])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            say(f"recall model: step {step}, loss {loss.item():.3f}")
    model.eval()
    partial = path.with_suffix(".partial")
    torch.save(model.state_dict(), partial)
    partial.replace(path)
    return model


def _batches(rng: np.random.Generator, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for step in range(steps):
        progress = step / steps
        if progress < _REPEATING:
            ids, labels = _repeated(rng, int(rng.integers(16, 49)))
        else:
            # In equal factors: to find a fact in a short text is learnt sooner.
            done = (progress - _REPEATING) / (1 - _REPEATING)
            longest = SHORTEST * (LONGEST / SHORTEST) ** min(1.0, 1.5 * done)
            length = int(rng.integers(max(SHORTEST, longest // 2), longest + 1))
            given = texts(rng, max(4, _TOKENS // length), length)
            ids, labels = with_questions(rng, given, _FACTS)
        yield torch.as_tensor(ids), torch.as_tensor(labels)


def _repeated(rng: np.random.Generator, length: int) -> tuple[Tokens, Tokens]:
    """Random tokens twice; the second time is judged, but for its first token."""
    once = rng.integers(_FIRST_FILLER, VOCABULARY, (_TOKENS // (2 * length), length))
    ids = np.concatenate([once, once], axis=1)
    labels = ids.copy()
    labels[:, : length + 1] = _IGNORED
    return ids, labels
