"""Two Reshapes in a row are one; a Reshape to the shape that is already there is none.

    Reshape(Reshape(x, s), t)  →  Reshape(x, t)
    Reshape(x, shape of x)     →  x

Preconditions: the shape of the result is known to be the shape of x. Else t is a constant, in which a 0
("copy this axis of the input") stands where s has a number, which replaces it; where s has a 0, which then
copies the same axis of x; or where the length after the first Reshape is known, or known to be that of the
same axis of x. Known to be equal means: the same number or the same symbol.
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
        if same_shape(source, node.outputs[0]):
            return Replacement(node).finish(source)
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
    shape = integers(outer.inputs[1])
    if shape is None or integer(inner, "allowzero", 0) or integer(outer, "allowzero", 0):
        return None
    composed = [entry if entry else _copied(inner, axis) for axis, entry in enumerate(shape)]
    known = [entry for entry in composed if entry is not None]
    return known if len(known) == len(composed) else None


def _copied(inner: ir.Node, axis: int) -> int | None:
    """How to ask of the input of ``inner`` for the length that its output has along ``axis``."""
    shape = integers(inner.inputs[1]) or []
    if axis < len(shape) and shape[axis] >= 0:
        return shape[axis]
    before, after = dims(inner.inputs[0]) or [], dims(inner.outputs[0]) or []
    if axis >= len(after) or after[axis] is None:
        return None
    length = after[axis]
    if isinstance(length, int):
        return length
    return 0 if axis < len(before) and before[axis] == length else None
