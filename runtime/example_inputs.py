"""Inputs made up from what a graph declares, for checks and timings when the user gives none.

Names that the ecosystem agrees on decide what goes in: token ids stay below the size of the table that they
index, masks are ones, positions count up, caches are normal. Everything else is standard normal (floats),
zero or one (integers and booleans). The same model and seed give the same arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from ..ir.errors import InputError

Array = np.ndarray[Any, Any]

# Small, and pairwise different so that a mixed-up axis shows.
_BATCH, _SEQUENCE, _PAST, _OTHER = 2, 5, 3, 4
# Pixels, samples and other free spatial axes: strided networks need some room.
_SPATIAL = 64


def example_inputs(
    model: ir.Model, *, sizes: Mapping[str, int] | None = None, seed: int = 0
) -> dict[str, Array]:
    """Random inputs for a graph, by graph-input name.

    Args:
        model: the graph; inputs that are also initializers are left out.
        sizes: lengths of symbolic dimensions by name, such as ``{"batch_size": 1, "sequence_length": 128}``.
        seed: of the random numbers.

    Raises:
        InputError: an input is no tensor, has no type or shape, or a name in ``sizes`` is no dimension.
    """
    inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    lengths = _dimension_lengths(inputs, dict(sizes or {}))
    rng = np.random.default_rng(seed)
    return {value.name or "": _array(value, lengths, rng) for value in inputs}


def _dimension_lengths(inputs: list[ir.Value], sizes: dict[str, int]) -> dict[str, int]:
    """A length for every symbolic dimension: as asked for, or guessed from its name and its place."""
    lengths: dict[str, int] = {}
    for value in inputs:
        if value.shape is None or value.dtype is None:
            raise InputError(
                f"input {value.name!r} declares no tensor type and shape: no example can be made up for it",
                hint="give the inputs",
            )
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                lengths.setdefault(dim.value, _guess_length(dim.value, axis, value))
    unknown = sorted(set(sizes) - set(lengths))
    if unknown:
        raise InputError(
            f"the model has no dimension {unknown[0]!r}", hint=f"symbolic dimensions: {', '.join(lengths)}"
        )
    if any(_is_cache(value.name or "") for value in inputs):
        _widen_masks(inputs, lengths)
    return _resolve_totals({**lengths, **sizes}, sizes)


def _widen_masks(inputs: list[ir.Value], lengths: dict[str, int]) -> None:
    """Beside a cache, a mask whose last dimension is its own covers past and new tokens."""
    others = {str(dim) for value in inputs if "mask" not in (value.name or "") for dim in value.shape or ()}
    for value in inputs:
        if "mask" in (value.name or "") and value.shape and str(value.shape[-1]) not in others:
            lengths[str(value.shape[-1])] = _PAST + _SEQUENCE


def _resolve_totals(lengths: dict[str, int], sizes: Mapping[str, int]) -> dict[str, int]:
    """Total lengths are past plus new, whether named as such or written as a sum."""
    past = next((size for name, size in lengths.items() if _is_past(name)), 0)
    sequence = next((size for name, size in lengths.items() if _is_sequence(name)), _SEQUENCE)
    for name in lengths:
        if name in sizes:
            continue
        terms = [term.strip() for term in name.split("+")]
        if len(terms) > 1 and all(term in lengths or term.isdigit() for term in terms):
            lengths[name] = sum(lengths.get(term) or int(term) for term in terms)
        elif "total" in name:
            lengths[name] = past + sequence
    return lengths


def _guess_length(name: str, axis: int, value: ir.Value) -> int:
    lowered = name.lower()
    if "batch" in lowered:
        return _BATCH
    if _is_past(lowered):
        return _PAST
    if _is_sequence(lowered):
        return _SEQUENCE
    return _guess_by_place(axis, value)


def _is_past(name: str) -> bool:
    return "past" in name.lower() and "+" not in name


def _is_sequence(name: str) -> bool:
    lowered = name.lower()
    return "seq" in lowered and "past" not in lowered and "total" not in lowered


def _guess_by_place(axis: int, value: ir.Value) -> int:
    """Unnamed axes and names that say nothing (``s72``): batch first, then tokens, or pixels."""
    rank = len(value.shape) if value.shape is not None else 0
    if _is_cache(value.name or ""):
        return _BATCH if axis == 0 else _PAST if axis == rank - 2 else _OTHER
    if axis == 0:
        return _BATCH
    if rank == 4 or (rank == 3 and axis == 2):
        return _SPATIAL if axis >= 2 else _OTHER
    return _SEQUENCE if axis == 1 else _OTHER


def _is_cache(name: str) -> bool:
    return "past_key_values" in name or name.startswith(("past.", "past_", "cache"))


def _array(value: ir.Value, lengths: Mapping[str, int], rng: np.random.Generator) -> Array:
    assert value.shape is not None
    assert value.dtype is not None
    shape = tuple(_length(dim, axis, value, lengths) for axis, dim in enumerate(value.shape))
    name = (value.name or "").lower()
    dtype = value.dtype.numpy()
    if value.dtype.is_floating_point():
        return np.ones(shape, dtype) if "mask" in name else rng.standard_normal(shape).astype(dtype)
    if value.dtype in (ir.DataType.STRING, ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        raise InputError(f"input {value.name!r} is {value.dtype.name}: no example can be made up for it")
    if "mask" in name:
        return np.ones(shape, dtype)
    if "position" in name:
        start = next((size for dim, size in lengths.items() if _is_past(dim)), 0)
        return np.broadcast_to(np.arange(start, start + shape[-1] if shape else 1), shape).astype(dtype)
    if "token_type" in name or value.dtype == ir.DataType.BOOL:
        return np.zeros(shape, dtype)
    return rng.integers(0, _index_limit(value), shape).astype(dtype)


def _length(dim: int | ir.SymbolicDim, axis: int, value: ir.Value, lengths: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    return lengths[dim.value] if dim.value is not None else _guess_by_place(axis, value)


# Casts and reshapes that may stand between an input and the table that it indexes.
_TRANSPARENT = frozenset({"Cast", "Reshape", "Unsqueeze", "Squeeze", "Identity", "Flatten"})


def _index_limit(value: ir.Value) -> int:
    """How many rows the table has that an integer input indexes; 2 when it indexes none."""
    pending, rows = [value], []
    while pending:
        current = pending.pop()
        for use in current.uses():
            node = use.node
            table = node.inputs[0]
            if node.op_type == "Gather" and use.idx == 1 and table is not None and table.shape is not None:
                axis = node.attributes.get_int("axis", 0)
                size = table.shape[axis]
                rows += [size] if isinstance(size, int) else []
            elif node.op_type in _TRANSPARENT and use.idx == 0:
                pending.extend(node.outputs)
    return min(rows, default=2)
