"""A decoder with its cache: runs tokens through the model, each of them once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...ir.errors import InputError
from ...ir.views.caches import LENGTHS
from ..executor import Executor
from ..session import first_line
from .cache import Cache, cache_slots
from .eviction import Eviction
from .limits import Limits
from .runner import runner_of
from .text import Text

Tokens = npt.NDArray[np.int64]
Array = npt.NDArray[np.generic]

MASK = "attention_mask"
_MANY = 16
"""New tokens from which on the kernels for many run them: integer products of so many rows are faster."""


class Decoder:
    """Sequences of a batch on their way through a model.

    Args:
        session: of the bound model.
        model: the bound model.
        batch: sequences.
        capacity: tokens that buffers are made for.
        eviction: what forgets tokens of the cache, for models that have it.
        prefill: the same model with kernels for many tokens at a time, which runs those; None: one session
            runs all.

    Attributes:
        batch, capacity: as given.
        cache: keys and values.
        limits: what the model knows of tokens and positions.
    """

    def __init__(
        self,
        session: Executor,
        model: ir.Model,
        *,
        batch: int,
        capacity: int,
        eviction: Eviction | None = None,
        prefill: Executor | None = None,
    ) -> None:
        self._session, self._eviction = session, eviction
        self._evicted_at, self._observes = 0, True
        self.batch, self.capacity = batch, capacity
        self.limits = Limits.of(model)
        self.cache = Cache(cache_slots(model), session, batch=batch, capacity=capacity)
        self._text = Text(batch)
        self._seen = np.zeros((batch, 1), np.int64)
        self._runner = runner_of(session, self.cache, batch=batch)
        self._prefill = None if prefill is None else runner_of(prefill, self.cache, batch=batch)

    @property
    def length(self) -> int:
        """Tokens that were run, padding included."""
        return self._text.length

    @property
    def evicts(self) -> bool:
        """Whether tokens of the cache are forgotten."""
        return self._eviction is not None

    @property
    def renumbers(self) -> bool:
        """Whether positions count what is in the cache, and not the text."""
        return self._eviction is not None and self._eviction.renumbers

    @property
    def takes_several_on_top(self) -> bool:
        """Whether several new tokens at once may follow what is cached: kernels in place refuse a batch."""
        return self.batch == 1 or not any(slot.in_place for slot in self.cache.slots)

    def forward(self, ids: Tokens, mask: Tokens | None = None) -> npt.NDArray[np.floating]:
        """Run new tokens; the cache then holds them too.

        Args:
            ids: [batch, sequence].
            mask: [batch, sequence], 0 for padding; all ones if absent.

        Returns:
            logits, [batch, sequence, vocabulary].

        Raises:
            InputError: the buffers are full, padding where tokens are evicted, or onnxruntime fails.
        """
        new, room = ids.shape[1], self.cache.room
        if room is not None and new > room:
            raise InputError(f"the cache has room for {room} more tokens, found {new}")
        shown = np.ones_like(ids) if mask is None else mask
        if self.evicts and not shown.all():
            raise InputError(
                "a cache that evicts takes no padding: its layers forget which tokens were padding",
                hint="give prompts of one length, or one after the other",
            )
        before = np.full_like(self._seen, self.cache.lengths[0]) if self.renumbers else self._seen
        positions = np.maximum(before + shown.cumsum(axis=1) - 1, 0)
        given = {"input_ids": ids, "position_ids": positions, LENGTHS: self.cache.lengths}
        runner = self._runner if self._prefill is None or new < _MANY else self._prefill
        length = self._text.length
        self._text.append(ids, shown)
        given[MASK] = self._text.mask
        try:
            outputs = runner.run(given)
        except BaseException:  # Ctrl-C, too: the cache does not hold these tokens
            self._text.truncate(length)
            raise
        self._seen = self._seen + shown.sum(axis=1, keepdims=True)
        self.cache.appended(new, outputs)
        if self._eviction is not None and self._observes:
            self._eviction.observe(outputs)
        logits: npt.NDArray[np.floating] = outputs["logits"].numpy()
        return logits

    def evict(self, *, room: int, again: bool = False) -> None:
        """Forget tokens of the cache, and have room for ``room`` new ones.

        Args:
            room: in tokens.
            again: whether there will be another eviction of this text, for which queries are kept.

        Raises:
            InputError: the model does not evict, or onnxruntime fails.
        """
        if self._eviction is None:
            raise InputError("the model does not evict", hint="compile it with the pass evict")
        try:
            self._eviction.run(self.cache, seen=int(self._seen[0, 0]), room=room)
        except Exception as error:
            raise InputError(f"onnxruntime could not evict: {first_line(error)}") from error
        self._evicted_at = self.length
        self._observes = again
        if not again:
            self._eviction.forget()
        self._rebind()

    def restore(self, ids: Tokens, kept: Mapping[str, Array]) -> None:
        """Hold texts whose keys and values were computed before, instead of what is there.

        Args:
            ids: [batch, length], without padding.
            kept: by name of the outputs ``present.…``, [batch, heads, length, size], as they came out.

        Raises:
            InputError: other sequences or names, too many tokens, or caches that hold parts of a text.
        """
        names = {slot.present for slot in self.cache.slots}
        if self.evicts or any(slot.window for slot in self.cache.slots):
            raise InputError("caches that forget tokens cannot be restored", hint="run the text again")
        if len(ids) != self.batch or ids.shape[1] > self.capacity:
            raise InputError(
                f"expected {self.batch} texts of at most {self.capacity} tokens, found {list(ids.shape)}"
            )
        if kept.keys() != names:
            raise InputError(f"expected the caches {sorted(names)}, found {sorted(kept)}")
        for slot in self.cache.slots:
            expected = (self.batch, slot.heads, ids.shape[1], slot.size)
            if kept[slot.present].shape != expected or kept[slot.present].dtype != slot.dtype:
                raise InputError(
                    f"{slot.present}: expected {list(expected)} {slot.dtype}, found "
                    f"{list(kept[slot.present].shape)} {kept[slot.present].dtype}"
                )
        self.truncate(0)
        values = {name: self._session.value(array) for name, array in kept.items()}
        self.cache.replace(values, room=self.capacity - ids.shape[1])
        self._text.append(ids, np.ones_like(ids))
        self._seen = self._seen + ids.shape[1]
        self._rebind()

    def reserve(self, room: int) -> None:
        """Have room for so many new tokens, even if the cache has to be copied."""
        self.cache.reserve(room)
        self._rebind()

    def _rebind(self) -> None:
        for runner in (self._runner, self._prefill):
            if runner is not None:
                runner.rebind()

    @property
    def draft_room(self) -> int | None:
        """How many tokens may be tried behind the next one and dropped again; None if there is no limit."""
        limits = [limit - 1 for limit in (self.cache.room, self.cache.revocable) if limit is not None]
        return max(min(limits), 0) if limits else None

    @property
    def since_eviction(self) -> int:
        """Tokens that were run after the last eviction."""
        return self.length - self._evicted_at

    def resume(self, ids: Tokens, mask: Tokens) -> None:
        """Keep of the cache what begins these texts, [batch, length], too, and forget the rest.

        At least one token of each text is left to run, for its logits.

        Raises:
            InputError: another number of sequences.
        """
        if len(ids) != self.batch:
            raise InputError(f"the cache is for {self.batch} sequences, found {len(ids)} prompts")
        self.truncate(min(self._text.common(ids, mask), ids.shape[1] - 1))
        self._observes = True

    def truncate(self, length: int) -> None:
        """Forget all tokens from ``length`` on; all there are, if the cache has lost what is before it."""
        if not 0 <= length <= self.length:
            raise InputError(f"expected a length of at most {self.length}, found {length}")
        if length < self._evicted_at or not self.cache.can_drop(self.length - length):
            length, self._evicted_at = 0, 0
            self.cache.clear(self.capacity)
            self._rebind()
        else:
            self.cache.drop_last(self.length - length)
        if length == 0 and self._eviction is not None:
            self._eviction.forget()
            self._observes = True
        self._text.truncate(length)
        self._seen = self._text.mask.sum(axis=1, keepdims=True)
