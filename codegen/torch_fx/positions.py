"""What a graph computes from integers alone, before it meets activations: angles of positions, masks.

A module of 16 bits computes it in 32: the angle 1,000 is rounded to half a radian in bfloat16, and to the
sixteenth part of one in float16 where it is a product.
"""

from __future__ import annotations

import onnx_ir as ir

_FOLLOWED = frozenset(
    {
        "Abs",
        "Add",
        "And",
        "Cast",
        "Ceil",
        "Clip",
        "Concat",
        "Cos",
        "Div",
        "Equal",
        "Exp",
        "Expand",
        "Floor",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "LessOrEqual",
        "Log",
        "MatMul",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "Pow",
        "Range",
        "Reciprocal",
        "Reshape",
        "Round",
        "Sin",
        "Slice",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Transpose",
        "Unsqueeze",
        "Where",
    }
)
"""Arithmetic, comparisons and moves. Not Gather: what is looked up with integers are embeddings."""


def computed_from_integers(graph: ir.Graph) -> frozenset[ir.Node]:
    """Nodes of `_FOLLOWED` ops of integers, booleans and what such nodes give, and constants beside them."""
    found: set[ir.Node] = set()
    for node in graph:
        followed = node.domain == "" and node.op_type in _FOLLOWED
        typed = all(value.dtype is not None for value in node.outputs)
        known = all(_is_constant(x) or _is_counted(x, found) for x in node.inputs)
        if followed and typed and known and any(_is_counted(x, found) for x in node.inputs):
            found.add(node)
    return frozenset(found)


def _is_constant(value: ir.Value | None) -> bool:
    return value is None or ir.convenience.get_const_tensor(value) is not None


def _is_counted(value: ir.Value | None, found: set[ir.Node]) -> bool:
    """Whether a value is computed, of integers alone."""
    if value is None or _is_constant(value):
        return False
    return value.producer() in found or (value.dtype is not None and not value.dtype.is_floating_point())
