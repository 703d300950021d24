"""Give groups of heads of a layer caches of their own, which may then have different lengths.

    Y, present = CachedAttention(Q, K, V, mask, past)
    →  Y_g, present_g = CachedAttention(Q[g], K[g], V[g], mask, past_g) for each group g,  Y = [Y_1, Y_2, …]

A cache is one array for all heads of a layer, so heads that keep fewer tokens than others save no memory in
it. Caches are numbered anew, ``past_key_values.{n}.key``, group after group. A head of keys and values takes
its queries along.

Preconditions: raised layers; groups that together are all heads of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ....ir.graph_builder import GraphBuilder
from ....ir.ops.cached_attention import BITS, cached_attention
from ....ir.views.caches import CachedLayer
from ....ir.views.values import integer, number, static_dim

Groups = Sequence[Sequence[int]]
"""Heads of keys and values of one layer, by group."""


def split_heads(model: ir.Model, layers: Sequence[CachedLayer], groups: Sequence[Groups]) -> None:
    """Rewrite a decoder in place.

    Args:
        model: with these layers.
        layers: all of the cache, raised.
        groups: of each layer.
    """
    graph = model.graph
    for layer in layers:
        graph.inputs.remove(layer.past_key)
        graph.inputs.remove(layer.past_value)
        # Names are given anew, and must be free by then.
        layer.past_key.name, layer.past_value.name = (f"{past.name}.whole" for past in _pasts(layer))
        for present in (layer.present_key, layer.present_value):
            graph.outputs.remove(present)
            present.name = f"{present.name}.whole"
    count = 0
    for layer, of_layer in zip(layers, groups, strict=True):
        _split(model, layer, of_layer, count)
        count += len(of_layer)


def _pasts(layer: CachedLayer) -> tuple[ir.Value, ir.Value]:
    return layer.past_key, layer.past_value


def _split(model: ir.Model, layer: CachedLayer, groups: Groups, first: int) -> None:
    graph, node = model.graph, layer.attention
    build = GraphBuilder(f"{node.name}.groups")
    parts = []
    for offset, heads in enumerate(groups):
        new = _part(build, layer, np.asarray(heads), offset, first + offset)
        graph.inputs.extend(past for past in new.inputs[4:6] if past is not None)
        graph.outputs.extend(new.outputs[1:])
        parts.append(new.outputs[0])
    merged = build.op("Concat", *parts, axis=-1)
    merged.type, merged.shape = node.outputs[0].type, node.outputs[0].shape
    order = np.concatenate([np.asarray(heads) for heads in groups])
    if (np.diff(order) < 0).any():
        queries = _queries_of(np.argsort(order), layer)
        merged = _heads(build, merged, queries, integer(node, "q_num_heads") or 1, "back")
    for value in build.initializers:
        graph.register_initializer(value)
    graph.insert_before(node, build.nodes)
    ir.convenience.replace_all_uses_with(node.outputs[0], merged)
    graph.remove(node, safe=True)


def _part(
    build: GraphBuilder, layer: CachedLayer, heads: npt.NDArray[np.int64], offset: int, number_of_cache: int
) -> ir.Node:
    """Attention of one group."""
    node = layer.attention
    q_heads = integer(node, "q_num_heads") or 1
    chosen = ((_queries_of(heads, layer), q_heads), (heads, layer.heads), (heads, layer.heads))
    query, key, value = (
        _heads(build, operand, wanted, count, f"{name}.{offset}")
        for operand, (wanted, count), name in zip(node.inputs[:3], chosen, "qkv", strict=True)
    )
    past_key, past_value = (
        _past(past, f"past_key_values.{number_of_cache}.{part}", len(heads))
        for past, part in ((layer.past_key, "key"), (layer.past_value, "value"))
    )
    mask = node.inputs[3]
    assert mask is not None
    new, _ = cached_attention(
        query,
        key,
        value,
        mask,
        (past_key, past_value),
        q_num_heads=len(heads) * q_heads // layer.heads,
        kv_num_heads=len(heads),
        scale=number(node, "scale", 1.0),
        softcap=number(node, "softcap", 0.0),
        scales=_scales(build, node, heads, offset),
        bits=BITS[node.overload],
        name=f"{node.name}.{offset}",
    )
    build.nodes.append(new)
    for output, past in zip(new.outputs[1:], (past_key, past_value), strict=True):
        output.name = str(past.name).replace("past_key_values", "present")
        size = None if past.shape is None else past.shape[3]
        output.shape = ir.Shape(["batch_size", len(heads), "total_sequence_length", size])
    return new


def _queries_of(heads: npt.NDArray[np.int64], layer: CachedLayer) -> npt.NDArray[np.int64]:
    """The heads of queries that go with heads of keys and values."""
    shared = (integer(layer.attention, "q_num_heads") or 1) // layer.heads
    return (heads[:, None] * shared + np.arange(shared)).reshape(-1)


def _heads(
    build: GraphBuilder, value: ir.Value | None, wanted: npt.NDArray[np.int64], count: int, name: str
) -> ir.Value:
    """[batch, sequence, wanted · size] of [batch, sequence, count · size]."""
    assert value is not None
    size = (static_dim(value, 2) or 0) // count
    columns = (wanted[:, None] * size + np.arange(size)).reshape(-1)
    part = build.op("Gather", value, build.constant(columns, name), axis=2)
    part.type = value.type
    part.shape = None if value.shape is None else ir.Shape([*value.shape[:2], len(columns)])
    return part


def _past(whole: ir.Value, name: str, heads: int) -> ir.Value:
    assert whole.shape is not None
    batch, _, length, size = whole.shape
    return ir.Value(name=name, type=whole.type, shape=ir.Shape([batch, heads, length, size]))


def _scales(
    build: GraphBuilder, node: ir.Node, heads: npt.NDArray[np.int64], offset: int
) -> tuple[ir.Value, ir.Value] | None:
    """Of a group: one for all, or its part of [1, heads, 1, size]."""
    if BITS[node.overload] == 32:
        return None
    parts = []
    for scale, name in zip(node.inputs[6:8], "kv", strict=True):
        assert scale is not None
        assert scale.const_value is not None
        grid = scale.const_value.numpy()
        parts.append(scale if grid.size == 1 else build.constant(grid[:, heads], f"{name}_scale.{offset}"))
    return parts[0], parts[1]
