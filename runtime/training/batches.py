"""Batches to train on: samples of equal shapes, in an order that only a seed and the step decide."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...ir.errors import InputError, MissingDataError
from ..calibration.data import LABELS, Feeds, has_batch_axis

_CACHE = "past_key_values."
_MOST_HELD_OUT = 16
"""Batches: enough to tell better from worse, and run twice only."""


@dataclasses.dataclass(frozen=True)
class _Sample:
    """One row of a batch that the user gave, or all of it where it cannot be taken apart."""

    batch: int
    row: int | None
    shapes: frozenset[tuple[str, tuple[int, ...]]]
    """Of each input without the batch axis: samples of equal shapes can be put together."""


class Batches:
    """Training data as batches of ``size`` samples, shuffled anew in every round.

    Batches that the user gave are taken apart where axis 0 of every graph input is the same free dimension.
    What a step is given depends on the seed and its number alone, so a run can go on in the middle.

    Args:
        data: batches by graph-input name, `LABELS` allowed; at least one.
        model: whose inputs they are.
        size: samples per batch; less where no more are of equal shapes.
        held_out: share of the samples that is kept from training, 16 batches at most. At least one is; where
            there is but one sample, it serves both ends.
        seed: of the order.

    Raises:
        InputError: there is no data.
    """

    def __init__(
        self, data: Sequence[Feeds], model: ir.Model, *, size: int, held_out: float, seed: int
    ) -> None:
        if not data:
            raise MissingDataError(
                "training needs data, and there is none",
                hint="give compile(..., training=inputs) or calibration=inputs",
            )
        self._data, self._size, self._seed = data, size, seed
        samples = _samples(data, splits=has_batch_axis(model))
        order = np.random.default_rng([seed]).permutation(len(samples))
        count = min(max(1, round(held_out * len(samples))), _MOST_HELD_OUT * size)
        kept = [samples[index] for index in order[:count]]
        self._samples = [samples[index] for index in order[count:]] or kept
        self.held_out: list[list[_Sample]] = _chunks(kept, size)
        self._round = functools.lru_cache(maxsize=1)(self._shuffled)
        self._per_round = len(_chunks(self._samples, size))

    def at(self, step: int) -> Feeds:
        """What update ``step`` is made from, counted from 0."""
        number, index = divmod(step, self._per_round)
        return self.assemble(self._round(number)[index])

    def assemble(self, chunk: Sequence[_Sample]) -> Feeds:
        """One batch of these samples, by graph-input name."""
        if chunk[0].row is None:
            return self._data[chunk[0].batch]
        parts = [self._data[sample.batch] for sample in chunk]
        rows = [slice(sample.row, (sample.row or 0) + 1) for sample in chunk]
        return {
            name: np.concatenate([part[name][row] for part, row in zip(parts, rows, strict=True)])
            for name in parts[0]
        }

    def _shuffled(self, number: int) -> list[list[_Sample]]:
        rng = np.random.default_rng([self._seed, 1 + number])
        chunks = _chunks([self._samples[index] for index in rng.permutation(len(self._samples))], self._size)
        return [chunks[index] for index in rng.permutation(len(chunks))]


def _samples(data: Sequence[Feeds], *, splits: bool) -> list[_Sample]:
    found = []
    for index, feeds in enumerate(data):
        sizes = {array.shape[0] if array.ndim else None for array in feeds.values()}
        size = sizes.pop() if len(sizes) == 1 else None
        rows: Sequence[int | None] = [None] if size is None or not splits else range(size)
        shapes = frozenset((name, array.shape[1:]) for name, array in feeds.items())
        found += [_Sample(index, row, shapes) for row in rows]
    return found


def _chunks(samples: Sequence[_Sample], size: int) -> list[list[_Sample]]:
    """Samples of equal shapes, ``size`` at a time; those that stand alone are alone."""
    waiting: dict[object, list[_Sample]] = {}
    for sample in samples:
        alike = (sample.batch,) if sample.row is None else sample.shapes
        waiting.setdefault(alike, []).append(sample)
    return [group[at : at + size] for group in waiting.values() for at in range(0, len(group), size)]


def feeds_for(model: ir.Model, feeds: Feeds) -> Feeds:
    """The inputs of ``model`` out of feeds that were made for a smaller form of it, or for itself.

    Labels are left out. A decoder's layer that the smaller one does not have, or whose heads differ, starts
    with an empty cache as the others do.

    Raises:
        InputError: an input is missing, or the other layers' caches are not empty.
    """
    found: dict[str, np.ndarray] = {}
    for value in model.graph.inputs:
        if value.const_value is not None:
            continue  # an input with a default keeps it
        name = str(value.name)
        array = feeds.get(name)
        if array is not None and _fits(value, array):
            found[name] = array
        elif name.startswith(_CACHE):
            found[name] = _empty_cache(value, feeds)
        else:
            problem = "is missing" if array is None else f"has the shape {list(array.shape)}"
            raise InputError(
                f"training data: input {name!r} {problem}; the teacher's is {value.shape}; "
                f"found {[given for given in feeds if given != LABELS]}"
            )
    return found


def _fits(value: ir.Value, array: np.ndarray) -> bool:
    shape = value.shape
    return shape is None or (
        len(shape) == array.ndim
        and all(dim == size for dim, size in zip(shape, array.shape, strict=True) if isinstance(dim, int))
    )


def _empty_cache(value: ir.Value, feeds: Feeds) -> np.ndarray:
    """[batch, heads, 0, head size]"""
    filled = [name for name, array in feeds.items() if name.startswith(_CACHE) and array.size]
    heads, size = (value.shape[1], value.shape[3]) if value.shape and len(value.shape) == 4 else (None, None)
    if filled or value.dtype is None or not isinstance(heads, int) or not isinstance(size, int):
        raise InputError(
            f"training data: the teacher's input {value.name!r} is missing, and "
            + (f"the cache {filled[0]!r} is not empty" if filled else "its shape is not known"),
            hint="train on sequences from their beginning, with empty caches",
        )
    batch = next(iter(feeds.values())).shape[0]
    return np.zeros((batch, heads, 0, size), value.dtype.numpy())
