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
    """Nodes of `_FOLLOWED` ops whose operands are constants, integers, booleans, or come from such nodes."""
    found: set[ir.Node] = set()
    for node in graph:
        followed = node.domain == "" and node.op_type in _FOLLOWED
        typed = all(value.dtype is not None for value in node.outputs)
        if followed and typed and all(_is_known(x, found) for x in node.inputs):
            found.add(node)
    return frozenset(found)


def _is_known(value: ir.Value | None, found: set[ir.Node]) -> bool:
    if value is None or value.producer() in found or ir.convenience.get_const_tensor(value) is not None:
        return True
    return value.dtype is not None and not value.dtype.is_floating_point()
