"""Two Reshapes in a row are one; a Reshape to the shape that is already there is none.

    Reshape(Reshape(x, s), t)  →  Reshape(x, t)
    Reshape(x, shape of x)     →  x

Preconditions: both shapes are constants. A 0 in t ("copy this axis of the input") must stand where s has a
number, which replaces it, or a 0, which then copies the same axis of x. Shapes are equal if they are the same
numbers or symbols.
"""

from __future__ import annotations

import onnx_ir as ir

from ..canonicalize.graph_edits import dims, integer, integers, producer, same_shape
from ..infrastructure.rewriter import Replacement, Rule


class CollapseReshapes(Rule):
    """Reshape(Reshape(x, s), t) → Reshape(x, t), and Reshape(x, shape of x) → x."""

    name = "collapse-reshapes"
    roots = ("Reshape",)

    def apply(self, node: ir.Node) -> bool:
        """Rewrite one Reshape together with the one before it."""
        value = node.inputs[0]
        if value is None:
            return False
        if same_shape(value, node.outputs[0]):
            return Replacement(node).finish(value)
        inner = producer(value, "Reshape")
        source = inner.inputs[0] if inner is not None else None
        if inner is None or source is None:
            return False
        shape = _composed(inner, node)
        if shape is None:
            return False
        replacement = Replacement(node)
        if _keeps(source, shape):
            return replacement.finish(source)
        target = replacement.shape(*shape)
        return replacement.finish(replacement.op("Reshape", source, target, like=node.outputs[0]))


def _keeps(value: ir.Value, shape: list[int]) -> bool:
    """Whether every axis of ``value`` is copied or has the length that ``shape`` asks for."""
    sizes = dims(value)
    return (
        sizes is not None
        and len(sizes) == len(shape)
        and all(entry in (0, size) for entry, size in zip(shape, sizes, strict=True))
    )


def _composed(inner: ir.Node, outer: ir.Node) -> list[int] | None:
    """What the outer Reshape asks for, said of the input of the inner one."""
    first, second = integers(inner.inputs[1]), integers(outer.inputs[1])
    if first is None or second is None:
        return None
    if integer(inner, "allowzero", 0) or integer(outer, "allowzero", 0):
        return None
    shape = []
    for axis, entry in enumerate(second):
        if entry != 0:
            shape.append(entry)
        elif axis < len(first) and first[axis] >= 0:
            shape.append(first[axis])
        else:
            return None
    return shape
