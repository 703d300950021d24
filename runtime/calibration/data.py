"""Calibration data: whatever a user has, as complete feeds of the graph.

Taken are an iterable (a torch DataLoader is one) of dicts, of tensors or of tuples, and onnxruntime's
``CalibrationDataReader`` (an object with ``get_next()``). It is read once, and what is kept are the graph's
inputs: ids and masks, not activations. Where all inputs share a batch axis, samples are put together or taken
apart, so that running a batch is efficient and needs little memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...ir.errors import InputError
from ...ir.signature import Signature, flatten_inputs
from ...ir.views.caches import LENGTHS
from ...ir.views.values import static_dim

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

MASK = "attention_mask"
LABELS = "labels"
"""What training data may give beside the graph's inputs: the task's targets, batch first."""
_PAST = "past_key_values."
_ELEMENTS_PER_RUN = 2048
"""Of the largest input: so many tokens bring matrix products to full speed and need little memory."""


class CalibrationData(Sequence[Feeds]):
    """Complete feeds by graph-input name, one small batch each.

    Args:
        batches: at least one; every graph input is in each.
    """

    def __init__(self, batches: Iterable[Feeds]) -> None:
        self._batches = tuple(batches)

    @classmethod
    def read(
        cls, source: Any, model: ir.Model, signature: Signature | None = None, *, labels: bool = False
    ) -> CalibrationData:
        """Read ``source`` once and fit each item to the graph's inputs.

        Inputs of a decoder that follow from the others may be left out: ``attention_mask`` (ones),
        ``position_ids`` (counting attended tokens) and ``past_key_values.*`` (empty).

        Args:
            source: an iterable of dicts, tensors or tuples, or an object with ``get_next()``.
            model: its graph inputs are what items must give.
            signature: how the traced module is called, for items that are spelled as its arguments.
            labels: items that are dicts may also have ``labels``, an array whose first axis is the batch.

        Raises:
            InputError: there is no item, or one does not fit; the message says which and why.
        """
        batches: list[Feeds] = []
        for position, item in enumerate(_items(source)):
            try:
                inputs, targets = _split_labels(item) if labels else (item, None)
                feeds = _feeds(inputs, model, signature)
                _check(feeds, model)
                if targets is not None:
                    _check_labels(targets, feeds)
                    feeds[LABELS] = targets
            except InputError as error:
                raise InputError(
                    f"calibration data, item {position}: {error.message}", hint=error.hint
                ) from error
            batches.append(feeds)
        if not batches:
            raise InputError(
                "the calibration data is empty", hint="give some inputs, or leave calibration= out"
            )
        return cls(_regroup(batches) if has_batch_axis(model) else batches)

    def fitted(self, model: ir.Model) -> CalibrationData:
        """The same data for a graph whose inputs have changed, see `fitted`."""
        return CalibrationData(fitted(feeds, model) for feeds in self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> Feeds: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Feeds, ...]: ...
    def __getitem__(self, index: int | slice) -> Feeds | tuple[Feeds, ...]:
        return self._batches[index]


def fitted(feeds: Feeds, model: ir.Model) -> Feeds:
    """Feeds for a graph whose inputs have changed since: lost, new, or caches of another shape or type.

    What is no longer an input is left out. Where caches do not fit any more, all of them start empty, and the
    mask loses the part that was theirs. Inputs of a decoder that follow from the others are added.

    Raises:
        InputError: a cache is needed whose shape the graph does not tell.
    """
    inputs = {str(value.name): value for value in model.graph.inputs}
    kept = {name: array for name, array in feeds.items() if name in inputs or name == LABELS}
    caches = [name for name in kept if name.startswith(_PAST)]
    if all(_fits(kept[name], inputs[name]) for name in caches):
        return completed(kept, model)
    past = kept[caches[0]].shape[2]
    for name in caches:
        kept[name] = _empty_past(inputs[name], kept[name].shape[0])
    if past and MASK in kept:
        kept[MASK] = kept[MASK][..., past:]
    return completed(kept, model)


def input_types(model: ir.Model) -> list[tuple[str | None, ir.DataType | None, str]]:
    """Names, types and shapes of a graph's inputs: feeds of one graph fit another where they are the same."""
    return [(value.name, value.dtype, str(value.shape)) for value in model.graph.inputs]


