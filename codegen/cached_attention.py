"""Kernel of ``CachedAttention``: GroupQueryAttention, which appends to the cache in place.

Past and present may share one buffer that is longer than what is in it, so the graph must not ask a cache for
its length. Where the mask takes the past's length from elsewhere, as after `evict`, it is taken from there,
too. Where it asks a cache, as traced decoders do, the lengths come from the mask of tokens instead,

    total = Shape(attention_mask)[1]      past = total − Shape(input_ids)[1]      seqlens_k = total − 1

which is what they are by the convention. Rotation stays outside, with the model's own positions, so that a
cache from which tokens were evicted decodes as before.

The kernel hides the future itself and takes what else is hidden as a bias, [batch, 1, sequence, total]: the
largest negative number and not −∞, for a query that sees nothing (padding) must not become NaN.

Where a mask has a window, the kernel reads no further back. Where the op says so, too (its attribute
``window``), the kernel's buffers need not hold more, and it moves tokens in them itself: then a run starts
from buffers of at least the window's length, however short the text is. Integers need heads of a multiple of
16 (8 bits) or 32 numbers (4 bits) for that; otherwise the buffers hold everything.

Preconditions: the mask provably hides the future; inputs ``input_ids`` [batch, sequence] and, for the
convention, ``attention_mask`` [batch, total]; caches are only read by their attention or asked for their
length; scales of one dtype. More than one new token on top of a past needs batch 1: onnxruntime refuses the
rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ..ir import ops
from ..ir.graph_builder import CONTRIB, GraphBuilder
from ..ir.ops.cached_attention import BITS
from ..ir.views.masks import CausalMask, causal_mask
from ..ir.views.values import input_at, integer, number, static_dim

KERNEL = "GroupQueryAttention"
_MASK, _IDS = "attention_mask", "input_ids"
_LENGTH_AXIS = 2
_WINDOW_MULTIPLES = {32: 1, 8: 16, 4: 32}
"""What the size of a head must be a multiple of for the kernel to move tokens in its buffer, by bits."""
_INT32 = int(ir.DataType.INT32)


def reason_not_to_bind(model: ir.Model, node: ir.Node) -> str | None:
    """Why the kernel cannot take this op, or None."""
    if node.attributes["softcap"].as_float():
        return "softcap takes the kernel's slow path"
    mask = causal_mask(input_at(node, 3))
    if mask is None:
        return "its mask is not known to hide the future"
    ranks = {str(value.name): len(value.shape) for value in model.graph.inputs if value.shape is not None}
    for name in (_IDS, _MASK) if _asks_a_cache(mask) else (_IDS,):
        if ranks.get(name) != 2:
            return f"the model has no input {name!r} with two axes"
    for past in node.inputs[4:6]:
        if past is None or not past.is_graph_input():
            return "its cache is no input of the model"
        if any(_asked_axis(other) is None for other in past.consumers() if other is not node):
            return "something else reads its cache"
    return None


def _asks_a_cache(mask: CausalMask) -> bool:
    """Whether the past's length is asked of a graph input."""
    node = mask.past.producer()
    asked = None if node is None else input_at(node, 0)
    return node is not None and node.op_type == "Shape" and asked is not None and asked.is_graph_input()


def _asked_axis(node: ir.Node) -> int | None:
    """The one axis whose length a Shape gives; None for all other nodes."""
    bounds = [node.attributes[name].as_int() for name in ("start", "end") if name in node.attributes]
    if node.op_type != "Shape" or node.domain or len(bounds) < 2 or bounds[1] != bounds[0] + 1:
        return None
    return bounds[0]


@dataclasses.dataclass(frozen=True)
class _Lengths:
    """last: past + sequence − 1, [batch] int32; total: [] int32; past: [1] int64."""

    last: ir.Value
    total: ir.Value
    past: ir.Value


