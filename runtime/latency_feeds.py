"""Inputs of the size that a deployment runs, from real ones or made up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ..ir.errors import InputError
from .calibration.data import Array, Feeds
from .end_to_end import is_cache
from .example_inputs import example_inputs

_TOKENS = ("input_ids", "mask", "position", "token")
"""Parts of the names of inputs whose axis 1 is the sequence, even where its length is fixed."""


def deployment_feeds(
    model: ir.Model, *, batch: int, sequence: int, examples: Sequence[Feeds] = ()
) -> dict[str, Array]:
    """One batch of inputs as the deployment runs them, by graph-input name.

    Axis 0 is the batch. The free axes of tokens, masks, positions and features [batch, sequence, features]
    get the length ``sequence``; a decoder reads it in one go, with an empty cache. Images keep the graph's
    own size, or that of the examples; ``sequence`` does not count for them. Every token counts: padding is
    computed like any other token, so masks are ones.

    Args:
        model: its graph inputs; initializers are left out.
        batch: samples.
        sequence: tokens of a sample.
        examples: real inputs whose rows are repeated or cut to that size; made up if empty.

    Raises:
        InputError: a size is not positive, the graph fixes a dimension to another one, an example lacks an
            input, or there is nothing to tell the size of an image from.
    """
    for name, size in (("batch", batch), ("sequence", sequence)):
        if size < 1:
            raise InputError(f"latency: {name} must be positive, found {size}")
    inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    lengths = {str(value.name): _lengths(value, batch, sequence, bool(examples)) for value in inputs}
    rows = _rows(model, inputs, examples)
    feeds = {name: _resized(array, lengths[name]) for name, array in rows.items()}
    for name, array in feeds.items():
        if "mask" in name and array.dtype.kind in "biu":
            feeds[name] = np.ones_like(array)
        elif "position" in name and array.ndim:
            positions = np.arange(array.shape[-1], dtype=array.dtype)
            feeds[name] = np.array(np.broadcast_to(positions, array.shape))
    return feeds


def _lengths(value: ir.Value, batch: int, sequence: int, has_examples: bool) -> dict[int, int]:
    """The length of each axis that the deployment decides."""
    name, shape = str(value.name), value.shape
    if shape is None or value.dtype is None:
        raise InputError(f"latency: input {name!r} declares no tensor type and shape")
    is_image = len(shape) >= 4 and value.dtype.is_floating_point() and "mask" not in name
    lengths: dict[int, int] = {}
    for axis, dim in enumerate(shape):
        fixed = dim if isinstance(dim, int) else None
        if axis == 0:
            _require(value, axis, fixed, "batch", batch)
            lengths[axis] = batch
        elif is_cache(value):
            lengths |= {axis: 0} if fixed is None else {}
        elif is_image:
            if fixed is None and not has_examples:
                raise InputError(
                    f"latency: input {name!r} {shape} does not say how large an image is (axis {axis})",
                    hint="give example inputs or calibration data of the size that will run",
                )
        elif fixed is None:
            lengths[axis] = sequence
        elif axis == 1 and len(shape) == 2 and any(part in name for part in _TOKENS):
            _require(value, axis, fixed, "sequence", sequence)
    return lengths


def _require(value: ir.Value, axis: int, fixed: int | None, what: str, wanted: int) -> None:
    if fixed is not None and fixed != wanted:
        raise InputError(
            f"latency: input {value.name!r} {value.shape}: axis {axis} is fixed to {fixed}, "
            f"the deployment's {what} is {wanted}",
            hint=f"set {what}={fixed}, or export the model with a free dimension there",
        )


def _rows(model: ir.Model, inputs: Sequence[ir.Value], examples: Sequence[Feeds]) -> Mapping[str, Array]:
    """Some rows of every input, of any length."""
    if not examples:
        return example_inputs(model)
    first = examples[0]
    missing = [value.name for value in inputs if value.name not in first]
    if missing:
        raise InputError(f"latency: the examples lack input {missing[0]!r}", hint=f"found {sorted(first)}")
    return {str(value.name): np.asarray(first[str(value.name)]) for value in inputs}


def _resized(array: Array, lengths: Mapping[int, int]) -> Array:
    """The array with axes cut, or repeated from the start."""
    for axis, length in lengths.items():
        if array.shape[axis] != length:
            array = np.take(array, np.arange(length) % max(array.shape[axis], 1), axis)
    return np.asarray(array, order="C")
