"""A tensor that is cut into consecutive parts is cut by one Split.

    SequenceAt(SplitToSequence(x, s), i), …      →  Split(x, s)
    Slice(x, 0:a), Slice(x, a:b), Slice(x, b:)   →  Split(x, [a, b−a, …])
    Concat(x, y) with y of length 0              →  x

The first is how exporters write torch.split, the usual way to cut a merged projection (``qkv_proj``,
``gate_up_proj``). Sequences are opaque to other rewrites and to quantisation, and a Split reads its input
once where slices read it once each.

Preconditions: the axis has a known length; sizes, positions and bounds are constants; the slices have step 1,
follow on each other and cover the axis; nothing else reads the sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import onnx_ir as ir

from ..canonicalize.graph_edits import constant, dims, integer, integers, is_op
from ..infrastructure.rewriter import Replacement, Rule, missed


class SplitInsteadOfSequence(Rule):
    """SequenceAt(SplitToSequence(x, s), i) → Split(x, s)."""

    name = "split-instead-of-sequence"
    roots = ("SplitToSequence",)

    def apply(self, node: ir.Node) -> bool:
        """Rewrite one SplitToSequence with all its SequenceAt."""
        sequence, readers = node.outputs[0], [use.node for use in node.outputs[0].uses()]
        axis, length = _axis(node.inputs[0], integer(node, "axis", 0))
        sizes = _sizes(node, length) if length is not None else None
        if sizes is None or length is None:
            return missed(node, "the sizes of the parts are not known")
        positions = [_position(reader, len(sizes)) for reader in readers]
        if sequence.is_graph_output() or not readers or None in positions:
            return missed(node, "something else than SequenceAt at a constant position reads the sequence")
        replacement = Replacement(node)
        parts = _split(replacement, node.inputs[0], axis, sizes)
        for reader, position in zip(readers, positions, strict=True):
            assert position is not None
            replacement.replace(reader.outputs[0], parts[position])
        return replacement.finish()


def _axis(value: ir.Value | None, axis: int) -> tuple[int, int | None]:
    """The axis counted from the front, and its length if it is a known number."""
    sizes = dims(value)
    if sizes is None or not -len(sizes) <= axis < len(sizes):
        return axis, None
    length = sizes[axis]
    return axis % len(sizes), length if isinstance(length, int) else None


def _sizes(node: ir.Node, length: int) -> list[int] | None:
    """The sizes of the parts of a SplitToSequence; None where it would drop the axis."""
    split = node.inputs[1] if len(node.inputs) > 1 else None
    if split is None:
        return [1] * length if integer(node, "keepdims", 1) else None
    array = constant(split, limit=64)
    if array is None:
        return None
    if array.ndim:
        return [int(size) for size in array]
    size = int(array)
    return [min(size, length - start) for start in range(0, length, size)] if size > 0 else None


def _position(node: ir.Node, count: int) -> int | None:
    """Which part a SequenceAt takes."""
    position = integers(node.inputs[1]) if is_op(node, "SequenceAt") else None
    if position is None or len(position) != 1 or not -count <= position[0] < count:
        return None
    return position[0] % count


def _split(
    replacement: Replacement, value: ir.Value | None, axis: int, sizes: Sequence[int]
) -> Sequence[ir.Value]:
    inputs = [value, replacement.shape(*sizes)]
    parts = replacement.node("Split", inputs, {"axis": axis}, outputs=len(sizes)).outputs
    whole = value.shape if value is not None else None
    for part, size in zip(parts, sizes, strict=True):
        part.type = value.type if value is not None else None
        if whole is not None:
            part.shape = ir.Shape([*whole[:axis], size, *whole[axis + 1 :]])
    return parts


class SplitInsteadOfSlices(Rule):
    """Slice(x, 0:a), Slice(x, a:b), … → Split(x)."""

    name = "split-instead-of-slices"
    roots = ("Slice",)

    def apply(self, node: ir.Node) -> bool:
        """Start at the slice from 0 and look for those that follow on it."""
        value = node.inputs[0]
        first = _bounds(node)
        if value is None or first is None or first[1] != 0 or len(value.uses()) < 2:
            return False
        axis, _, end = first
        _, length = _axis(value, axis)
        following = {
            bounds[1]: (bounds[2], user)
            for user in dict.fromkeys(use.node for use in value.uses())
            if user is not node and (bounds := _bounds(user)) is not None
            if bounds[0] == axis and user.graph is node.graph and user.inputs[0] is value
        }
        cuts, nodes = [0, end], [node]
        while cuts[-1] != length and cuts[-1] in following:
            end, user = following[cuts[-1]]
            cuts.append(end)
            nodes.append(user)
        if cuts[-1] != length or len(nodes) < 2:
            return False
        # Behind the producer of x: the other slices and their readers may stand before this one.
        replacement = Replacement(node, after=value)
        sizes = [end - start for start, end in itertools.pairwise(cuts)]
        for old, part in zip(nodes, _split(replacement, value, axis, sizes), strict=True):
            replacement.replace(old.outputs[0], part)
        return replacement.finish()


def _bounds(node: ir.Node) -> tuple[int, int, int] | None:
    """(axis, start, end) of a Slice of one axis of known length, not empty, in steps of 1."""
    if not is_op(node, "Slice") or len(node.inputs) < 3:
        return None
    starts, ends = integers(node.inputs[1]), integers(node.inputs[2])
    axes = integers(node.inputs[3]) if len(node.inputs) > 3 else [0]
    steps = integers(node.inputs[4]) if len(node.inputs) > 4 else [1]
    if starts is None or ends is None or axes is None or steps != [1] or not len(starts) == len(axes) == 1:
        return None
    axis, length = _axis(node.inputs[0], axes[0])
    if length is None:
        return None
    start, end, _ = slice(starts[0], ends[0]).indices(length)
    return (axis, start, end) if start < end else None


class DropEmptyParts(Rule):
    """Concat(x, y) → Concat(x), where y has length 0 along the axis; Concat(x) → x."""

    name = "drop-empty-parts"
    roots = ("Concat",)

    def apply(self, node: ir.Node) -> bool:
        """Drop the empty operands of one Concat."""
        axis = integer(node, "axis", 0)
        kept = [value for value in node.inputs if _axis(value, axis)[1] != 0]
        if len(kept) == len(node.inputs) or not kept or kept[0] is None:
            return False
        replacement = Replacement(node)
        if len(kept) == 1:
            return replacement.finish(kept[0])
        return replacement.finish(replacement.op("Concat", *kept, like=node.outputs[0], axis=axis))


SPLIT_RULES: tuple[Rule, ...] = (SplitInsteadOfSequence(), SplitInsteadOfSlices(), DropEmptyParts())
