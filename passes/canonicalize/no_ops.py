"""Nodes that return one of their inputs unchanged are removed.

    Identity(x), Dropout(x) at inference, Cast to the same type, CastLike to a known type (becomes Cast),
    Cast(Cast(x)) through a wider type, x·1, x/1, integer x ± 0, x ∧ true, x ∨ false,
    Transpose with the identity permutation, Transpose(Transpose(x)), Squeeze(Unsqueeze(x)) → x

and two that insert axes one after the other become one:

    Unsqueeze(Unsqueeze(x, a), b) → Unsqueeze(x, a ∪ b)

Preconditions: element types (Cast) and ranks (arithmetic, where a constant might broadcast ``x``) are known;
where they are not, the node stays. Only single numbers count as neutral: a vector of ones is the weight of a
norm that has not been trained yet. ``x + 0`` is kept for floats: it turns −0 into +0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from ...ir.walk import graphs
from .graph_edits import (
    bypass,
    constant,
    integer,
    integers,
    is_op,
    producer,
    rank,
    replace_node,
    scalar,
    shape_constant,
    sweep,
)

WIDER: dict[ir.DataType, frozenset[ir.DataType]] = {
    ir.DataType.FLOAT16: frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE}),
    ir.DataType.BFLOAT16: frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE}),
    ir.DataType.FLOAT: frozenset({ir.DataType.DOUBLE}),
    ir.DataType.INT32: frozenset({ir.DataType.INT64, ir.DataType.DOUBLE}),
    ir.DataType.BOOL: frozenset({ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT}),
}
"""Types that hold every value of the key's type: casting there and back changes nothing."""


def remove_no_ops(model: ir.Model) -> dict[str, int]:
    """Remove what does nothing, in one sweep from inputs to outputs of every graph."""
    statistics = {"no-ops-removed": 0}
    for graph in graphs(model):
        for node in sweep(graph):
            rule = RULES.get(node.op_type)
            if rule is not None and is_op(node, node.op_type) and rule(node):
                statistics["no-ops-removed"] += 1
    return statistics


def _identity(node: ir.Node) -> bool:
    value = node.inputs[0]
    return value is not None and bypass(node, value)


def _dropout(node: ir.Node) -> bool:
    """Opset 12 and later drop only if ``training_mode`` is given and true."""
    value = node.inputs[0]
    training = node.inputs[2] if len(node.inputs) > 2 else None
    if training is not None and not _all_equal(training, 0):
        return False
    if value is None or any(mask.uses() or mask.is_graph_output() for mask in node.outputs[1:]):
        return False
    return bypass(node, value)


def _cast(node: ir.Node) -> bool:
    value = node.inputs[0]
    if value is None:
        return False
    target = integer(node, "to", 0)
    if value.dtype == target:
        return bypass(node, value)
    inner = producer(value, "Cast")
    source = None if inner is None else inner.inputs[0]
    if source is None or source.dtype != target or value.dtype not in WIDER.get(source.dtype, ()):
        return False
    return bypass(node, source)


def _cast_like(node: ir.Node) -> bool:
    value, like = node.inputs
    if value is None or like is None or like.dtype is None:
        return False
    if value.dtype == like.dtype:
        return bypass(node, value)
    if "saturate" in node.attributes or "round_mode" in node.attributes:
        return False
    replace_node(node, "Cast", [value], {"to": like.dtype})
    return True


def _all_equal(value: ir.Value | None, number: float | bool) -> bool:
    array = constant(value)
    return array is not None and array.size > 0 and bool(np.all(array == number))


def _neutral_right(number: float, *, integers_only: bool = False) -> Callable[[ir.Node], bool]:
    """x ∘ number → x, for an op whose right operand may be neutral."""

    def rule(node: ir.Node) -> bool:
        return _drop_neutral(node, 0, 1, number, integers_only=integers_only)

    return rule


