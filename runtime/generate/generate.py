"""Generating text: the prompt in chunks, then one token after the other, or several from a draft."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ...ir.errors import InputError
from .decoder import Decoder
from .prompt_lookup import Drafter, PromptLookup
from .sampling import Sampler, Sampling

Tokens = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """What to generate.

    Attributes:
        max_new_tokens: that are generated at most.
        sampling: how tokens are drawn; None takes the likeliest one.
        stop_tokens: end a sequence; they are part of it.
        pad_token: fills sequences that have ended while others go on.
        draft: where drafts are looked for; None for none. For one sequence and without sampling.
        chunk: tokens of the prompt that are run at a time.
        evict_every: for models that evict: after how many new tokens again; 0 for once, after the prompt.
        seed: of the draws.
    """

    max_new_tokens: int = 128
    sampling: Sampling | None = None
    stop_tokens: tuple[int, ...] = ()
    pad_token: int = 0
    draft: PromptLookup | None = None
    chunk: int = 512
    evict_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.chunk < 1:
            raise InputError(
                f"expected max_new_tokens and chunk of at least 1, found {self.max_new_tokens}, {self.chunk}"
            )
        if self.evict_every < 0:
            raise InputError(f"evict_every: expected 0 or more, found {self.evict_every}")
        if self.draft is not None and self.evict_every:
            raise InputError("with drafts, tokens are evicted once: leave draft or evict_every out")
        if self.draft is not None and self.sampling is not None:
            raise InputError("drafts are verified against the likeliest tokens: leave sampling or draft out")


def generate(decoder: Decoder, ids: Tokens, mask: Tokens, settings: Generation) -> Iterator[Tokens]:
    """Give [batch] tokens after each step, until all sequences have ended.

    Args:
        decoder: whose cache may hold a beginning of ``ids``, which is not run again.
        ids: [batch, length], the prompts, padded on the left.
        mask: [batch, length], 0 for padding.
        settings: what to generate.

    Raises:
        InputError: the prompts do not fit the model or its cache.
    """
    if settings.draft is not None and len(ids) > 1:
        raise InputError("drafts are for one sequence at a time: leave draft out for a batch")
    if settings.draft is not None and not decoder.limits.gives_all_logits:
        raise InputError(
            "drafts need the logits of all their tokens, and this model gives the last one's alone",
            hint="compile it without last-logits",
        )
    # Where positions count the cache, a text may be longer than they are; its prompt may not.
    decoder.limits.check(ids, mask, 1 if decoder.renumbers else settings.max_new_tokens)
    _check_room(decoder, ids.shape[1], settings.max_new_tokens)
    if settings.evict_every and not decoder.evicts:
        raise InputError("evict_every: the model does not evict", hint="compile it with the pass evict")
    decoder.resume(ids, mask)
    if decoder.evicts:
        decoder.reserve(ids.shape[1] - decoder.length)
    logits = _prefill(decoder, ids, mask, settings.chunk)
    if decoder.evicts:
        room = settings.evict_every or settings.max_new_tokens
        decoder.evict(room=room, again=bool(settings.evict_every))
    sampler = Sampler(settings.sampling, batch=len(ids), seed=settings.seed)
    if settings.draft is None:
        steps = _plain(decoder, sampler, logits, settings.evict_every)
    else:
        steps = _drafted(decoder, sampler, logits, ids[0].tolist(), settings.draft)
    ended = np.zeros(len(ids), bool)
    for _, tokens in zip(range(settings.max_new_tokens), steps, strict=False):
        tokens = np.where(ended, settings.pad_token, tokens)
        yield tokens
        ended |= np.isin(tokens, settings.stop_tokens)
        if ended.all():
            return


def _check_room(decoder: Decoder, length: int, new: int) -> None:
    # The last token is given, but not run. Where tokens are evicted, buffers are as long as they must be.
    needed = length + new - 1
    if needed > decoder.capacity and not decoder.evicts:
        raise InputError(
            f"{length} tokens of prompts and {new} new ones need a cache for {needed}, found one for "
            f"{decoder.capacity}",
            hint=f"make the decoder with capacity={needed}",
        )


def _prefill(decoder: Decoder, ids: Tokens, mask: Tokens, chunk: int) -> npt.NDArray[np.floating]:
    """Logits [batch, vocabulary] behind the prompts."""
    start, length = decoder.length, ids.shape[1]
    size = chunk
    if not decoder.takes_several_on_top:
        size = 1 if start else length
    for begin in range(start, length, size):
        end = min(begin + size, length)
        logits = decoder.forward(ids[:, begin:end], mask[:, begin:end])
    return logits[:, -1]


def _plain(
    decoder: Decoder, sampler: Sampler, logits: npt.NDArray[np.floating], evict_every: int
) -> Iterator[Tokens]:
    while True:
        tokens = sampler(logits)
        yield tokens
        if evict_every and decoder.since_eviction == evict_every:
            decoder.evict(room=evict_every, again=True)
        logits = decoder.forward(tokens[:, None])[:, -1]


def _drafted(
    decoder: Decoder,
    sampler: Sampler,
    logits: npt.NDArray[np.floating],
    text: Sequence[int],
    lookup: PromptLookup,
) -> Iterator[Tokens]:
    """The same tokens as without drafts, several from one run where a draft was right."""
    drafter = Drafter(lookup)
    drafter.extend(text)
    token = sampler(logits)
    while True:
        yield token
        drafter.extend(token.tolist())
        draft = drafter.draft()[: decoder.draft_room]
        start = decoder.length
        chosen = sampler(decoder.forward(np.array([[int(token[0]), *draft]]))[0])
        # chosen[i] is what follows the token and i tokens of the draft.
        kept = next((i for i, (a, b) in enumerate(zip(draft, chosen, strict=False)) if a != b), len(draft))
        if draft:
            drafter.learn(kept)
            decoder.truncate(start + 1 + kept)
        for accepted in draft[:kept]:
            drafter.extend([accepted])
            yield np.array([accepted])
        token = chosen[kept : kept + 1]
