"""Let Attention and RotaryEmbedding split the heads themselves.

    Q₄ = Transpose(Q [b,s,h,d]), K₄, V₄ likewise; Y = Transpose(Attention(Q₄, K₄, V₄))     [b,s,h,d]
    →  Y = Reshape(Attention(Reshape(Q) [b,s,h·d], K₃, V₃, q_num_heads=h, kv_num_heads=g)) [b,s,h,d]

ONNX defines both ops on [batch, heads, length, size] and on [batch, length, heads·size]. In the second form
the four transposes of a layer, each a copy of the whole activation, disappear; a Reshape is free, and
`reshapes` removes those that undo the split of the heads. past and present keep their 4-D layout.

A normalisation of each head by itself (over the last axis) behind the Transpose moves in front of it. A
HadamardTransform of each head (rotation R3) behind the RotaryEmbedding stays behind it, between two Reshapes.

Preconditions: query, key and value come from a Transpose that exchanges axes 1 and 2, with a normalisation, a
RotaryEmbedding and a HadamardTransform in between or not, all read by nobody else; heads and their sizes are
known numbers; the result is only read by such Transposes.

Source: ONNX operators Attention (opset 23) and RotaryEmbedding (opset 23).
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from ...ir.ops.definition import DOMAIN
from ...ir.ops.hadamard_transform import OP_TYPE as HADAMARD
from ..canonicalize.graph_edits import dims, integer, is_op, only_use, producer, rank
from ..infrastructure.rewriter import Replacement, Rule, missed

_EXCHANGE = [0, 2, 1, 3]


@dataclasses.dataclass(frozen=True)
class _Heads:
    """An operand of attention before its heads were moved to axis 1."""

    split: ir.Value
    """[batch, length, heads, size]."""
    norm: ir.Node | None
    rotary: ir.Node | None
    hadamard: ir.Node | None
    heads: int
    size: int


class FlattenAttentionHeads(Rule):
    """Transpose → Attention → Transpose, all 4-D → 3-D Attention."""

    name = "flatten-attention-heads"
    roots = ("Attention",)

    def apply(self, node: ir.Node) -> bool:
        """Rewrite one Attention node."""
        if "q_num_heads" in node.attributes or len(node.inputs) < 3:
            return False
        operands = [_heads_of(value) for value in node.inputs[:3]]
        query, key, value = operands
        if query is None or key is None or value is None:
            return missed(node, "an operand is not the transpose of [batch, length, heads, size]")
        result = node.outputs[0]
        readers = [use.node for use in result.uses()]
        if result.is_graph_output() or not all(_exchanges_heads(reader) for reader in readers):
            return missed(node, "the result is read in the layout [batch, heads, length, size]")
        replacement = Replacement(node)
        flat = [_flatten(replacement, operand) for operand in (query, key, value)]
        new = replacement.node(
            "Attention",
            [*flat, *node.inputs[3:]],
            {**node.attributes, "q_num_heads": query.heads, "kv_num_heads": key.heads},
            outputs=len(node.outputs),
        )
        _type(new.outputs[0], query.split, query.heads * value.size)
        split = replacement.op("Reshape", new.outputs[0], replacement.shape(0, 0, query.heads, value.size))
        for reader in dict.fromkeys(readers):
            split.type, split.shape = reader.outputs[0].type, reader.outputs[0].shape
            replacement.replace(reader.outputs[0], split)
        for old, other in zip(node.outputs[1:], new.outputs[1:], strict=True):
            replacement.replace(old, other)
        return replacement.finish()


def _exchanges_heads(node: ir.Node) -> bool:
    return (
        is_op(node, "Transpose")
        and "perm" in node.attributes
        and list(node.attributes["perm"].as_ints()) == _EXCHANGE
    )


def _normalises_heads(node: ir.Node) -> bool:
    """Whether a norm is over the last axis alone, scales all heads alike and has no second result."""
    return (
        integer(node, "axis", -1) in (-1, 3)
        and all(value is None or rank(value) == 1 for value in node.inputs[1:])
        and not any(output.uses() or output.is_graph_output() for output in node.outputs[1:])
    )


def _heads_of(value: ir.Value | None) -> _Heads | None:
    """The operand before its Transpose, and what happens behind it, if that is how ``value`` is made."""
    hadamard = _hadamard_of(value)
    turned = value if hadamard is None else hadamard.inputs[0]
    rotary = producer(turned, "RotaryEmbedding")
    rotated = turned if rotary is None else rotary.inputs[0]
    norm = producer(rotated, "RMSNormalization", "LayerNormalization")
    moved = rotated if norm is None else norm.inputs[0]
    if any(step is None or not only_use(step) for step in (value, turned, rotated, moved)) or moved is None:
        return None
    if norm is not None and not _normalises_heads(norm):
        return None
    transpose = moved.producer()
    if transpose is None or not _exchanges_heads(transpose):
        return None
    split = transpose.inputs[0]
    sizes = dims(split)
    if split is None or sizes is None or len(sizes) != 4:
        return None
    heads, size = sizes[2:]
    if not isinstance(heads, int) or not isinstance(size, int):
        return None
    return _Heads(split, norm, rotary, hadamard, heads, size)


def _hadamard_of(value: ir.Value | None) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and (node.domain, node.op_type) == (DOMAIN, HADAMARD) else None


def _flatten(replacement: Replacement, operand: _Heads) -> ir.Value:
    width = operand.heads * operand.size
    split = operand.split
    if operand.norm is not None:
        node = operand.norm
        inputs, attributes = [split, *node.inputs[1:]], {**node.attributes, "axis": -1}
        split = replacement.node(node.op_type, inputs, attributes, metadata=node).outputs[0]
        split.type, split.shape = operand.split.type, operand.split.shape
    flat = replacement.op("Reshape", split, replacement.shape(0, 0, width))
    _type(flat, operand.split, width)
    if operand.rotary is not None:
        flat = replacement.node(
            "RotaryEmbedding",
            [flat, *operand.rotary.inputs[1:]],
            {**operand.rotary.attributes, "num_heads": operand.heads},
            metadata=operand.rotary,
        ).outputs[0]
        _type(flat, operand.split, width)
    return flat if operand.hadamard is None else _transformed(replacement, flat, operand, operand.hadamard)


def _transformed(replacement: Replacement, flat: ir.Value, operand: _Heads, old: ir.Node) -> ir.Value:
    """Each head by itself, as the old node did it."""
    heads = replacement.op(
        "Reshape", flat, replacement.shape(0, 0, operand.heads, operand.size), like=operand.split
    )
    new = ir.node(
        old.op_type,
        [heads, *old.inputs[1:]],
        old.attributes,
        domain=old.domain,
        overload=old.overload,
    )
    replacement.adopt(new, metadata=old)
    new.outputs[0].type, new.outputs[0].shape = operand.split.type, operand.split.shape
    width = operand.heads * operand.size
    joined = replacement.op("Reshape", new.outputs[0], replacement.shape(0, 0, width))
    _type(joined, operand.split, width)
    return joined


def _type(value: ir.Value, like: ir.Value, width: int) -> None:
    value.type = like.type
    if like.shape is not None:
        value.shape = ir.Shape([like.shape[0], like.shape[1], width])
