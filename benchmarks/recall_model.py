"""A small model that recalls facts from its context, and the texts that it is asked about.

A text is filler in which facts are scattered, a key and its value side by side, then questions:

    f f k₁ v₁ f f f k₂ v₂ f … ? k₂ ! v₂  ? k₁ ! v₁ …

The model (a Llama with four layers of 128) is trained on texts of many questions, on their answers alone,
until it recalls all but a few. Nothing of this is language: what matters is that without the right keys and
values in the cache an answer can only be guessed, 1 in 40.
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
_FACTS = 12
_QUESTIONS = 8
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


def trained(folder: Path, say: Callable[[str], None], *, seed: int = 0, steps: int = 4000) -> torch.nn.Module:
    """The trained model; kept in a folder, and read from there the next time.

    Lengths grow with the steps, from 64 to `LONGEST`: to find a fact in a short text is learnt sooner.
    """
    torch.manual_seed(seed)
    model = module()
    path = folder / f"recall-{seed}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps, pct_start=0.05)
    rng = np.random.default_rng(seed)
    for step, (ids, labels) in enumerate(_batches(rng, steps)):
        logits = model(ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1), ignore_index=_IGNORED
        )
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 200 == 0:
            say(f"recall model: step {step}, loss {loss.item():.3f}")
    model.eval()
    partial = path.with_suffix(".partial")
    torch.save(model.state_dict(), partial)
    partial.replace(path)
    return model


def _batches(rng: np.random.Generator, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for step in range(steps):
        longest = 64 + (LONGEST - 64) * min(1.0, 1.5 * step / steps)
        length = int(rng.integers(64, longest + 1))
        count = max(4, 4096 // length)
        ids, labels = with_questions(rng, texts(rng, count, length), _QUESTIONS)
        yield torch.as_tensor(ids), torch.as_tensor(labels)
