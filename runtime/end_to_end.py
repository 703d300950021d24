"""How long whole models take where they will run: bound to the target, run in turns, medians."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
import onnx_ir as ir

from ..codegen.target import Target
from ..ir.errors import InputError
from .calibration.data import Array, Feeds
from .measure import Latency, interleaved_latency
from .session import Session


def end_to_end_latency(
    models: Mapping[str, ir.Model],
    *,
    target: Target,
    feeds: Mapping[str, Feeds] | Feeds,
    repeats: int = 24,
    burst: int = 8,
) -> dict[str, Latency]:
    """Time models against each other, as the target runs them.

    Args:
        models: what to time, by name; not changed.
        target: what they are bound to; supplies execution providers and, where it has any, threads.
        feeds: inputs for all models, or for each by its name. A model is given those that it has: pruned
            models may lack caches, or have fewer key-value heads in them.
        repeats: counted runs of each.
        burst: counted runs of one model in a row.

    Raises:
        InputError: an input is missing or does not fit; the message names the model.
        TargetError: the target cannot bind an op, or onnxruntime rejects a model.
    """
    runs = {}
    for name, model in models.items():
        own = _own_feeds(name, feeds)
        try:
            runs[name] = open_bound(model, target).repeatable(fitted_feeds(model, own))
        except InputError as error:
            raise InputError(f"latency of {name!r}: {error.message}", hint=error.hint) from error
    return interleaved_latency(runs, repeats=repeats, burst=burst)


def open_bound(model: ir.Model, target: Target) -> Session:
    """A session of ``model`` as the target binds it, with the target's providers and threads."""
    return Session(target.bind(model), target=target, threads=threads_of(target))


def threads_of(target: Target) -> int | None:
    """Threads within an op; None, onnxruntime's choice, for a target that does not say."""
    return cast("int | None", getattr(target, "threads", None))


def fitted_feeds(model: ir.Model, feeds: Feeds) -> dict[str, Array]:
    """What ``model`` reads of ``feeds``, the caches with the heads that it has.

    Raises:
        InputError: an input is missing.
    """
    inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    missing = [value.name for value in inputs if value.name not in feeds]
    if missing:
        raise InputError(f"input {missing[0]!r} is not among those given, {sorted(feeds)}")
    return {str(value.name): _fitted(value, feeds[str(value.name)]) for value in inputs}


def _own_feeds(name: str, feeds: Mapping[str, Feeds] | Feeds) -> Feeds:
    if not all(isinstance(entry, Mapping) for entry in feeds.values()):
        return cast(Feeds, feeds)
    if name not in feeds:
        raise InputError(f"latency: no inputs were given for the model {name!r}, only for {sorted(feeds)}")
    return cast("Mapping[str, Feeds]", feeds)[name]


def _fitted(value: ir.Value, array: Array) -> Array:
    """A cache [batch, heads, length, size] with the heads that the graph declares: left out, or repeated."""
    if not is_cache(value) or value.shape is None or array.ndim != 4 or not array.shape[1]:
        return array
    heads = value.shape[1]
    if not isinstance(heads, int) or heads == array.shape[1]:
        return array
    return np.ascontiguousarray(array[:, np.arange(heads) % array.shape[1]])


def is_cache(value: ir.Value) -> bool:
    """Whether a graph input holds past keys or values."""
    return str(value.name).startswith(("past_key_values.", "past."))
