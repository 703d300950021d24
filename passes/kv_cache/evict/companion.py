"""The graph that evicts: all caches of a decoder in, what stays of them out.

For each layer i, of the tokens 0 … cache_lengthsᵢ − 1 in its buffers:

    score = policy(keys, values, …), rescored    +∞ for the first `sinks` and the last `recent` tokens
    kept  = the k tokens of highest score, in their order,  k = max(⌈share · seen⌉, sinks + recent)
    present.i.key = key[kept],  present.i.value = value[kept]

Inputs: ``past_key_values.{i}.key`` and ``.value`` [batch, kv_heads, capacity, size] as they are stored,
``cache_lengths`` [layers] int64, ``seen`` [] int64 (tokens of the text), and ``query.{i}`` [batch, count,
heads · size] where the policy asks for queries. Outputs: ``present.{i}.key`` and ``.value``. Every head keeps
tokens of its own. Gathering works on the stored form, so a quantised cache is not rounded again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ....ir import ops
from ....ir.graph_builder import GraphBuilder
from ....ir.ops.cached_attention import BITS
from ....ir.ops.definition import DOMAIN, OpDefinition
from ....ir.views.caches import LENGTHS, CachedLayer
from ....ir.views.values import integer, number, static_dim
from .merging import MERGE
from .policies import Policy
from .rescoring import RESCORE, Rescoring
from .rotations import mean_rotation, rotation_attributes, turned

SEEN = "seen"
_INT64 = ir.DataType.INT64
_OPSET = 23

COUNT = OpDefinition(
    "KeptCount",
    "",
    "<share, least> (score, seen) => (kept)",
    """
  share = Constant <value_float: float = @share> ()
  least = Constant <value_ints: ints = @least> ()
  length = Shape <start: int = 2, end: int = 3> (score)
  seen_number = Cast <to: int = 1> (seen)
  wanted_number = Mul (seen_number, share)
  wanted_up = Ceil (wanted_number)
  wanted = Cast <to: int = 7> (wanted_up)
  at_least = Max (wanted, least)
  kept = Min (at_least, length)
""",
)
"""How many tokens of a layer stay, [1] int64."""
KEPT = OpDefinition(
    "KeptTokens",
    "",
    "<sinks, recent> (score, kept) => (index)",
    """
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  sinks = Constant <value_int: int = @sinks> ()
  recent = Constant <value_int: int = @recent> ()
  last_axis = Constant <value_ints: ints = [-1]> ()
  highest = Constant <value_float: float = 3.3e38> ()
  length_list = Shape <start: int = 2, end: int = 3> (score)
  length = Squeeze (length_list)
  positions = Range (zero, length, one)
  is_sink = Less (positions, sinks)
  recent_from = Sub (length, recent)
  is_recent = GreaterOrEqual (positions, recent_from)
  stays = Or (is_sink, is_recent)
  ranked = Where (stays, highest, score)
  best, chosen = TopK <axis: int = -1, largest: int = 1, sorted: int = 0> (ranked, kept)
  rising, order = TopK <axis: int = -1, largest: int = 0, sorted: int = 1> (chosen, kept)
  index = Unsqueeze (rising, last_axis)
""",
)
"""Which tokens stay, [batch, kv_heads, kept, 1] int64, as GatherND takes them."""
STEPS = OpDefinition(
    "StepsBack",
    "",
    "(index) => (steps)",
    """
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  last_axis = Constant <value_ints: ints = [-1]> ()
  before = Squeeze (index, last_axis)
  length_list = Shape <start: int = 2, end: int = 3> (before)
  length = Squeeze (length_list)
  now = Range (zero, length, one)
  steps = Sub (now, before)
""",
)
"""By how many positions each kept token moves, [batch, kv_heads, kept] int64, if what stays is renumbered."""
FLOATS = {
    8: OpDefinition(
        "CacheFloats",
        "int8",
        "(stored, scale) => (floats)",
        """
  numbers = Cast <to: int = 1> (stored)
  floats = Mul (numbers, scale)
""",
    ),
    4: OpDefinition(
        "CacheFloats",
        "int4",
        "(stored, scale) => (floats)",
        """
  fifteen_long = Constant <value_int: int = 15> ()
  fifteen = Cast <to: int = 2> (fifteen_long)
  four_long = Constant <value_int: int = 4> ()
  four = Cast <to: int = 2> (four_long)
  eight = Constant <value_float: float = 8.0> ()
  last_axis = Constant <value_ints: ints = [-1]> ()
  channels = Constant <value_ints: ints = [0, 0, 0, -1]> ()
  low = BitwiseAnd (stored, fifteen)
  high = BitShift <direction: string = "RIGHT"> (stored, four)
  low_column = Unsqueeze (low, last_axis)
  high_column = Unsqueeze (high, last_axis)
  columns = Concat <axis: int = -1> (low_column, high_column)
  side_by_side = Reshape (columns, channels)
  numbers = Cast <to: int = 1> (side_by_side)
  centred = Sub (numbers, eight)
  floats = Mul (centred, scale)