class CachedAttentionBinder:
    """Binds the attentions of one model, which share lengths and biases.

    Args:
        model: changed in place.
        forgets: the kernel may forget what lies before a window, where an op allows it.
    """

    def __init__(self, model: ir.Model, *, forgets: bool = True) -> None:
        self._model, self._forgets = model, forgets
        self._inputs = {str(value.name): value for value in model.graph.inputs}
        self._lengths: dict[ir.Value | None, _Lengths] = {}
        self._biases: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def bind(self, node: ir.Node) -> None:
        """Replace one op for which `reason_not_to_bind` has none."""
        mask, seen = input_at(node, 3), causal_mask(input_at(node, 3))
        assert mask is not None
        assert seen is not None
        lengths = self._lengths_of(seen)
        for cache in node.inputs[4:6]:
            assert cache is not None
            for reader in list(cache.consumers()):
                if reader is not node and _asked_axis(reader) == _LENGTH_AXIS:
                    ops.replace(reader, ir.node("Identity", [lengths.past], name=reader.name))
        bias = self._bias(mask, node) if seen.others else None
        scales = node.inputs[6:8]
        new = ir.node(
            KERNEL,
            [*node.inputs[:3], *node.inputs[4:6], lengths.last, lengths.total, None, None, None, bias]
            + ([None, *scales] if scales else []),
            {
                "num_heads": node.attributes["q_num_heads"].as_int(),
                "kv_num_heads": node.attributes["kv_num_heads"].as_int(),
                "scale": number(node, "scale", 0.0),
                **_quantised_attributes(node, scales),
                **_window_attributes(node, seen, self._forgets),
            },
            domain=CONTRIB,
            num_outputs=3,
            name=node.name,
        )
        self._model.opset_imports.setdefault(CONTRIB, 1)
        ops.replace(node, new)

    def _lengths_of(self, mask: CausalMask) -> _Lengths:
        """Of the convention, at the graph's start; or of the mask, behind the nodes that compute it."""
        past = None if _asks_a_cache(mask) else mask.past
        if past not in self._lengths:
            build = GraphBuilder(f"planish.cache_length.{len(self._lengths)}")
            one = build.constant(np.array([1], np.int64), "one")
            scalar = build.constant(np.array([], np.int64), "scalar")
            if past is None:
                total = build.op("Shape", self._inputs[_MASK], start=1, end=2)
                before = build.op("Sub", total, build.op("Shape", self._inputs[_IDS], start=1, end=2))
            else:
                total, before = build.op("Reshape", mask.total, one), build.op("Reshape", past, one)
            batch = build.op("Shape", self._inputs[_IDS], start=0, end=1)
            last = build.op("Cast", build.op("Expand", build.op("Sub", total, one), batch), to=_INT32)
            whole = build.op("Cast", build.op("Reshape", total, scalar), to=_INT32)
            self._insert(build, after=None if past is None else mask.total.producer())
            self._lengths[past] = _Lengths(last, whole, before)
        return self._lengths[past]

    def _bias(self, mask: ir.Value, before: ir.Node) -> ir.Value:
        """[batch or 1, heads or 1, sequence, total] of the query's type, once for layers with this mask."""
        query = before.inputs[0]
        dtype = (query.dtype if query is not None else None) or ir.DataType.FLOAT
        if (mask, dtype) not in self._biases:
            build = GraphBuilder(f"planish.cache_bias.{len(self._biases)}")
            shown = build.constant(np.zeros((), dtype.numpy()), "shown")
            hidden = build.constant(np.array(dtype.min, dtype.numpy()), "hidden")
            self._biases[mask, dtype] = build.op("Where", mask, shown, hidden)
            self._insert(build, after=mask.producer() or before)
        return self._biases[mask, dtype]

    def _insert(self, build: GraphBuilder, *, after: ir.Node | None = None) -> None:
        graph = self._model.graph
        for value in build.initializers:
            graph.register_initializer(value)
        if after is None:
            graph.insert_before(graph[0], build.nodes)
        else:
            graph.insert_after(after, build.nodes)


def _quantised_attributes(node: ir.Node, scales: Sequence[ir.Value | None]) -> dict[str, str | int]:
    if not scales:
        return {}
    granularity = "PER_TENSOR" if _size(scales[0]) == 1 else "PER_CHANNEL"
    return {
        "k_quant_type": granularity,
        "v_quant_type": granularity,
        "kv_cache_bit_width": BITS[node.overload],
    }


def _window_attributes(node: ir.Node, mask: CausalMask, may_forget: bool) -> dict[str, int]:
    if mask.window is None:
        return {}
    multiple = _WINDOW_MULTIPLES[BITS[node.overload]]
    forgets = may_forget and bool(integer(node, "window")) and _head_size(node) % multiple == 0
    return {"local_window_size": mask.window} | ({"sliding_window_cache": 1} if forgets else {})


def _head_size(node: ir.Node) -> int:
    return (static_dim(input_at(node, 1), -1) or 0) // (integer(node, "kv_num_heads") or 1)


def _size(value: ir.Value | None) -> int:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return 0 if tensor is None else int(tensor.size)