def _neutral_either(number: float | bool, *, integers_only: bool = False) -> Callable[[ir.Node], bool]:
    """x ∘ number → x and number ∘ x → x."""

    def rule(node: ir.Node) -> bool:
        return _drop_neutral(node, 0, 1, number, integers_only=integers_only) or _drop_neutral(
            node, 1, 0, number, integers_only=integers_only
        )

    return rule


def _drop_neutral(node: ir.Node, kept: int, dropped: int, number: float, *, integers_only: bool) -> bool:
    value, neutral = node.inputs[kept], node.inputs[dropped]
    if value is None or scalar(neutral) != number:
        return False
    if integers_only and (value.dtype is None or not value.dtype.is_integer()):
        return False
    value_rank, neutral_rank = rank(value), rank(neutral)
    if neutral_rank != 0 and (value_rank is None or neutral_rank is None or neutral_rank > value_rank):
        return False
    return bypass(node, value)


def _permutation(node: ir.Node) -> list[int] | None:
    """The permutation of a Transpose; reversed axes when it has none, which needs the rank."""
    if "perm" in node.attributes:
        return list(node.attributes["perm"].as_ints())
    axes = rank(node.inputs[0])
    return None if axes is None else list(reversed(range(axes)))


def _transpose(node: ir.Node) -> bool:
    value = node.inputs[0]
    outer = _permutation(node)
    if value is None or outer is None:
        return False
    if outer == list(range(len(outer))):
        return bypass(node, value)
    inner_node = producer(value, "Transpose")
    inner = None if inner_node is None else _permutation(inner_node)
    if inner_node is None or inner is None or len(inner) != len(outer):
        return False
    source = inner_node.inputs[0]
    if source is None:
        return False
    both = [inner[axis] for axis in outer]
    if both == list(range(len(both))):
        return bypass(node, source)
    replace_node(node, "Transpose", [source], {"perm": both})
    return True


def _squeeze(node: ir.Node) -> bool:
    """Squeeze(Unsqueeze(x, axes), axes) → x."""
    inner = producer(node.inputs[0], "Unsqueeze")
    if inner is None or len(node.inputs) < 2 or len(inner.inputs) < 2:
        return False
    axes, inner_axes = integers(node.inputs[1]), integers(inner.inputs[1])
    source = inner.inputs[0]
    if source is None or axes is None or inner_axes is None or sorted(axes) != sorted(inner_axes):
        return False
    return bypass(node, source)


def _unsqueeze(node: ir.Node) -> bool:
    """Unsqueeze(Unsqueeze(x, a), b) → Unsqueeze(x, a ∪ b), for axes counted from the front."""
    inner = producer(node.inputs[0], "Unsqueeze")
    if inner is None or len(node.inputs) < 2 or len(inner.inputs) < 2:
        return False
    outer_axes, inner_axes = integers(node.inputs[1]), integers(inner.inputs[1])
    if outer_axes is None or inner_axes is None or min(outer_axes + inner_axes, default=-1) < 0:
        return False
    if not isinstance(node.graph, ir.Graph):
        return False
    # An axis that the inner node inserted at position i is now the i-th one that the outer did not insert.
    kept = [axis for axis in range(max(inner_axes) + len(outer_axes) + 1) if axis not in outer_axes]
    axes = sorted(outer_axes + [kept[axis] for axis in inner_axes])
    node.replace_input_with(0, inner.inputs[0])
    node.replace_input_with(1, shape_constant(node.graph, axes))
    return True


RULES: dict[str, Callable[[ir.Node], bool]] = {
    "Add": _neutral_either(0, integers_only=True),
    "And": _neutral_either(True),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Div": _neutral_right(1),
    "Dropout": _dropout,
    "Identity": _identity,
    "Mul": _neutral_either(1),
    "Or": _neutral_either(False),
    "Squeeze": _squeeze,
    "Sub": _neutral_right(0, integers_only=True),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
