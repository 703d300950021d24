"""Attention nodes with the linears around them, the number of heads and the key-value cache."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from .linears import Linear, linears
from .values import input_at, integer, only_reader, static_dim

_PASSED_THROUGH = frozenset(
    {"Reshape", "Transpose", "RotaryEmbedding", "RMSNormalization", "LayerNormalization"}
    | {"Identity", "Cast", "Squeeze", "Unsqueeze", "Mul"}
    | {"Split", "Slice", "SplitToSequence", "SequenceAt"}
)
"""Ops between a projection and the attention: laying out heads, rotating, normalising, scaling, unmerging."""
_LONGEST_PATH = 12
"""Nodes between a projection and the attention; a longer path is something else."""


@dataclasses.dataclass(frozen=True)
class AttentionBlock:
    """One ``Attention`` node (opset 23) and what belongs to it.

    Attributes:
        node: the op.
        q, k, v: the projections that make queries, keys and values; the same linear where they are merged,
            None where the path to them is not understood (cross-attention caches, values from elsewhere).
        o: the projection of the result.
        num_heads, kv_heads, head_size: as far as shapes and attributes tell. ``kv_heads`` is smaller than
            ``num_heads`` for grouped queries.
        mask: the mask or bias that is added to the scores, if there is one.
        past_key, past_value: the cache that goes in, [batch, kv_heads, past_sequence, head_size].
        present_key, present_value: the cache that comes out.
        is_causal: the op masks the future itself.
    """

    node: ir.Node
    q: Linear | None
    k: Linear | None
    v: Linear | None
    o: Linear | None
    num_heads: int | None
    kv_heads: int | None
    head_size: int | None
    mask: ir.Value | None
    past_key: ir.Value | None
    past_value: ir.Value | None
    present_key: ir.Value | None
    present_value: ir.Value | None
    is_causal: bool


def attentions(model: ir.Model) -> list[AttentionBlock]:
    """The attention nodes of the model's graph, in its order."""
    found = linears(model)
    by_output = {linear.output: linear for linear in found}
    by_node = {linear.node: linear for linear in found}
    return [
        _block(node, by_output, by_node)
        for node in model.graph
        if node.op_type == "Attention" and node.domain == ""
    ]


def _block(
    node: ir.Node, by_output: dict[ir.Value, Linear], by_node: dict[ir.Node, Linear]
) -> AttentionBlock:
    query, key = input_at(node, 0), input_at(node, 1)
    num_heads, head_size = _heads(query, integer(node, "q_num_heads"))
    kv_heads, _ = _heads(key, integer(node, "kv_num_heads"))
    return AttentionBlock(
        node=node,
        q=_projection(query, by_output),
        k=_projection(key, by_output),
        v=_projection(input_at(node, 2), by_output),
        o=_output_projection(node.outputs[0], by_node),
        num_heads=num_heads,
        kv_heads=kv_heads,
        head_size=head_size,
        mask=input_at(node, 3),
        past_key=input_at(node, 4),
        past_value=input_at(node, 5),
        present_key=_output_at(node, 1),
        present_value=_output_at(node, 2),
        is_causal=bool(integer(node, "is_causal")),
    )


def _heads(value: ir.Value | None, heads: int | None) -> tuple[int | None, int | None]:
    """(heads, head size) of [batch, heads, sequence, size], or of [batch, sequence, width]."""
    if heads is None:
        return static_dim(value, 1), static_dim(value, -1)
    width = static_dim(value, -1)
    return heads, None if width is None else width // heads


def _output_at(node: ir.Node, index: int) -> ir.Value | None:
    value = node.outputs[index] if index < len(node.outputs) else None
    return value if value is not None and (value.uses() or value.is_graph_output()) else None


def _projection(value: ir.Value | None, by_output: dict[ir.Value, Linear]) -> Linear | None:
    for _ in range(_LONGEST_PATH):
        if value is None or value in by_output:
            break
        node = value.producer()
        if node is None or node.op_type not in _PASSED_THROUGH:
            return None
        value = node.inputs[0]
    return None if value is None else by_output.get(value)


def _output_projection(value: ir.Value, by_node: dict[ir.Node, Linear]) -> Linear | None:
    for _ in range(_LONGEST_PATH):
        reader = only_reader(value)
        if reader is None or reader in by_node:
            break
        if reader.op_type not in _PASSED_THROUGH or reader.inputs[0] is not value:
            return None
        value = reader.outputs[0]
    else:
        return None
    linear = None if reader is None else by_node.get(reader)
    return linear if linear is not None and linear.input is value else None
