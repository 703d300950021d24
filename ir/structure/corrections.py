"""What nodes say about sizes, in attributes and constant operands, and how to correct it when axes shrink.

A constant may be shared by many nodes that shrink differently, so a node that needs another one gets it, and
shapes put together at run time are put together again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from ..views.values import integer, static_dim
from .facts import constant_integers, rank
from .kept import Kept
from .layout_rules import part_sizes, slice_cuts

Correction = Callable[[ir.Node, Kept], None]


def correct(node: ir.Node, kept: Kept) -> None:
    """Let the node say the new sizes; values still have their old shapes."""
    correction = CORRECTIONS.get(node.op_type) if node.domain == "" else None
    if correction is not None and any(kept.axes(value) for value in (*node.inputs, *node.outputs)):
        correction(node, kept)


def _shape_operand(node: ir.Node, kept: Kept) -> None:
    """Reshape and Expand: the entries of axes that shrink."""
    target, operand = node.outputs[0], node.inputs[1]
    changed = {axis: len(indices) for axis, indices in kept.axes(target).items()}
    constant = constant_integers(operand)
    if not changed or operand is None:
        return
    if constant is not None:
        entries = [
            changed[axis] if axis in changed and entry > 0 else entry for axis, entry in enumerate(constant)
        ]
        node.replace_input_with(1, shape_constant(node, entries))
        return
    concat = operand.producer()
    if concat is not None and concat.op_type == "Concat":
        node.replace_input_with(1, _joined_again(concat, changed, node))


def _joined_again(concat: ir.Node, changed: dict[int, int], reader: ir.Node) -> ir.Value:
    parts: list[ir.Value | None] = []
    start = 0
    for part in concat.inputs:
        length = static_dim(part, 0) or 0
        constant = constant_integers(part)
        if constant is not None and any(start <= axis < start + length for axis in changed):
            entries = [
                changed.get(start + i, entry) if entry > 0 else entry for i, entry in enumerate(constant)
            ]
            parts.append(shape_constant(reader, entries))
        else:
            parts.append(part)
        start += length
    again = ir.node(
        "Concat",
        parts,
        {"axis": 0},
        name=f"{reader.outputs[0].name}.shape",
        metadata_props=dict(reader.metadata_props),
    )
    again.outputs[0].name = f"{reader.outputs[0].name}.shape"
    again.outputs[0].shape, again.outputs[0].type = concat.outputs[0].shape, concat.outputs[0].type
    assert reader.graph is not None
    reader.graph.insert_before(reader, again)
    return again.outputs[0]


def _split(node: ir.Node, kept: Kept) -> None:
    source = node.inputs[0]
    assert source is not None
    axis = (integer(node, "axis") or 0) % rank(source)
    if axis not in kept.axes(source):
        return
    sizes = [_size(output, axis, kept) for output in node.outputs]
    node.attributes.pop("num_outputs", None)
    node.resize_inputs(2)
    node.replace_input_with(1, shape_constant(node, sizes))


def _split_to_sequence(node: ir.Node, kept: Kept) -> None:
    source = node.inputs[0]
    assert source is not None
    lengths = part_sizes(node)
    indices = kept.axes(source).get((integer(node, "axis") or 0) % rank(source))
    if lengths is not None and indices is not None:
        counts = np.diff(np.searchsorted(indices, np.cumsum([0, *lengths])))
        node.replace_input_with(1, shape_constant(node, counts.tolist()))


def _slice(node: ir.Node, kept: Kept) -> None:
    source = node.inputs[0]
    cuts = slice_cuts(node)
    starts, ends = constant_integers(node.inputs[1]), constant_integers(node.inputs[2])
    if source is None or cuts is None or starts is None or ends is None:
        return
    shrinks = kept.axes(source)
    if not any(axis in shrinks for axis in cuts):
        return
    for position, (axis, (start, _)) in enumerate(cuts.items()):
        if axis in shrinks:
            first = int(np.searchsorted(shrinks[axis], start))
            size, left = static_dim(source, axis) or 0, len(shrinks[axis])
            end = first + _size(node.outputs[0], axis, kept)
            starts[position] = _as_said(starts[position], first, size, left)
            ends[position] = _as_said(ends[position], end, size, left)
    node.replace_input_with(1, shape_constant(node, starts))
    node.replace_input_with(2, shape_constant(node, ends))


def _as_said(before: int, now: int, size: int, left: int) -> int:
    """A bound of an axis in the form that it had: as it is, from the end, or beyond it.

    In the same form, what is subtracted is proportional to what the axis loses.
    """
    if before > size:
        return before
    return now - left if before < 0 and now < left else now


def _convolution(node: ir.Node, kept: Kept) -> None:
    """A grouped convolution keeps as many groups as its output channels make up."""
    groups, weight = integer(node, "group") or 1, node.inputs[1]
    left = kept.size(weight, 0)
    if groups > 1 and left is not None:
        per_group = (static_dim(weight, 0) or 0) // groups
        node.attributes["group"] = ir.AttrInt64("group", left // per_group)


def _fewer(attribute: str, operand: int, axis: int) -> Correction:
    """An attribute that counts equal parts of an axis."""

    def correction(node: ir.Node, kept: Kept) -> None:
        value, count = node.inputs[operand], integer(node, attribute)
        assert value is not None
        left, before = kept.size(value, axis % rank(value)), static_dim(value, axis)
        if count and left is not None and before:
            node.attributes[attribute] = ir.AttrInt64(attribute, count * left // before)

    return correction


def _attention(node: ir.Node, kept: Kept) -> None:
    for attribute, operand in (("q_num_heads", 0), ("kv_num_heads", 1)):
        _fewer(attribute, operand, -1)(node, kept)


def _size(value: ir.Value, axis: int, kept: Kept) -> int:
    left = kept.size(value, axis)
    return (static_dim(value, axis) or 0) if left is None else left


def shape_constant(node: ir.Node, entries: Sequence[int]) -> ir.Value:
    """The int64 vector ``entries`` as an initializer of the node's graph, one for all who ask for it."""
    graph = node.graph
    assert graph is not None
    name = "planish.shape." + "x".join(str(entry) for entry in entries)
    existing = graph.initializers.get(name)
    if existing is not None and constant_integers(existing) == list(entries):
        return existing
    while name in graph.initializers:
        name += "_"
    tensor = ir.tensor(np.array(entries, dtype=np.int64), name=name)
    value = ir.Value(
        name=name, shape=ir.Shape([len(entries)]), type=ir.TensorType(ir.DataType.INT64), const_value=tensor
    )
    graph.register_initializer(value)
    return value


CORRECTIONS: dict[str, Correction] = {
    "Attention": _attention,
    "Conv": _convolution,
    "Expand": _shape_operand,
    "GroupNormalization": _fewer("num_groups", 0, 1),
    "Reshape": _shape_operand,
    "RotaryEmbedding": _fewer("num_heads", 0, -1),
    "Slice": _slice,
    "Split": _split,
    "SplitToSequence": _split_to_sequence,
}
"""The ops of the standard domain that say sizes."""
