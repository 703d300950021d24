"""Drafts from the text itself: what followed the last tokens where they stood before.

A draft is verified by one run of the model over all its tokens. What the model would have chosen itself is
kept, up to the first token that differs, so the result is that of generation without drafts; only the number
of runs is smaller. How many tokens are proposed follows from how many were kept: two more than last time,
which costs little where text does not repeat and grows where it does.

Source: prompt lookup decoding (Saxena, 2023); the adaptive length after the idea of adaptive
draft-verification (Liu et al., 2024, https://arxiv.org/abs/2407.12021).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ...ir.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptLookup:
    """Where drafts are looked for.

    Attributes:
        longest, shortest: tokens at the end of the text that have to be found again; most are tried first.
        tokens: that a draft has at most.
    """

    longest: int = 3
    shortest: int = 2
    tokens: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest or self.tokens < 1:
            raise InputError(
                "prompt lookup: expected 1 <= shortest <= longest and tokens >= 1, found "
                f"shortest={self.shortest}, longest={self.longest}, tokens={self.tokens}"
            )


class Drafter:
    """Finds drafts in a text that grows; each n-gram is remembered where it stood last."""

    def __init__(self, lookup: PromptLookup) -> None:
        self._lookup = lookup
        self._text: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self._allowed = min(2, lookup.tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text."""
        for token in tokens:
            # What ends here is known from the next token on: it must not find itself.
            for size in range(self._lookup.shortest, self._lookup.longest + 1):
                if len(self._text) >= size:
                    self._ends[tuple(self._text[-size:])] = len(self._text)
            self._text.append(int(token))

    def draft(self) -> list[int]:
        """What may come next; empty if the end of the text stands nowhere else."""
        for size in range(self._lookup.longest, self._lookup.shortest - 1, -1):
            end = self._ends.get(tuple(self._text[-size:])) if len(self._text) >= size else None
            if end is not None:
                return self._text[end : end + self._allowed]
        return []

    def learn(self, kept: int) -> None:
        """Say how many tokens of the last draft the model kept."""
        self._allowed = int(np.clip(kept + 2, 1, self._lookup.tokens))