""",
    ),
}
"""A stored cache as numbers [batch, kv_heads, length, size] float32, by bits."""


@dataclasses.dataclass(frozen=True)
class QueryStatistics:
    """Of a layer's queries before their rotation.

    Attributes:
        mean: [heads, size] float32.
        covariance: [heads, size, size] float32.
        rotary: the decoder's RotaryEmbedding of queries; None where queries are not rotated.
    """

    mean: npt.NDArray[np.float32]
    covariance: npt.NDArray[np.float32]
    rotary: ir.Node | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """How one layer is evicted.

    Attributes:
        layer: its cache.
        share: of the text's tokens that stay.
        rotary: the decoder's RotaryEmbedding of its keys, where kept tokens are renumbered.
        statistics: for policies that expect queries.
    """

    layer: CachedLayer
    share: float
    rotary: ir.Node | None = None
    statistics: QueryStatistics | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """What is alike for all layers.

    Attributes:
        policy: scores the tokens.
        tokens: that stay at least, however short the text.
        sinks, recent: tokens at the beginning and the end that stay in any case.
        kernel: neighbours that scores are averaged over, for policies that pool; odd.
        future: positions that the next queries are expected at.
        rescoring: what is made of the scores before tokens are chosen.
        merges: values of evicted tokens are averaged into those that stay.
        seed: of random scores, and of tokens that are drawn.
    """

    policy: Policy
    tokens: int
    sinks: int
    recent: int
    kernel: int
    future: int
    rescoring: Rescoring
    merges: bool
    seed: int


class CompanionBuilder:
    """Builds the graph, layer by layer.

    Args:
        selection: what is alike for all of them.
        layers: how many.
    """

    def __init__(self, selection: Selection, layers: int) -> None:
        self._selection = selection
        self._lengths = ir.val(LENGTHS, dtype=_INT64, shape=[layers])
        self._seen = ir.val(SEEN, dtype=_INT64, shape=[])
        self._inputs = [self._lengths, self._seen]
        self._outputs: list[ir.Value] = []
        self._builds: list[GraphBuilder] = []
        self._definitions: list[OpDefinition] = []

    def add(self, index: int, plan: LayerPlan) -> None:
        """The nodes of one layer, the ``index``-th of the cache."""
        layer = plan.layer
        build = GraphBuilder(f"evict.{layer.index}")
        self._builds.append(build)
        length = build.op(
            "Slice",
            self._lengths,
            *(_list(build, number, name) for number, name in ((index, "at"), (index + 1, "to"))),
        )
        stored = [self._stored(build, value, length) for value in (layer.past_key, layer.past_value)]
        keys, values = (self._floats(build, *pair) for pair in zip(stored, _scales(layer), strict=True))
        score = self._score(build, plan, keys, values)
        chosen = self._selection
        least = max(chosen.tokens, chosen.sinks + chosen.recent, 1)
        count = self._call(build, COUNT, [score, self._seen], {"share": float(plan.share), "least": [least]})
        if chosen.rescoring != "none":
            seed = {"seed": self._seed(layer)} if chosen.rescoring == "drawn" else {}
            score = self._call(build, RESCORE[chosen.rescoring], [score, keys, count], seed)
        sides = {"sinks": chosen.sinks, "recent": chosen.recent}
        kept = self._call(build, KEPT, [score, count], sides)
        for cache, present in zip(stored, (layer.present_key, layer.present_value), strict=True):
            if chosen.merges and present is layer.present_value:
                output = self._call(build, MERGE, [keys, values, kept], {})
            else:
                output = build.op("GatherND", cache, kept, batch_dims=2)
            if plan.rotary is not None and present is layer.present_key:
                steps = self._call(build, STEPS, [kept], {})
                output = turned(build, plan.rotary, output, steps, size=layer.head_size)
            output.name, output.type = present.name, present.type
            heads, size = (layer.past_key.shape or ())[1::2]
            output.shape = ir.Shape(["batch_size", heads, f"kept.{layer.index}", size])
            self._outputs.append(output)

    def model(self) -> ir.Model:
        """The finished graph."""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=[node for build in self._builds for node in build.nodes],
            initializers=[value for build in self._builds for value in build.initializers],
            opset_imports={"": _OPSET},
            name="evict",
        )
        model = ir.Model(graph, ir_version=10)
        for definition in self._definitions:
            ops.define(model, definition)
        return model

    def _stored(self, build: GraphBuilder, cache: ir.Value, length: ir.Value) -> ir.Value:
        """What is in a buffer, as a new input of the graph."""
        assert cache.dtype is not None
        shape = ["batch_size", static_dim(cache, 1), "capacity", static_dim(cache, 3)]
        value = ir.val(str(cache.name), dtype=cache.dtype, shape=shape)
        self._inputs.append(value)
        start, axis = (
            _list(build, number, f"{cache.name}.{name}") for number, name in ((0, "start"), (2, "axis"))
        )
        stored = build.op("Slice", value, start, length, axis)
        stored.dtype = cache.dtype
        return stored

    def _floats(self, build: GraphBuilder, stored: ir.Value, scale: ir.Value | None) -> ir.Value:
        if scale is None:
            return stored
        assert scale.const_value is not None
        grid = build.constant(scale.const_value.numpy(), str(scale.name))
        definition = FLOATS[8 if stored.dtype == ir.DataType.INT8 else 4]
        return self._call(build, definition, [stored, grid], {})

    def _score(self, build: GraphBuilder, plan: LayerPlan, keys: ir.Value, values: ir.Value) -> ir.Value:
        policy, node = self._selection.policy, plan.layer.attention
        inputs = [keys, values]
        attributes: dict[str, Any] = {}
        heads, kv_heads = integer(node, "q_num_heads") or 1, integer(node, "kv_num_heads") or 1
        if policy.window or policy.expects:
            attributes["scale"] = number(node, "scale", 1.0)
            attributes["grouped_shape"] = [0, kv_heads, heads // kv_heads, -1, plan.layer.head_size]
        if policy.window:
            inputs.append(self._queries(build, plan.layer, heads))
        if policy.expects:
            inputs += self._coming_queries(build, plan)
        if policy.pooled:
            side = self._selection.kernel // 2
            attributes |= {"kernel": [self._selection.kernel], "pads": [side, side]}
        if policy.seeded:
            attributes["seed"] = self._seed(plan.layer)
        return self._call(build, policy.definition, inputs, attributes)

    def _seed(self, layer: CachedLayer) -> float:
        return float(self._selection.seed + layer.index)

    def _queries(self, build: GraphBuilder, layer: CachedLayer, heads: int) -> ir.Value:
        """[batch, heads, count, size], from an input [batch, count, heads · size]."""
        query = ir.val(
            f"query.{layer.index}",
            dtype=ir.DataType.FLOAT,
            shape=["batch_size", "queries", heads * layer.head_size],
        )
        self._inputs.append(query)
        shape = build.constant(np.array([0, 0, heads, layer.head_size]), "heads_shape")
        return build.op("Transpose", build.op("Reshape", query, shape), perm=[0, 2, 1, 3])

    def _coming_queries(self, build: GraphBuilder, plan: LayerPlan) -> list[ir.Value]:
        """Mean [1, heads, 1, size] and covariance [1, heads, size, size] of queries at coming positions."""
        statistics = plan.statistics
        assert statistics is not None
        mean = build.constant(statistics.mean[None, :, None], "mean")
        covariance = build.constant(statistics.covariance[None], "covariance")
        rotary = statistics.rotary
        if rotary is None:
            return [mean, covariance]
        # Positions go on behind the text, or behind what is in the cache, if that is renumbered.
        start = self._seen
        if plan.rotary is not None:
            start = build.op("Gather", self._lengths, build.constant(np.array(0, np.int64), "first"), axis=0)
        cosines, sines = mean_rotation(build, rotary, start, self._selection.future)
        attributes = rotation_attributes(rotary)

        def rotated(value: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
            return build.op("RotaryEmbedding", value, cos, sin, **attributes)

        rows = build.constant(np.array([1, statistics.mean.shape[1], 1]), "rows")
        many = [build.op("Expand", angles, rows) for angles in (cosines, sines)]
        # The rotation turns rows: Σ R̄ᵀ, and then the rows of its transpose: R̄ Σ R̄ᵀ.
        half = build.op("Transpose", rotated(covariance, *many), perm=[0, 1, 3, 2])
        return [rotated(mean, cosines, sines), rotated(half, *many)]

    def _call(
        self,
        build: GraphBuilder,
        definition: OpDefinition,
        inputs: list[ir.Value],
        attributes: Mapping[str, Any],
    ) -> ir.Value:
        if definition not in self._definitions:
            self._definitions.append(definition)
        node = ir.node(
            definition.op_type,
            inputs,
            attributes,
            domain=DOMAIN,
            overload=definition.overload,
            name=f"{build.layer}.{definition.op_type}.{len(build.nodes)}",
        )
        build.nodes.append(node)
        return node.outputs[0]


def _list(build: GraphBuilder, number: int, name: str) -> ir.Value:
    return build.constant(np.array([number], np.int64), name)


def _scales(layer: CachedLayer) -> tuple[ir.Value | None, ir.Value | None]:
    """Of keys and of values; None for caches of floats."""
    node = layer.attention
    if BITS[node.overload] == 32:
        return None, None
    return node.inputs[6], node.inputs[7]
