"""Attention nodes get grouped heads unexpanded and the key/value cache as inputs and outputs.

    Attention(q, Reshape(Expand(Unsqueeze(k, 2))), Reshape(Expand(Unsqueeze(v, 2)))) → Attention(q, k, v)

Attention shares each key head among ``q_heads / kv_heads`` consecutive query heads by itself (Ainslie et al.
2023), so the copies need not be made. Preconditions: k and v are both repeated, equally often, along an axis
right behind the heads, and shapes are known.

    K = Concat(past_key, k), V = Concat(past_value, v), y = Attention(q, K, V, mask)
    → y, K, V = Attention(q, k, v, mask, past_key, past_value)

Preconditions: the concatenation is along the sequence; nothing but the Attention reads K and V (they may be
graph outputs); and the node is not causal by itself, because its causal mask would be offset by the length of
the past, which it is not while the past is part of K.
"""

from __future__ import annotations

import onnx_ir as ir

from ..infrastructure.rewriter import Replacement, Rule, missed
from .graph_edits import dims, integer, integers, producer


class GroupedHeads(Rule):
    """Attention over repeated key/value heads → Attention over the heads themselves."""

    name = "grouped-heads"
    roots = ("Attention",)

    def apply(self, node: ir.Node) -> bool:
        """Rewrite ``node``, an Attention."""
        key, value = _repeated(node.inputs[1]), _repeated(node.inputs[2])
        if key is None or value is None:
            return False
        if _has_past(node):
            return missed(node, "its past has repeated heads too")
        if len(node.outputs) > 1 and any(output.uses() for output in node.outputs[1:3]):
            return missed(node, "something reads the repeated heads from it")
        if (dims(key) or [])[1:2] != (dims(value) or [])[1:2]:
            return missed(node, "keys and values have different numbers of heads")
        node.replace_input_with(1, key)
        node.replace_input_with(2, value)
        return True


def _has_past(node: ir.Node) -> bool:
    return any(value is not None for value in node.inputs[4:6])


def _repeated(value: ir.Value | None) -> ir.Value | None:
    """k [batch, heads, length, size] if ``value`` is k with every head repeated, else ``None``."""
    reshape = producer(value, "Reshape")
    expand = producer(reshape.inputs[0], "Expand") if reshape is not None else None
    unsqueeze = producer(expand.inputs[0], "Unsqueeze") if expand is not None else None
    if (
        value is None
        or expand is None
        or unsqueeze is None
        or integers(unsqueeze.inputs[1]) not in ([2], [-3])
    ):
        return None
    source = unsqueeze.inputs[0]
    own, expanded, result = dims(source), dims(expand.outputs[0]), dims(value)
    if source is None or own is None or expanded is None or result is None or len(own) != 4:
        return None
    heads, repeats = own[1], expanded[2] if len(expanded) == 5 else None
    if not isinstance(heads, int) or not isinstance(repeats, int) or None in own:
        return None
    if expanded != [own[0], heads, repeats, own[2], own[3]]:
        return None
    return source if result == [own[0], heads * repeats, own[2], own[3]] else None


class CacheInAttention(Rule):
    """Concat(past, new) in front of Attention → past inputs and present outputs of Attention."""

    name = "cache-in-attention"
    roots = ("Attention",)

    def apply(self, node: ir.Node) -> bool:
        """Rewrite ``node``, an Attention."""
        key, value = _concatenated(node, 1), _concatenated(node, 2)
        if key is None or value is None:
            return False
        if integer(node, "is_causal", 0):
            return missed(node, "it is causal without an offset by the past")
        if _has_past(node) or any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
            return missed(node, "it has a past or further outputs already")
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        inputs = [node.inputs[0], key.inputs[1], value.inputs[1], mask, key.inputs[0], value.inputs[0]]
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        replacement = Replacement(node)
        attention = replacement.node("Attention", inputs, attributes, outputs=3)
        replacement.replace(key.outputs[0], attention.outputs[1])
        replacement.replace(value.outputs[0], attention.outputs[2])
        return replacement.finish(attention.outputs[0])


def _concatenated(node: ir.Node, index: int) -> ir.Node | None:
    """The Concat of past and new keys (or values) that is input ``index`` and that nothing else reads."""
    value = node.inputs[index]
    concat = producer(value, "Concat")
    if value is None or concat is None or len(concat.inputs) != 2 or concat.graph is not node.graph:
        return None
    if any(use.node is not node for use in value.uses()) or len(value.uses()) != 1:
        return None
    parts = [dims(part) for part in concat.inputs]
    if integer(concat, "axis", 0) not in (-2, 2) or any(part is None or len(part) != 4 for part in parts):
        return None
    return concat


def rules(opset: int) -> list[Rule]:
    """The rules whose results exist in this opset."""
    return [GroupedHeads(), CacheInAttention()] if opset >= 23 else []
