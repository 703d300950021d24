"""Take out of attention masks what is always true, and index grids that only select a corner.

Exporters build masks by the general recipe of the model's library, for every pair of positions:

    all-true      And(i ≥ 0, m), i counted from 0            →  Expand(m, Shape(i)), or m
    index grid    GatherND(m, (0…b−1) × (0…s−1)) [b,1,1,s]   →  Unsqueeze(Slice(m, :b, :s))
    no expansion  Expand(m, shape of m)                      →  m

Preconditions: what is compared is a Range from 0 upwards, shifted only upwards and moved between axes; the
grid's axes are such Ranges, one per axis of m, in order, and every further axis of the result has length 1.
A Slice is left out along axes whose length is provably that of the grid.

The two sides are equal on all inputs on which the left one is defined: an index beyond the end of m is an
error on the left, and selects nothing on the right.
"""

from __future__ import annotations

import onnx_ir as ir

from ..canonicalize.graph_edits import constant, dims, integer, integers, is_op, producer, same_shape, scalar
from ..infrastructure.rewriter import Replacement, Rule, missed

_MOVES = ("Unsqueeze", "Squeeze", "Reshape", "Expand", "Identity", "Slice", "Transpose")
_DEEPEST = 12


class DropAlwaysTrue(Rule):
    """And(i ≥ 0, m) → m, in the shape that the And had."""

    name = "mask-drop-always-true"
    roots = ("And",)

    def apply(self, node: ir.Node) -> bool:
        """Rewrite one And, either operand of which is always true."""
        for truth, mask in (node.inputs[:2], reversed(node.inputs[:2])):
            compared = _always_true(truth)
            if compared is None or mask is None:
                continue
            replacement = Replacement(node)
            if same_shape(mask, node.outputs[0]):
                return replacement.finish(mask)
            shape = replacement.op("Shape", compared)
            shape.type = ir.TensorType(ir.DataType.INT64)
            return replacement.finish(replacement.op("Expand", mask, shape, like=node.outputs[0]))
        return False


def _always_true(value: ir.Value | None) -> ir.Value | None:
    """The left side of a comparison ``i ≥ c`` that always holds; it has the shape of the comparison."""
    node = producer(value, "GreaterOrEqual", "Greater", "LessOrEqual", "Less")
    if node is None:
        return None
    larger, smaller = node.inputs if node.op_type.startswith("Greater") else reversed(node.inputs)
    bound = scalar(smaller)
    if larger is None or smaller is None or bound is None or len(dims(smaller) or ()) > 0:
        return None
    strict = not node.op_type.endswith("OrEqual")
    holds = bound < 0 if strict else bound <= 0
    return larger if holds and _not_negative(larger) else None


def _not_negative(value: ir.Value | None, depth: int = 0) -> bool:
    """Whether every element is provably ≥ 0."""
    array = constant(value)
    if array is not None:
        return bool((array >= 0).all())
    node = None if value is None else value.producer()
    if node is None or depth == _DEEPEST:
        return False
    if is_op(node, "Shape", "Size"):
        return True
    if is_op(node, "Range"):
        step = scalar(node.inputs[2])
        return step is not None and step > 0 and _not_negative(node.inputs[0], depth + 1)
    if is_op(node, "Add", "Max"):
        return all(_not_negative(operand, depth + 1) for operand in node.inputs)
    return is_op(node, *_MOVES) and _not_negative(node.inputs[0], depth + 1)


class DropMaskExpand(Rule):
    """Expand(m, shape of m) → m."""

    name = "mask-drop-expand"
    roots = ("Expand",)

    def apply(self, node: ir.Node) -> bool:
        """Drop one Expand of a boolean value."""
        mask, result = node.inputs[0], node.outputs[0]
        if mask is None or mask.dtype != ir.DataType.BOOL or not same_shape(mask, result):
            return False
        return Replacement(node).finish(mask)


