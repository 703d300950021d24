"""The shape that a Reshape or Expand is given, as an operand: constant, or put together at run time.

Canonical graphs write ``[0, 0, 12, 32]`` as one initializer, shared by all who need it. Where a dimension is
known only at run time and cannot be copied or inferred, the shape is a Concat of such sizes with constants,
or the Shape of another value.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from ..views.values import input_at, integer, static_dim
from .facts import Fact, constant_integers, label, pin, rank, same, width


def follow_shape_operand(node: ir.Node) -> Iterator[Fact]:
    """Pin those axes of the result whose entry in the shape could not be corrected."""
    target = node.outputs[0]
    operand = input_at(node, 1)
    liked = _shape_of(operand)
    if liked is not None:
        offset = rank(target) - rank(liked)
        for axis in range(rank(liked)):
            yield from same(liked, axis, target, axis + offset)
        return
    found = entries(operand, rank(target))
    reason = f"{label(node)} computes its size"
    for axis in range(rank(target)):
        if width(target, axis) is not None and (found is None or found[axis] is None):
            yield from pin(target, [axis], reason)


def entries(operand: ir.Value | None, length: int) -> list[int | None] | None:
    """The constants among a shape's entries, and None for computed ones; None if it is no list of them."""
    constant = constant_integers(operand)
    if constant is not None:
        return list(constant) if len(constant) == length else None
    node = None if operand is None else operand.producer()
    if node is None or node.op_type != "Concat" or node.domain != "":
        return None
    found: list[int | None] = []
    for part in node.inputs:
        known = constant_integers(part)
        count = static_dim(part, 0)
        if known is None and count is None:
            return None
        found.extend(known if known is not None else [None] * (count or 0))
    return found if len(found) == length else None


def _shape_of(operand: ir.Value | None) -> ir.Value | None:
    """The value whose whole shape the operand is."""
    node = None if operand is None else operand.producer()
    if node is None or node.op_type != "Shape" or node.domain != "":
        return None
    source = node.inputs[0]
    if integer(node, "start") or "end" in node.attributes or source is None or source.shape is None:
        return None
    return source
