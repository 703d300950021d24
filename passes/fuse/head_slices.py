"""Heads that are taken out of a merged projection are cut before it is split into heads.

    Transpose(GatherND(Transpose(x, p), [[a], [a+1], …]), q)  →  Transpose(Slice(x, a:b, axis p₀), p∘q)
    Split(Reshape(x [b,s,n·d] → [b,s,n,d]), [m, …], axis 2)   →  Reshape(Split(x, [m·d, …], axis 2)), …

The first is how torch writes ``x[:, :, [-1], :]``, as multi-query attention takes its one head of keys and
values out of ``query_key_value``. The second brings such a projection into the form in which others are, cut
first and split into heads then, which attention takes as it is (see `attention_layout`).

Preconditions: the indices are constant and follow on each other along one axis of known length; the Reshape
keeps batch and length, and only the Split reads its result.
"""

from __future__ import annotations

import onnx_ir as ir

from ..canonicalize.graph_edits import constant, dims, integer, integers, is_op, only_use, producer
from ..infrastructure.rewriter import Replacement, Rule, missed


class SliceInsteadOfGatherND(Rule):
    """Transpose(GatherND(Transpose(x), consecutive)) → Transpose(Slice(x))."""

    name = "slice-instead-of-gather-nd"
    roots = ("GatherND",)

    def apply(self, node: ir.Node) -> bool:
        """Rewrite one GatherND and the transpose that reads it."""
        before = producer(node.inputs[0], "Transpose")
        readers = [use.node for use in node.outputs[0].uses()]
        if before is None or not only_use(node.outputs[0]) or not is_op(readers[0], "Transpose"):
            return False
        bounds = _consecutive(node)
        if bounds is None:
            return missed(node, "its indices do not follow on each other along one axis")
        behind = readers[0]
        first, then = _permutation(before), _permutation(behind)
        if first is None or then is None:
            return missed(node, "a transpose around it does not say its permutation")
        replacement = Replacement(node)
        start, end = bounds
        part = replacement.op(
            "Slice",
            before.inputs[0],
            *(replacement.shape(number) for number in (start, end, first[0])),
        )
        part.type = behind.outputs[0].type
        moved = replacement.op("Transpose", part, like=behind.outputs[0], perm=[first[axis] for axis in then])
        replacement.replace(behind.outputs[0], moved)
        return replacement.finish()


def _consecutive(node: ir.Node) -> tuple[int, int] | None:
    """(start, end) of what is gathered along the first axis."""
    indices = constant(node.inputs[1])
    if integer(node, "batch_dims", 0) or indices is None or indices.ndim != 2 or indices.shape[1] != 1:
        return None
    length = dims(node.inputs[0])
    if length is None or not isinstance(length[0], int):
        return None
    positions = [int(position) % length[0] for position in indices[:, 0]]
    start, end = positions[0], positions[0] + len(positions)
    return (start, end) if positions == list(range(start, end)) else None


def _permutation(node: ir.Node) -> list[int] | None:
    attribute = node.attributes.get("perm")
    return None if attribute is None else [int(axis) for axis in attribute.as_ints()]


class SplitBeforeHeads(Rule):
    """Split(Reshape(x)) on the axis of heads → Reshape(Split(x))."""

    name = "split-before-heads"
    roots = ("Split",)

    def apply(self, node: ir.Node) -> bool:
        """Rewrite one Split."""
        reshape = producer(node.inputs[0], "Reshape")
        if reshape is None or integer(node, "axis", 0) not in (2, -2):
            return False
        merged = reshape.inputs[0]
        whole, heads = dims(merged), dims(reshape.outputs[0])
        sizes = integers(node.inputs[1]) if len(node.inputs) > 1 else None
        if whole is None or heads is None or len(whole) != 3 or len(heads) != 4 or whole[:2] != heads[:2]:
            return False
        size = heads[3]
        if sizes is None or not isinstance(size, int) or not only_use(reshape.outputs[0]):
            return missed(node, "the sizes of its parts are not known, or something else reads the heads")
        replacement = Replacement(node)
        cut = replacement.node(
            "Split",
            [merged, replacement.shape(*(count * size for count in sizes))],
            {"axis": 2},
            outputs=len(sizes),
        )
        for old, part, count in zip(node.outputs, cut.outputs, sizes, strict=True):
            part.type = old.type
            part.shape = ir.Shape([*whole[:2], count * size])
            split = replacement.op("Reshape", part, replacement.shape(0, 0, count, size), like=old)
            replacement.replace(old, split)
        return replacement.finish()


HEAD_SLICE_RULES: tuple[Rule, ...] = (SliceInsteadOfGatherND(), SplitBeforeHeads())
