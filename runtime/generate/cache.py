"""The key-value cache of a decoder as buffers.

Where the model's kernels append in place (GroupQueryAttention), past and present of a layer are one buffer,
longer than what is in it, and nothing is copied from token to token. Other caches grow: what comes out of one
run goes into the next.

A layer with a window W has a buffer of C = W + 64 tokens at most, in which the kernel moves the last ones to
the front when it is full, G = C − W + 1 at a time: of T tokens it holds

    L(T) = T  if T <= C,  else  T − G · ⌈(T − C) / G⌉

so the last k can be dropped only if L(T − k) = L(T) − k.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch

from ...ir.errors import InputError
from ...ir.views.values import integer, static_dim
from ..executor import Executor, Value, tensor_of

_IN_PLACE = "GroupQueryAttention"
_PAST = "past_key_values."
WINDOW_SLACK = 64
"""Tokens that a window's buffer holds besides the window, so that tokens are moved seldom."""
_SPARE = 1.25
"""How many times as long as it has to be a buffer may be."""


@dataclasses.dataclass(frozen=True)
class CacheSlot:
    """One input of the cache and the output that goes on from it.

    Attributes:
        past, present: their names.
        layer: which one, from 0, in the order of the inputs.
        heads, size: [batch, heads, length, size].
        dtype: of what is stored.
        in_place: past and present may be one buffer, longer than what is in it.
        window: the kernel keeps this many last tokens, and a few more; 0 for all.
    """

    past: str
    present: str
    layer: int
    heads: int
    size: int
    dtype: np.dtype[np.generic]
    in_place: bool
    window: int = 0

    def capacity(self, tokens: int) -> int:
        """How long its buffer is in which a text of so many tokens has room."""
        return max(self.window, min(tokens, self.window + WINDOW_SLACK)) if self.window else tokens

    def held(self, tokens: int, capacity: int) -> int:
        """How many of so many tokens are in a buffer of this length: L(T)."""
        if not self.window or tokens <= capacity:
            return tokens
        moved = capacity - self.window + 1
        return tokens - moved * -(-(tokens - capacity) // moved)

    def bytes_per_token(self) -> int:
        """Of one sequence."""
        return self.heads * self.size * self.dtype.itemsize


def cache_slots(model: ir.Model) -> list[CacheSlot]:
    """The cache of a bound decoder, keys and values of each layer.

    Raises:
        InputError: the model has none, or its shape is not known.
    """
    pasts = [value for value in model.graph.inputs if str(value.name).startswith(_PAST)]
    if not pasts:
        raise InputError(
            "the model has no key-value cache to generate with",
            hint="compile a causal language model of transformers, or an ONNX decoder with past_key_values",
        )
    numbers = list(dict.fromkeys(str(value.name).split(".")[1] for value in pasts))
    return [_slot(value, numbers.index(str(value.name).split(".")[1])) for value in pasts]


def _slot(past: ir.Value, layer: int) -> CacheSlot:
    name = str(past.name)
    heads, size = static_dim(past, 1), static_dim(past, 3)
    if heads is None or size is None or past.dtype is None:
        raise InputError(f"input {name!r}: expected [batch, heads, length, size], found {past.shape}")
    kernel = next((node for node in past.consumers() if node.op_type == _IN_PLACE), None)
    forgets = kernel is not None and integer(kernel, "sliding_window_cache")
    return CacheSlot(
        past=name,
        present=f"present.{name.removeprefix(_PAST)}",
        layer=layer,
        heads=heads,
        size=size,
        dtype=past.dtype.numpy(),
        in_place=kernel is not None,
        window=(integer(kernel, "local_window_size") or 0) if kernel is not None and forgets else 0,
    )


class Cache:
    """What is cached of a batch, layer by layer.

    Args:
        slots: of the model.
        executor: what runs it, and keeps the buffers.
        batch: sequences.
        capacity: tokens that buffers have room for; those of windows are shorter.

    Attributes:
        slots: as given.
        lengths: [layers] int64, tokens that each layer holds, or held before its window forgot them.
        buffers: by name of the past.
    """

    def __init__(self, slots: list[CacheSlot], executor: Executor, *, batch: int, capacity: int) -> None:
        self.slots = slots
        self._executor = executor
        self._batch = batch
        self.lengths = np.zeros(1 + max(slot.layer for slot in slots), np.int64)
        self.buffers: dict[str, Value] = {}
        # How long the buffers in place are: asking onnxruntime for it takes its time.
        self._capacities: dict[str, int] = {}
        self.clear(capacity)

    @property
    def room(self) -> int | None:
        """Tokens that can still be appended; None if there is no limit."""
        left = [
            self._capacities[slot.past] - int(self.lengths[slot.layer])
            for slot in self.slots
            if slot.in_place and not slot.window
        ]
        return min(left, default=None)

    @property
    def revocable(self) -> int | None:
        """How many tokens can be appended and dropped again; None if there is no limit."""
        left = [self._capacities[slot.past] - self._held(slot) for slot in self.slots if slot.window]
        return min(left, default=None)

    def can_drop(self, count: int) -> bool:
        """Whether the last tokens can be forgotten: windows may have forgotten those before them."""
        return all(
            self._held(slot, less=count) == self._held(slot) - count for slot in self.slots if slot.window
        )

    def _held(self, slot: CacheSlot, *, less: int = 0) -> int:
        return slot.held(int(self.lengths[slot.layer]) - less, self._capacities[slot.past])

    @property
    def bytes(self) -> int:
        """Of all buffers."""
        return sum(int(np.prod(self.buffers[slot.past].shape())) * slot.dtype.itemsize for slot in self.slots)

    def reserve(self, room: int) -> None:
        """Make buffers longer that have not so much room."""
        for slot in self.slots:
            length = int(self.lengths[slot.layer])
            if slot.in_place and not slot.window and self._capacities[slot.past] < length + room:
                old = self.buffers[slot.past]
                self._allocate(slot, length + room)
                self._write(slot, tensor_of(old)[:, :, :length])

    def _allocate(self, slot: CacheSlot, capacity: int) -> None:
        """Have a buffer for so many tokens.

        One that is not much too long stays, so that an eviction allocates nothing.
        """
        if not 0 < capacity <= self._capacities.get(slot.past, 0) <= capacity * _SPARE:
            empty = np.zeros((self._batch, slot.heads, capacity, slot.size), slot.dtype)
            self.buffers[slot.past] = self._executor.value(empty)
            self._capacities[slot.past] = capacity

    def _write(self, slot: CacheSlot, kept: torch.Tensor) -> None:
        tensor_of(self.buffers[slot.past])[:, :, : kept.shape[2]] = kept

    def appended(self, new: int, outputs: Mapping[str, Value]) -> None:
        """Note that a run appended tokens; caches that grow are taken from its outputs."""
        self.lengths += new
        for slot in self.slots:
            if not slot.in_place:
                self.buffers[slot.past] = outputs[slot.present]

    def drop_last(self, count: int) -> None:
        """Forget the last tokens of every layer, which `can_drop` allows."""
        self.lengths -= count
        for slot in self.slots:
            if not slot.in_place and count:
                kept = self.buffers[slot.past].numpy()[:, :, : self.lengths[slot.layer]]
                self.buffers[slot.past] = self._executor.value(kept)

    def clear(self, capacity: int) -> None:
        """Forget everything and make room for ``capacity`` tokens."""
        self.lengths[:] = 0
        for slot in self.slots:
            self._allocate(slot, slot.capacity(capacity) if slot.in_place else 0)

    def replace(self, kept: Mapping[str, Value], *, room: int) -> None:
        """Hold other tokens: ``kept``, by name of the present, with room for more behind them."""
        for slot in self.slots:
            value = kept[slot.present]
            length = value.shape()[2]
            self.lengths[slot.layer] = length
            if slot.in_place:
                self._allocate(slot, length + room)
                self._write(slot, tensor_of(value))
            else:
                self.buffers[slot.past] = value