class SelectInsteadOfGather(Rule):
    """GatherND(m, grid) → Unsqueeze(Slice(m))."""

    name = "mask-select"
    roots = ("GatherND",)

    def apply(self, node: ir.Node) -> bool:
        """Rewrite one GatherND whose indices are a grid of counted axes."""
        mask, result = node.inputs[0], node.outputs[0]
        counted = _grid(node.inputs[1])
        sizes, extents = dims(mask), dims(result)
        if mask is None or counted is None or integer(node, "batch_dims", 0):
            return False
        if sizes is None or extents is None or len(counted) != len(sizes):
            return missed(node, "the grid does not index every axis of the mask, or a shape is unknown")
        axes = [axis for axis, _ in counted]
        if axes != sorted(set(axes)) or any(
            extent != 1 for axis, extent in enumerate(extents) if axis not in axes
        ):
            return missed(node, "the axes of the grid are not in order, or repeat entries")
        if any(extents[axis] != _length(count) or extents[axis] is None for axis, count in counted):
            return missed(node, "the grid is stretched")
        replacement = Replacement(node)
        counts = {
            position: count
            for position, (axis, count) in enumerate(counted)
            if sizes[position] != extents[axis]
        }
        if counts:
            mask = _corner(replacement, mask, counts, [extents[axis] for axis in axes])
        added = [axis for axis in range(len(extents)) if axis not in axes]
        if added:
            mask = replacement.op("Unsqueeze", mask, replacement.shape(*added), like=result)
        return replacement.finish(mask)


def _corner(
    replacement: Replacement, mask: ir.Value, counts: dict[int, ir.Node], extents: list[int | str | None]
) -> ir.Value:
    """``mask`` up to the count of each axis in ``counts``, a Range node."""
    one, start = replacement.shape(1), replacement.shape(*[0] * len(counts))
    ends = [replacement.op("Reshape", node.inputs[1], one, like=one) for node in counts.values()]
    end = ends[0] if len(ends) == 1 else replacement.op("Concat", *ends, like=start, axis=0)
    corner = replacement.op("Slice", mask, start, end, replacement.shape(*counts))
    corner.type, corner.shape = mask.type, ir.Shape(extents)
    return corner


def _grid(indices: ir.Value | None) -> list[tuple[int, ir.Node]] | None:
    """For each index of the tuples in ``indices``: the axis along which it counts, and its Range node."""
    node = producer(indices, "Concat")
    rank = len(dims(indices) or ())
    if node is None or rank == 0 or integer(node, "axis", 0) not in (-1, rank - 1):
        return None
    counted = []
    for part in node.inputs:
        column = producer(part, "Unsqueeze")
        if column is None or integers(column.inputs[1]) not in ([-1], [rank - 1]):
            return None
        expanded = producer(column.inputs[0], "Expand")
        count = _counted_axis(expanded.inputs[0] if expanded is not None else column.inputs[0])
        if count is None:
            return None
        axis, own_rank, source = count
        counted.append((axis + rank - 1 - own_rank, source))
    return counted


def _counted_axis(value: ir.Value | None) -> tuple[int, int, ir.Node] | None:
    """(axis, rank, Range node) of a value that counts 0, 1, 2, … along one axis, with length 1 elsewhere."""
    steps = []
    node = producer(value, "Unsqueeze", "Range")
    while node is not None and node.op_type == "Unsqueeze":
        steps.append(node)
        node = producer(node.inputs[0], "Unsqueeze", "Range")
    if node is None or scalar(node.inputs[0]) != 0 or scalar(node.inputs[2]) != 1:
        return None
    positions = [True]
    for step in reversed(steps):
        axes = integers(step.inputs[1])
        if axes is None:
            return None
        total = len(positions) + len(axes)
        added = {axis % total for axis in axes}
        remaining = iter(positions)
        positions = [False if axis in added else next(remaining) for axis in range(total)]
    return positions.index(True), len(positions), node


def _length(count: ir.Node) -> int | str | None:
    sizes = dims(count.outputs[0])
    return sizes[0] if sizes else None


MASK_RULES: tuple[Rule, ...] = (DropAlwaysTrue(), DropMaskExpand(), SelectInsteadOfGather())
