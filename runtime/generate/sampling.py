"""Choosing the next token from logits.

Filters work in this order, each on what the one before it left, as in transformers: temperature, top-k,
top-p (Holtzman et al., 2019, https://arxiv.org/abs/1904.09751), min-p (Nguyen et al., 2024,
https://arxiv.org/abs/2407.01082). Mirostat 2 (Basu et al., 2020, https://arxiv.org/abs/2007.14966) stands in
for the last three: it keeps tokens whose surprise −log₂ p is below μ, and moves μ ← μ − η · (surprise − τ).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from ...ir.errors import InputError

Logits = npt.NDArray[np.floating]
Doubles = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: logits are divided by it; positive.
        top_k: only so many of the likeliest tokens; 0 for all.
        top_p: only the likeliest tokens that have this probability together; 1 for all.
        min_p: only tokens with this share of the likeliest one's probability; 0 for all.
        mirostat_tau: surprise in bits that Mirostat aims at; 0 for no Mirostat.
        mirostat_eta: how fast Mirostat follows.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    mirostat_tau: float = 0.0
    mirostat_eta: float = 0.1

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(
                f"temperature: expected a positive number, found {self.temperature}",
                hint="for the likeliest token at every step, leave sampling out",
            )
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise InputError(
                "sampling: expected top_k >= 0, 0 < top_p <= 1 and 0 <= min_p <= 1, found "
                f"top_k={self.top_k}, top_p={self.top_p}, min_p={self.min_p}"
            )
        if self.mirostat_tau < 0 or self.mirostat_eta <= 0:
            raise InputError("sampling: expected mirostat_tau >= 0 and mirostat_eta > 0")
        if self.mirostat_tau and (self.top_k or self.top_p < 1 or self.min_p):
            raise InputError("sampling: Mirostat takes the place of top_k, top_p and min_p")


class Sampler:
    """Draws one token for each sequence of a batch, step after step.

    Args:
        sampling: how; None takes the likeliest token.
        batch: sequences.
        seed: of the draws.
    """

    def __init__(self, sampling: Sampling | None, *, batch: int, seed: int) -> None:
        self._sampling = sampling
        self._rng = np.random.default_rng(seed)
        self._mu = np.full(batch, 2 * sampling.mirostat_tau if sampling else 0.0)

    def __call__(self, logits: Logits) -> Tokens:
        """[batch] tokens from logits [batch, vocabulary].

        Raises:
            InputError: logits are NaN, or a row has no finite one.
        """
        if np.isnan(logits).any() or not np.isfinite(logits.max(axis=-1)).all():
            raise InputError("the model's logits are NaN or infinite", hint="`planish compare` finds where")
        if self._sampling is None:
            likeliest: Tokens = logits.argmax(axis=-1).astype(np.int64)
            return likeliest
        if self._sampling.mirostat_tau:
            return self._mirostat(logits)
        return self._draw(filtered(logits, self._sampling))

    def _mirostat(self, logits: Logits) -> Tokens:
        assert self._sampling is not None
        probabilities = _softmax(logits.astype(np.float64) / self._sampling.temperature)
        surprise = -np.log2(np.maximum(probabilities, np.finfo(np.float64).tiny))
        # The likeliest token stays, however small mu has become.
        kept = (surprise <= self._mu[:, None]) | (surprise == surprise.min(axis=-1, keepdims=True))
        tokens = self._draw(_normalised(np.where(kept, probabilities, 0.0)))
        seen = np.take_along_axis(surprise, tokens[:, None], axis=-1)[:, 0]
        self._mu -= self._sampling.mirostat_eta * (seen - self._sampling.mirostat_tau)
        return tokens

    def _draw(self, probabilities: Doubles) -> Tokens:
        """By the inverse of the cumulated probabilities, one uniform number for each sequence."""
        uniform = self._rng.random((len(probabilities), 1))
        below = (probabilities.cumsum(axis=-1) <= uniform).sum(axis=-1)
        drawn: Tokens = below.clip(max=_last(probabilities))
        return drawn


def filtered(logits: Logits, sampling: Sampling) -> Doubles:
    """[batch, vocabulary] probabilities after temperature, top-k, top-p and min-p."""
    scaled = logits.astype(np.float64) / sampling.temperature
    if 0 < sampling.top_k < scaled.shape[-1]:
        least = np.partition(scaled, -sampling.top_k, axis=-1)[:, -sampling.top_k, None]
        scaled = np.where(scaled < least, -np.inf, scaled)
    if sampling.top_p < 1:
        scaled = np.where(_outside_nucleus(_softmax(scaled), sampling.top_p), -np.inf, scaled)
    if sampling.min_p:
        probabilities = _softmax(scaled)
        least = sampling.min_p * probabilities.max(axis=-1, keepdims=True)
        scaled = np.where(probabilities < least, -np.inf, scaled)
    return _softmax(scaled)


def _outside_nucleus(probabilities: Doubles, top_p: float) -> npt.NDArray[np.bool_]:
    """Of the least likely tokens, those that have at most 1 − top_p together; never the likeliest one."""
    order = np.argsort(probabilities, axis=-1, kind="stable")
    cumulated = np.take_along_axis(probabilities, order, axis=-1).cumsum(axis=-1)
    outside = cumulated <= 1 - top_p
    outside[:, -1] = False
    result = np.empty_like(outside)
    np.put_along_axis(result, order, outside, axis=-1)
    return result


def _softmax(logits: Doubles) -> Doubles:
    return _normalised(np.exp(logits - logits.max(axis=-1, keepdims=True)))


def _normalised(weights: Doubles) -> Doubles:
    normalised: Doubles = weights / weights.sum(axis=-1, keepdims=True)
    return normalised


def _last(probabilities: Doubles) -> Tokens:
    """[batch], the last token of positive probability: cumulated sums may end a little below 1."""
    size = probabilities.shape[-1]
    last: Tokens = size - 1 - (probabilities[:, ::-1] > 0).argmax(axis=-1)
    return last