def _fits(array: Array, value: ir.Value) -> bool:
    shape = value.shape
    if value.dtype is not None and array.dtype != value.dtype.numpy():
        return False
    return shape is None or all(
        dim == size for dim, size in zip(shape, array.shape, strict=True) if isinstance(dim, int)
    )


def token_mask(feeds: Feeds) -> npt.NDArray[np.bool_] | None:
    """Which tokens are real, [batch, sequence], or None where nothing says that some are padding."""
    mask = feeds.get(MASK)
    if mask is None or mask.ndim != 2:
        return None
    ids = feeds.get("input_ids")
    # Beside a cache, the mask begins with the past, which is not run again.
    length = ids.shape[1] if ids is not None and ids.ndim == 2 else mask.shape[1]
    real: npt.NDArray[np.bool_] = mask[:, mask.shape[1] - length :].astype(bool)
    return None if real.all() else real


def _items(source: Any) -> Iterator[Any]:
    if hasattr(source, "get_next"):
        while (item := source.get_next()) is not None:
            yield item
        return
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise InputError(
            f"calibration: expected an iterable of inputs, found {type(source).__name__}",
            hint="give a list of dicts, a DataLoader, or an object with get_next()",
        )
    yield from source


def _feeds(item: Any, model: ir.Model, signature: Signature | None) -> dict[str, Array]:
    names = _input_names(model)
    if isinstance(item, Mapping):
        if sorted(item) != sorted(names) and signature is not None:
            item = flatten_inputs(signature, (), dict(item))
        feeds = {str(name): _array(value) for name, value in item.items()}
    elif signature is not None:
        arguments = tuple(item) if isinstance(item, tuple | list) else (item,)
        feeds = {name: _array(value) for name, value in flatten_inputs(signature, arguments).items()}
    else:
        values = item if isinstance(item, tuple | list) else (item,)
        if len(values) > len(names):
            raise InputError(f"{len(values)} tensors were given, the model has the inputs {names}")
        feeds = {name: _array(value) for name, value in zip(names, values, strict=False)}
    return completed(feeds, model)


def _input_names(model: ir.Model) -> list[str]:
    return [str(value.name) for value in model.graph.inputs if value.name not in model.graph.initializers]


def _array(value: Any) -> Array:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    if not isinstance(value, np.ndarray | np.generic | int | float | bool):
        raise InputError(f"expected tensors or arrays, found {type(value).__name__}")
    return np.asarray(value)


def completed(feeds: dict[str, Array], model: ir.Model) -> dict[str, Array]:
    """Feeds of a decoder with what its other inputs follow from: mask, positions, an empty cache.

    Args:
        feeds: arrays by graph-input name; without ``input_ids`` [batch, sequence] they stay as they are.
        model: whose inputs are completed.
    """
    ids = feeds.get("input_ids")
    if ids is None or ids.ndim != 2:
        return feeds
    inputs = {str(value.name): value for value in model.graph.inputs}
    missing = [name for name in _input_names(model) if name not in feeds]
    for name in missing:
        if name.startswith(_PAST):
            feeds[name] = _empty_past(inputs[name], ids.shape[0])
    past = next((feeds[name].shape[2] for name in feeds if name.startswith(_PAST)), 0)
    if LENGTHS in missing:
        feeds[LENGTHS] = np.full(static_dim(inputs[LENGTHS], 0) or 0, past, np.int64)
    if MASK in missing:
        feeds[MASK] = np.ones((ids.shape[0], past + ids.shape[1]), np.int64)
    if "position_ids" in missing:
        attended = feeds[MASK] if MASK in feeds else np.ones(ids.shape, np.int64)
        feeds["position_ids"] = np.maximum(attended.cumsum(-1) - 1, 0)[:, -ids.shape[1] :]
    return feeds


