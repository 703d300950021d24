"""Rules as data: for every op, how the indices along the axes of its inputs, outputs and weights go together.

A rule is a small function of one node that yields relations between axes, pins of axes that must stay, with
the reason, and what an axis of a weight is used as. It looks at axes whose size is a known number above 1;
nodes whose shapes are not known, and ops without a rule, pin everything that they touch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from ..views.values import input_at, integer, is_constant, static_dim
from . import layout_rules
from .facts import (
    Fact,
    Pin,
    Rule,
    dimension,
    integers,
    label,
    pairs,
    pin,
    pin_all,
    rank,
    same,
    together,
    use,
    width,
)


def elementwise(node: ir.Node) -> Iterator[Fact]:
    """Every input, broadcast, has the axes of the output."""
    target = node.outputs[0]
    for source in node.inputs:
        if source is not None:
            for axis in range(-rank(source), 0):
                yield from same(source, axis, target, axis)


def first_input(node: ir.Node) -> Iterator[Fact]:
    """The output has the axes of the first input; the other inputs are single numbers."""
    source, target = node.inputs[0], node.outputs[0]
    assert source is not None
    for axis in range(rank(source)):
        yield from same(source, axis, target, axis)


def nothing(node: ir.Node) -> Iterator[Fact]:
    """The output depends on the size of the input only."""
    del node
    yield from ()


def matmul(node: ir.Node) -> Iterator[Fact]:
    """[.., m, k] · [.., k, n]: the sum runs over k."""
    left, right = node.inputs
    target = node.outputs[0]
    assert left is not None
    assert right is not None
    if rank(left) < 2 or rank(right) < 2:
        yield from pin_all([left, right, target], f"{label(node)} multiplies a vector")
        return
    yield from same(left, -1, right, -2)
    yield from same(left, -2, target, -2)
    yield from same(right, -1, target, -1)
    for source in (left, right):
        for axis in range(-rank(source), -2):
            yield from same(source, axis, target, axis)
    yield from use(right, -2, "consumer")
    yield from use(right, -1, "producer")
    yield from use(left, -1, "consumer")
    yield from use(left, -2, "producer")


def gemm(node: ir.Node) -> Iterator[Fact]:
    """α · A · B + β · C, where A and B may be transposed."""
    left, right, added = node.inputs[0], node.inputs[1], input_at(node, 2)
    target = node.outputs[0]
    rows, inner = (1, 0) if integer(node, "transA") else (0, 1)
    summed, columns = (1, 0) if integer(node, "transB") else (0, 1)
    yield from same(left, inner, right, summed)
    yield from same(left, rows, target, 0)
    yield from same(right, columns, target, 1)
    if added is not None:
        for axis in range(-rank(added), 0):
            yield from same(added, axis, target, axis)
    yield from use(right, summed, "consumer")
    yield from use(right, columns, "producer")
    yield from use(left, inner, "consumer")
    yield from use(left, rows, "producer")


def convolution(node: ir.Node) -> Iterator[Fact]:
    """Output channels come from the weight's axis 0; input channels are summed over within their group."""
    source, weight, bias, target = node.inputs[0], node.inputs[1], input_at(node, 2), node.outputs[0]
    assert source is not None
    assert weight is not None
    groups = integer(node, "group") or 1
    yield from same(source, 0, target, 0)
    yield from same(weight, 0, target, 1)
    yield from same(bias, 0, weight, 0)
    if groups == 1:
        yield from same(source, 1, weight, 1)
        yield from use(weight, 1, "consumer")
        yield from use(weight, 0, "producer")
        return
    channels, out = static_dim(source, 1), static_dim(weight, 0)
    if channels is None or out is None:
        yield from pin_all([source, weight, target], f"{label(node)} has groups of unknown size")
        return
    # A structure is a whole group: all its input channels with all its output channels.
    every, per_group = np.arange(channels), out // groups
    yield from together(weight, 0, per_group)
    yield pairs(source, 1, every, weight, 0, every // (channels // groups) * per_group)
    yield from pin(weight, [1], f"{label(node)} is a grouped convolution")


def batch_norm(node: ir.Node) -> Iterator[Fact]:
    """Each channel is normalised on its own, by constants or by its own mean and variance."""
    yield from first_input(node)
    for parameter in node.inputs[1:5]:
        yield from same(parameter, 0, node.inputs[0], 1)


def group_norm(node: ir.Node) -> Iterator[Fact]:
    """Channels that are normalised together go together."""
    yield from batch_norm(node)
    channels, groups = static_dim(node.inputs[0], 1), integer(node, "num_groups")
    if channels is not None and groups:
        yield from together(node.outputs[0], 1, channels // groups)


def layer_norm(node: ir.Node) -> Iterator[Fact]:
    """The normalised axes stay: the mean over all of them is subtracted."""
    yield from first_input(node)
    source, target = node.inputs[0], node.outputs[0]
    assert source is not None
    for parameter in node.inputs[1:3]:
        if parameter is not None:
            for axis in range(-rank(parameter), 0):
                yield from same(parameter, axis, target, axis)
    axes = range(_normalized_axis(node), rank(source))
    yield from pin(source, axes, f"{label(node)} subtracts the mean over all its channels")


def rms_norm(node: ir.Node) -> Iterator[Fact]:
    """The normalised axis may shrink where the channels that go are zero: in the residual stream."""
    source, scale, target = node.inputs[0], node.inputs[1], node.outputs[0]
    assert source is not None
    assert scale is not None
    yield from first_input(node)
    for axis in range(-rank(scale), 0):
        yield from same(scale, axis, target, axis)
    axis = _normalized_axis(node)
    if axis != rank(source) - 1 or not is_constant(scale):
        yield from pin(source, range(axis, rank(source)), f"{label(node)} normalizes over it")
    elif width(source, axis) is not None:
        reason = f"{label(node)} divides by the root mean square over all its channels"
        yield Pin(dimension(source, axis), reason, unless_hidden=True)


def _normalized_axis(node: ir.Node) -> int:
    source, axis = node.inputs[0], integer(node, "axis")
    assert source is not None
    return (-1 if axis is None else axis) % rank(source)


def softmax(node: ir.Node) -> Iterator[Fact]:
    """The axis that is summed over stays."""
    yield from first_input(node)
    axis = integer(node, "axis")
    yield from pin(node.inputs[0], [-1 if axis is None else axis], f"{label(node)} sums over it")


def reduction(node: ir.Node) -> Iterator[Fact]:
    """The axes that are reduced stay."""
    source, target = node.inputs[0], node.outputs[0]
    assert source is not None
    axes = integers(node, "axes", 1)
    given = input_at(node, 1) is not None or "axes" in node.attributes
    if given and axes is None:
        yield from pin_all([source, target], f"{label(node)} computes its axes")
        return
    if not given:
        axes = [] if integer(node, "noop_with_empty_axes") else list(range(rank(source)))
    reduced = {axis % rank(source) for axis in axes or ()}
    yield from pin(source, sorted(reduced), f"{label(node)} reduces it")
    keep = integer(node, "keepdims") != 0
    position = 0
    for axis in range(rank(source)):
        if axis not in reduced:
            yield from same(source, axis, target, position)
        position += axis not in reduced or keep


def pooling(node: ir.Node) -> Iterator[Fact]:
    """Batch and channels stay the same, space shrinks."""
    for axis in (0, 1):
        yield from same(node.inputs[0], axis, node.outputs[0], axis)


def resize(node: ir.Node) -> Iterator[Fact]:
    """Scaled by factors, the channels stay the same; sizes that are given as numbers pin them."""
    if input_at(node, 3) is None:
        yield from pooling(node)
    else:
        yield from pin_all([node.inputs[0], node.outputs[0]], f"{label(node)} is given all sizes")


def rotary_embedding(node: ir.Node) -> Iterator[Fact]:
    """Each head is turned on its own, by tables that all heads share."""
    source, target = node.inputs[0], node.outputs[0]
    assert source is not None
    yield from first_input(node)
    heads = integer(node, "num_heads")
    channels = static_dim(source, -1)
    if rank(source) == 3 and heads and channels is not None:
        yield from together(target, 2, channels // heads)
    elif rank(source) == 4:
        yield from pin(source, [3], f"{label(node)} turns pairs of it")
    yield from pin_all(_tables(node), f"{label(node)} turns all heads by it")


def attention(node: ir.Node) -> Iterator[Fact]:
    """A key-value head goes with all the query heads that read it, and with its cache."""
    query, key, value = node.inputs[0], node.inputs[1], node.inputs[2]
    assert query is not None
    assert key is not None
    assert value is not None
    target = node.outputs[0]
    heads = integer(node, "q_num_heads") or static_dim(query, 1)
    kv_heads = integer(node, "kv_num_heads") or static_dim(key, 1)
    if not heads or not kv_heads or heads % kv_heads:
        yield from pin_all([*node.inputs, *node.outputs], f"{label(node)} has heads of unknown number")
        return
    axis = 1 if rank(query) == 4 else 2
    per_head = 1 if rank(target) == 4 else (static_dim(target, 2) or heads) // heads
    repeated = heads // kv_heads
    yield from together(target, axis, repeated * per_head)
    yield from _heads(query, axis, heads, target, axis, per_head)
    for operand in (key, value):
        yield from _heads(operand, axis, kv_heads, target, axis, repeated * per_head)
    for cache in (input_at(node, 4), input_at(node, 5), *node.outputs[1:3]):
        if cache is not None and cache.name and cache.shape is not None:
            yield from _heads(cache, 1, kv_heads, target, axis, repeated * per_head)
            yield from pin(cache, [3], f"{label(node)} works on whole heads")
    if axis == 1:
        for operand in (query, key, value, target):
            yield from pin(operand, (2, 3), f"{label(node)} works on whole heads")
    for scores in (input_at(node, 3), *node.outputs[3:4]):
        if scores is None or scores.shape is None or rank(scores) < 3 or static_dim(scores, -3) == 1:
            continue
        if static_dim(scores, -3) == heads:
            yield from _heads(scores, rank(scores) - 3, heads, target, axis, per_head)
        else:
            yield from pin(target, [axis], f"the heads of '{scores.name}' are not known")


def _heads(
    operand: ir.Value, axis: int, heads: int, target: ir.Value, target_axis: int, block: int
) -> Iterator[Fact]:
    """Head h of an operand goes with the indices of the result that start at h · ``block``."""
    size = width(operand, axis)
    if size is not None and width(target, target_axis) is not None:
        every = np.arange(size)
        yield pairs(operand, axis, every, target, target_axis, every // (size // heads) * block)


_ELEMENTWISE = (
    *("Abs", "Add", "And", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "Cast", "Ceil", "Celu", "Clip", "Cos"),
    *("Div", "Dropout", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual"),
    *("HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Less", "LessOrEqual", "Log"),
    *("Max", "Mean", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or", "Pow", "PRelu", "Reciprocal", "Relu"),
    *("Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish"),
    *("Tan", "Tanh", "ThresholdedRelu", "Where", "Xor"),
)
_REDUCTIONS = (
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin"),
    *("ReduceProd", "ReduceSum", "ReduceSumSquare"),
)

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **dict.fromkeys(_REDUCTIONS, reduction),
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), layout_rules.reshape),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"), pooling),
    **dict.fromkeys(("LogSoftmax", "Softmax"), softmax),
    "Attention": attention,
    "BatchNormalization": batch_norm,
    "Concat": layout_rules.concat,
    "Conv": convolution,
    "Expand": layout_rules.expand,
    "Gather": layout_rules.gather,
    "GatherND": layout_rules.gather_nd,
    "Gemm": gemm,
    "GroupNormalization": group_norm,
    "InstanceNormalization": batch_norm,
    "LayerNormalization": layer_norm,
    "MatMul": matmul,
    "Pad": layout_rules.pad,
    "RMSNormalization": rms_norm,
    "Resize": resize,
    "RotaryEmbedding": rotary_embedding,
    "Shape": nothing,
    "SequenceAt": layout_rules.sequence_at,
    "Slice": layout_rules.slice_,
    "Split": layout_rules.split,
    "SplitToSequence": layout_rules.split_to_sequence,
    "Tile": layout_rules.tile,
    "Transpose": layout_rules.transpose,
}
"""The rule of every op of the standard domain that structured pruning understands."""


def _tables(node: ir.Node) -> tuple[ir.Value | None, ...]:
    """Operands that all heads share, so that their shapes do not matter."""
    return tuple(node.inputs[1:4]) if node.op_type == "RotaryEmbedding" else ()


def facts(node: ir.Node) -> Iterator[Fact]:
    """What the node says about the axes of the values that it touches."""
    values = (*node.inputs, *node.outputs)
    touched = [
        value
        for value in values
        if value is not None and value.name and not isinstance(value.type, ir.SequenceType)
    ]
    rule = RULES.get(node.op_type) if node.domain == "" else None
    if rule is None:
        domain = f"{node.domain}::" if node.domain else ""
        for pinned in pin_all(touched, f"no rule for op {domain}{node.op_type}"):
            yield dataclasses.replace(pinned, unknown_op=True)
        return
    needed = [value for value in touched if value not in _tables(node)]
    unknown = next((value for value in needed if value.shape is None), None)
    if unknown is not None:
        yield from pin_all(touched, f"the shape of '{unknown.name}' is not known")
        return
    yield from rule(node)
