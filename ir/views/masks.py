"""What attention masks hide, proven from how the graph computes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from .values import input_at

_MOVES = ("Unsqueeze", "Reshape", "Expand", "Identity", "Cast")
_DEEPEST = 16


@dataclasses.dataclass(frozen=True)
class CausalMask:
    """A boolean mask [.., sequence, past + sequence] that is False wherever a key is after its query.

    Attributes:
        past: the length of what was cached before.
        total: past + sequence.
        keys: positions of keys, [.., 1, past + sequence].
        queries: positions of queries, [.., sequence, 1].
        others: what has to hold, too, before it was given its shape: ``attention_mask``, say.
        window: of how many tokens, itself among them, a query sees the last; None for all.
    """

    past: ir.Value
    total: ir.Value
    keys: ir.Value
    queries: ir.Value
    others: tuple[ir.Value, ...]
    window: int | None = None


def causal_mask(mask: ir.Value | None) -> CausalMask | None:
    """What a mask says of past and future, or None if it is not known to hide the future.

    Proven where the mask is a conjunction that has ``key position <= query position`` in it, with positions
    counted from 0 for keys and from the past's length for queries. A window is a conjunct
    ``key position > query position − window``.
    """
    parts = _conjuncts(mask)
    for part in parts:
        compared = _compared(part.producer(), "LessOrEqual", "GreaterOrEqual")
        lengths = None if compared is None else _lengths(*compared)
        if compared is not None and lengths is not None:
            others = [other for other in parts if other is not part]
            windows = {other: _window(other.producer(), lengths) for other in others}
            return CausalMask(
                *lengths,
                *compared,
                others=tuple(other for other in others if windows[other] is None),
                window=min((width for width in windows.values() if width is not None), default=None),
            )
    return None


def _conjuncts(mask: ir.Value | None, depth: int = 0) -> list[ir.Value]:
    """What all has to hold, before moves."""
    value = _moved(mask, _MOVES)
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "And" and depth < _DEEPEST:
        return [part for operand in node.inputs for part in _conjuncts(operand, depth + 1)]
    return [] if value is None else [value]


def _compared(node: ir.Node | None, forwards: str, backwards: str) -> tuple[ir.Value, ir.Value] | None:
    """The operands of a comparison that may be written in two ways, ``a < b`` or ``b > a``: a, b."""
    if node is None or node.op_type not in (forwards, backwards):
        return None
    first, second = node.inputs if node.op_type == forwards else reversed(node.inputs)
    return None if first is None or second is None else (first, second)


def _window(node: ir.Node | None, lengths: tuple[ir.Value, ir.Value]) -> int | None:
    """The width of a comparison of key positions and query positions, of these lengths, less a width."""
    compared = _compared(node, "Greater", "Less")
    if compared is None:
        return None
    keys, bound = compared
    shifted = _origin(bound)
    if shifted is None or not _lies_along(bound, -2):
        return None
    match shifted.op_type:
        case "Sub":
            queries, width = shifted.inputs[0], _number(shifted.inputs[1])
        case "Add":
            queries, shift = shifted.inputs[0], _number(shifted.inputs[1])
            width = None if shift is None else -shift
        case _:
            return None
    if width is None or width < 1 or _lengths(keys, queries) != lengths:
        return None
    return int(width)


def _lengths(keys: ir.Value | None, queries: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """(past, total) of positions of keys, counted from 0, and of queries, counted from the past's length."""
    if keys is None or queries is None or not _lies_along(keys, -1) or not _lies_along(queries, -2):
        return None
    counted, shifted = _origin(keys), _origin(queries)
    if counted is None or shifted is None or not _counts_from_zero(counted) or shifted.op_type != "Add":
        return None
    total = _identity(counted.inputs[1])
    for count, offset in (shifted.inputs, reversed(shifted.inputs)):
        positions, past = _origin(count), _identity(offset)
        if positions is None or past is None or total is None or not _counts_from_zero(positions):
            continue
        if _is_sum(total, past, positions.inputs[1]):
            return past, total
    return None


def _lies_along(value: ir.Value, axis: int) -> bool:
    """Whether all other axes of at least two have length 1."""
    shape = value.shape
    if shape is None or len(shape) < 2:
        return False
    return all(dim == 1 for position, dim in enumerate(shape, -len(shape)) if position != axis)


def _counts_from_zero(node: ir.Node) -> bool:
    return node.op_type == "Range" and _number(node.inputs[0]) == 0 and _number(node.inputs[2]) == 1


def _is_sum(total: ir.Value | None, first: ir.Value | None, second: ir.Value | None) -> bool:
    node = _origin(total)
    if node is None or node.op_type != "Add":
        return False
    return {_identity(value) for value in node.inputs} == {_identity(first), _identity(second)}


def _identity(value: ir.Value | None) -> ir.Value | None:
    """The value before moves, so that two ways to write one number are the same."""
    return _moved(value, ("Identity", "Squeeze", "Unsqueeze", "Reshape"))


def _origin(value: ir.Value | None) -> ir.Node | None:
    value = _moved(value, _MOVES)
    return None if value is None else value.producer()


def _moved(value: ir.Value | None, moves: Collection[str]) -> ir.Value | None:
    """What a value was before ops that change neither numbers nor their order."""
    for _ in range(_DEEPEST):
        node = None if value is None else value.producer()
        if node is None or node.op_type not in moves:
            break
        value = input_at(node, 0)
    return value


def _number(value: ir.Value | None) -> float | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size != 1:
        return None
    return float(np.asarray(tensor.numpy()).reshape(()))