def _empty_past(value: ir.Value, batch: int) -> Array:
    """[batch, heads, 0, head size]"""
    if value.shape is None or len(value.shape) != 4 or value.dtype is None:
        raise InputError(f"input {value.name!r} is missing, and its shape is not known")
    heads, size = value.shape[1], value.shape[3]
    if not isinstance(heads, int) or not isinstance(size, int):
        raise InputError(f"input {value.name!r} is missing, and its shape {value.shape} is not known")
    return np.zeros((batch, heads, 0, size), value.dtype.numpy())


def _check(feeds: dict[str, Array], model: ir.Model) -> None:
    """Names, ranks, fixed dimensions and values; integers of another width are converted in place."""
    expected = {str(value.name): value for value in model.graph.inputs}
    names = sorted(_input_names(model))
    if not set(names) <= set(feeds) <= set(expected):
        raise InputError(f"expected the inputs {names}, found {sorted(feeds)}")
    for name, array in feeds.items():
        value = expected[name]
        dtype = None if value.dtype is None else value.dtype.numpy()
        if dtype is not None and array.dtype != dtype:
            if not np.can_cast(array.dtype, dtype, "same_kind"):
                raise InputError(f"input {name!r}: expected {dtype}, found {array.dtype}")
            feeds[name] = array = array.astype(dtype)
        shape = value.shape
        if shape is not None and (len(shape) != array.ndim or not _fits(array, value)):
            raise InputError(f"input {name!r}: expected shape {shape}, found {list(array.shape)}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputError(f"input {name!r} holds NaN or infinity")
        if array.size == 0 and not name.startswith(_PAST):
            raise InputError(f"input {name!r} is empty, {list(array.shape)}")


def _split_labels(item: Any) -> tuple[Any, Array | None]:
    if not isinstance(item, Mapping) or LABELS not in item:
        return item, None
    return {name: value for name, value in item.items() if name != LABELS}, _array(item[LABELS])


def _check_labels(labels: Array, feeds: Feeds) -> None:
    batch = next(iter(feeds.values())).shape[:1]
    if labels.shape[:1] != batch:
        raise InputError(
            f"labels: expected a first axis of {list(batch)}, as the inputs have, found {list(labels.shape)}"
        )
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise InputError("labels hold NaN or infinity")


def has_batch_axis(model: ir.Model) -> bool:
    """Whether axis 0 of every input is one and the same free dimension: samples may be put together."""
    first = [value.shape[0] if value.shape else None for value in model.graph.inputs]
    names = {dim.value if isinstance(dim, ir.SymbolicDim) else None for dim in first}
    return len(names) == 1 and None not in names


def _regroup(batches: Iterable[Feeds]) -> Iterator[Feeds]:
    """The same samples in batches of about `_ELEMENTS_PER_RUN`; only neighbours of equal shape meet."""
    waiting: list[Feeds] = []
    for sample in (part for batch in batches for part in _samples(batch)):
        if waiting and (_shapes(sample) != _shapes(waiting[0]) or len(waiting) >= _samples_per_run(sample)):
            yield _joined(waiting)
            waiting = []
        waiting.append(sample)
    if waiting:
        yield _joined(waiting)


def _samples(batch: Feeds) -> Iterator[Feeds]:
    count = next(iter(batch.values())).shape[0]
    return ({name: array[index : index + 1] for name, array in batch.items()} for index in range(count))


def _shapes(feeds: Feeds) -> list[tuple[int, ...]]:
    return [array.shape for array in feeds.values()]


def _samples_per_run(sample: Feeds) -> int:
    largest = max(array.size for array in sample.values())
    return max(1, _ELEMENTS_PER_RUN // max(largest, 1))


def _joined(samples: Sequence[Feeds]) -> Feeds:
    return {name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]}
