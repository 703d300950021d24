"""Let a decoder's attentions keep their cache in buffers that they append to in place.

    Y, present = Attention(Q, K, V, mask, past)   →   Y, present = CachedAttention(Q, K, V, mask, past)

Both compute the same. The second form is what targets bind to a kernel with a shared buffer, and what other
passes over the cache build on. Rotation of queries and keys stays outside, with the model's ``position_ids``.

Preconditions: the fused form (heads are split by Attention itself); one Attention with a mask for each layer
of the cache, which starts from the graph's inputs ``past_key_values.{i}.key`` and ``.value``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import onnx_ir as ir

from ...ir import ops
from ...ir.errors import PassError
from ...ir.ops.cached_attention import OP_TYPE, cached_attention
from ...ir.views.caches import CachedLayer, cached_layers
from ...ir.views.values import input_at, integer, number
from ..infrastructure.base import Coverage, Fact, Pass, PassContext, PassResult, Skipped


@dataclasses.dataclass(frozen=True, kw_only=True)
class RaiseCache(Pass):
    """Turn attentions with a key-value cache into the op that kernels with shared buffers run."""

    name: ClassVar[str] = "raise-cache"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL, Fact.FUSED})

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        """Rewrite ``model`` in place."""
        del ctx
        layers = cached_layers(model)
        reasons = {layer.index: raise_layer(model, layer) for layer in layers}
        skipped = tuple(
            Skipped(f"past_key_values.{index}", reason) for index, reason in reasons.items() if reason
        )
        coverage = Coverage(unit="layers of the cache", covered=len(layers) - len(skipped), skipped=skipped)
        return PassResult(modified=coverage.covered > 0, coverage=coverage)


def raised_layers(model: ir.Model, pass_name: str) -> list[CachedLayer]:
    """The layers of the cache, all raised.

    Raises:
        PassError: there is no cache, or a layer cannot be raised.
    """
    layers = cached_layers(model)
    if not layers:
        raise PassError(
            f"{pass_name}: the model has no key-value cache",
            hint="trace a causal language model, or give one whose inputs are past_key_values.{i}.key|value",
        )
    for layer in layers:
        reason = raise_layer(model, layer)
        if reason is not None:
            raise PassError(f"{pass_name}: past_key_values.{layer.index} cannot be raised: {reason}")
    return cached_layers(model)


def raise_layer(model: ir.Model, layer: CachedLayer) -> str | None:
    """Raise one layer in place, unless it is; gives the reason if it cannot be."""
    node = layer.attention
    if node.op_type == OP_TYPE:
        return None
    heads, kv_heads = integer(node, "q_num_heads"), integer(node, "kv_num_heads")
    query, key, value, mask = (input_at(node, index) for index in range(4))
    if node.op_type != "Attention" or node.domain:
        return f"it is read by {node.op_type}, and Attention was expected"
    if heads is None or kv_heads is None:
        return "its heads are split outside of Attention (run fuse with attention_layout)"
    if mask is None or query is None or key is None or value is None:
        return "its Attention has no mask"
    if integer(node, "is_causal") or integer(node, "qk_matmul_output_mode"):
        return "its Attention hides the future itself, or gives its scores away"
    if node.outputs[3:] and any(output.uses() for output in node.outputs[3:]):
        return "its scores are read"
    if (input_at(node, 4), input_at(node, 5)) != (layer.past_key, layer.past_value):
        return "keys and values are exchanged"
    size = layer.key_size
    new, definition = cached_attention(
        query,
        key,
        value,
        mask,
        (layer.past_key, layer.past_value),
        q_num_heads=heads,
        kv_num_heads=kv_heads,
        scale=number(node, "scale", 1 / math.sqrt(size)),
        softcap=number(node, "softcap", 0.0),
        name=node.name,
    )
    ops.define(model, definition)
    if len(node.outputs) > len(new.outputs):
        node.resize_outputs(len(new.outputs))
    ops.replace(node, new)
    return None
