"""Which linears can be scaled together, and where the inverse of their scale goes.

Linears that read the same value x can have the rows of their weights multiplied by s, [K], if x is divided by
s. That division is free where x is computed from constants that hold one entry per channel:

    RMSNormalization(x, γ)                         γ / s
    LayerNormalization(x, γ, β)                    γ / s, β / s
    x W + b                                        columns of W and b / s
    activation(gate) ⊙ up                          as above, for the linear that makes ``up``
    Relu(x W + b)                                  as above: Relu(x / s) = Relu(x) / s for s > 0
    Attention(q, k, v)                             as above, for the linear that makes v

`scaling_groups` starts at every value that linears read and walks back to such constants. It follows the
channels through reshapes that split or merge heads and through a Split, so that separate and merged
projections are alike. Each step has one reader, which is the step after it: whatever else read the value
would see it scaled. Where a walk ends otherwise, the reason is kept. A cache of values that is an input and
an output of the graph holds them divided by s from then on; one that was filled before does not fit any more.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable

import onnx_ir as ir

from ...ir.views import Linear, Norm, linears, norms
from ...ir.views.values import input_at, integer, static_dim, static_shape
from ..fuse.merge_linears import merged_name
from ..infrastructure.base import Skipped

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
_SHAPE_READERS = frozenset({"Shape", "Size"})
"""Ops that read no numbers: scaling is nothing to them."""
_CUTS = frozenset({"Slice", "SequenceAt"})
"""How merged projections are cut before `fuse`."""


@dataclasses.dataclass(frozen=True)
class Channels:
    """A constant that holds one entry, row or column per channel.

    Attributes:
        value: the initializer.
        axis: along which the channels lie.
        start: where on that axis the first channel is.
    """

    value: ir.Value
    axis: int
    start: int = 0


@dataclasses.dataclass(frozen=True)
class Source:
    """What makes a value, channel by channel.

    Attributes:
        name: of the norm or linear.
        kind: ``norm`` or ``linear``.
        constants: what is to be divided by s.
        caches: outputs of the graph that hold the channels too, and will hold them divided by s.
    """

    name: str
    kind: str
    constants: tuple[Channels, ...]
    caches: tuple[ir.Value, ...] = ()


@dataclasses.dataclass(frozen=True)
class ScalingGroup:
    """Linears that read the same value, and the source of its channels.

    Attributes:
        name: of the linears, as they would be called if they were one.
        value: what they read, [..., channels].
        linears: all that read the value.
        source: where the channels come from.
    """

    name: str
    value: ir.Value
    linears: tuple[Linear, ...]
    source: Source

    @property
    def channels(self) -> int:
        """How many channels the value has."""
        return self.linears[0].in_features


def scaling_groups(model: ir.Model) -> tuple[list[ScalingGroup], list[Skipped]]:
    """The groups in the order in which the graph reads them, and what cannot be scaled with the reason."""
    readers: dict[ir.Value, list[Linear]] = {}
    found = linears(model)
    for linear in found:
        readers.setdefault(linear.node.inputs[0] or linear.input, []).append(linear)
    walk = _Walk({linear.output: linear for linear in found}, {norm.output: norm for norm in norms(model)})
    groups, skipped = [], []
    for value, group in readers.items():
        name = merged_name([linear.name for linear in group])
        reason = _reason_to_skip_readers(value, group)
        source: Source | str = reason if reason is not None else walk.source(value, group[0].in_features)
        if isinstance(source, str):
            skipped.append(Skipped(name, source))
        else:
            groups.append(ScalingGroup(name, value, tuple(group), source))
    return groups, skipped


def _reason_to_skip_readers(value: ir.Value, group: list[Linear]) -> str | None:
    products = {linear.node for linear in group}
    for reader in _readers(value):
        if reader not in products:
            return f"its input is read by {reader.op_type} too"
    if value.is_graph_output():
        return "its input is an output of the graph"
    for linear in group:
        if linear.is_quantized:
            return "quantised already"
        reason = _reason_not_owned(linear.weight)
        if reason is not None:
            return f"its weight {reason}"
    return None


def _readers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read the numbers of a value, once for each time that they read it."""
    return [use.node for use in value.uses() if use.node.op_type not in _SHAPE_READERS]


def _reason_not_owned(value: ir.Value) -> str | None:
    """Why a constant cannot be rewritten for one reader alone; None if it can."""
    if not value.is_initializer() or value.const_value is None or value.is_graph_input():
        return "is no initializer"
    if value.is_graph_output() or len(value.uses()) > 1:
        return "is shared"
    if value.dtype not in FLOATS:
        return f"is {value.dtype}"
    return None


class _Layout(enum.Enum):
    """Where the channels of a value lie."""

    LAST = "in the last axis"
    LAST_TWO = "in the last two axes: heads, channels of a head"
    HEADS_FIRST = "in axes 1 and 3 of 4: heads, channels of a head"


@dataclasses.dataclass(frozen=True)
class _Place:
    """Channels of a value on the way back to their source.

    Attributes:
        value: holds the channels, perhaps among others.
        count: how many they are.
        layout: where they are.
        start: the first of them, in the last axis.
        caches: outputs of the graph that were passed and hold them.
    """

    value: ir.Value
    count: int
    layout: _Layout = _Layout.LAST
    start: int = 0
    caches: tuple[ir.Value, ...] = ()

    @property
    def heads(self) -> tuple[int | None, int | None]:
        """(heads, channels of a head) of the layouts that tell them apart."""
        first = 1 if self.layout is _Layout.HEADS_FIRST else -2
        return static_dim(self.value, first), static_dim(self.value, -1)


class _Walk:
    """Walks from a value back to the source of its channels; reasons are returned as text."""

    def __init__(self, by_output: dict[ir.Value, Linear], norm_of: dict[ir.Value, Norm]) -> None:
        self._linears, self._norms = by_output, norm_of

    def source(self, value: ir.Value, count: int) -> Source | str:
        """The source of the last axis of ``value``, ``count`` long, or why there is none."""
        return self._from(_Place(value, count))

    def _from(self, place: _Place) -> Source | str:
        if place.value in self._linears:
            return _linear_source(self._linears[place.value], place)
        if place.value in self._norms:
            return _norm_source(self._norms[place.value], place)
        node = place.value.producer()
        if node is None:
            return "its input comes from outside of the graph"
        if node.domain == "" and node.op_type == "Mul" and place.layout is _Layout.LAST:
            return self._product(node, place)
        step = _STEPS.get(node.op_type) if node.domain == "" else None
        if node.op_type in _CUTS:
            return f"{node.op_type} cuts it: fuse makes such cuts a Split, and then it can be scaled"
        if step is None:
            return f"{node.op_type} does not commute with scaling"
        before = step(node, place)
        return before if isinstance(before, str) else self._before(node, before)

    def _before(self, node: ir.Node, place: _Place) -> Source | str:
        """Go on at an input of ``node``, which must be its only reader."""
        if _readers(place.value) != [node] or place.value.is_graph_output():
            return f"what {node.op_type} reads is read by another op too"
        return self._from(place)

    def _product(self, node: ir.Node, place: _Place) -> Source | str:
        """One factor of a product: the other may be anything, such as the activation of a gate."""
        for factor in node.inputs:
            if factor is not None and static_dim(factor, -1) == static_dim(place.value, -1):
                found = self._before(node, dataclasses.replace(place, value=factor))
                if isinstance(found, Source):
                    return found
        return "no factor of the product it reads commutes with scaling"


def _linear_source(linear: Linear, place: _Place) -> Source | str:
    if linear.is_quantized:
        return f"{linear.name} is quantised"
    constants = [Channels(linear.weight, 0 if linear.transposed else 1, place.start)]
    if linear.bias is not None:
        constants.append(Channels(linear.bias, 0, place.start))
    return _owned(Source(linear.name, "linear", tuple(constants), place.caches), linear.out_features, place)


def _norm_source(norm: Norm, place: _Place) -> Source | str:
    width = static_shape(norm.scale)
    if width != (place.count,) or (norm.bias is not None and static_shape(norm.bias) != width):
        return f"{norm.name} normalises more than the last axis"
    constants = tuple(Channels(value, 0) for value in (norm.scale, norm.bias) if value is not None)
    return _owned(Source(norm.name, "norm", constants, place.caches), place.count, place)


def _owned(source: Source, width: int, place: _Place) -> Source | str:
    """``source``, if it makes the channels of ``place`` and nothing else uses its constants."""
    if place.layout is not _Layout.LAST or place.start + place.count > width:
        return f"the channels of {source.name} are laid out otherwise"
    for channels in source.constants:
        reason = _reason_not_owned(channels.value)
        if reason is not None:
            return f"{channels.value.name} {reason}"
    return source


def _elementwise(node: ir.Node, place: _Place) -> _Place | str:
    """f(x / s) = f(x) / s for s > 0."""
    value = input_at(node, 0)
    return "its input is not known" if value is None else dataclasses.replace(place, value=value)


def _reshape(node: ir.Node, place: _Place) -> _Place | str:
    """Channels stay together if the axes that they lie in have as many elements before and after."""
    value, width = input_at(node, 0), static_dim(place.value, -1)
    if value is None or width is None or place.layout is _Layout.HEADS_FIRST:
        return "a Reshape mixes its channels"
    if place.layout is _Layout.LAST_TWO:
        layout = _Layout.LAST if static_dim(value, -1) == place.count else None
    elif static_dim(value, -1) == width:
        layout = _Layout.LAST
    else:
        split = _product_of((static_dim(value, -2), static_dim(value, -1)))
        layout = _Layout.LAST_TWO if split == width == place.count else None
    if layout is None:
        return "a Reshape mixes its channels"
    return dataclasses.replace(place, value=value, layout=layout)


def _product_of(dims: tuple[int | None, ...]) -> int | None:
    known = [dim for dim in dims if dim is not None]
    return math.prod(known) if len(known) == len(dims) else None


def _transpose(node: ir.Node, place: _Place) -> _Place | str:
    """[batch, heads, sequence, size] ↔ [batch, sequence, heads, size]."""
    value, permutation = input_at(node, 0), node.attributes.get("perm")
    other = {_Layout.LAST_TWO: _Layout.HEADS_FIRST, _Layout.HEADS_FIRST: _Layout.LAST_TWO}
    if value is None or permutation is None or tuple(permutation.as_ints()) != (0, 2, 1, 3):
        return "a Transpose moves its channels"
    if place.layout not in other:
        return "a Transpose moves its channels"
    return dataclasses.replace(place, value=value, layout=other[place.layout])


def _attention(node: ir.Node, place: _Place) -> _Place | str:
    """softmax(…) V is linear in every channel of V; each query head must have its own value head."""
    query, key, value = (input_at(node, index) for index in range(3))
    if value is None or place.value is not node.outputs[0]:
        return "its input is not what an attention makes of its values"
    caches = _value_caches(node)
    if caches is None:
        return "the values of the attention are cached, and the cache is not an input and output of the graph"
    if place.layout is _Layout.LAST:
        query_heads, key_heads = integer(node, "q_num_heads"), integer(node, "kv_num_heads")
    else:
        query_heads, key_heads = static_dim(query, 1), static_dim(key, 1)
    if query_heads is None or query_heads != key_heads:
        return "grouped queries: several query heads read one value head"
    before = dataclasses.replace(place, value=value, caches=(*place.caches, *caches))
    width = static_dim(value, -1) if place.layout is _Layout.LAST else _product_of(before.heads)
    if width != place.count or (place.layout is not _Layout.LAST and before.heads[0] != key_heads):
        return "the values of the attention have another width than its result"
    return before


def _value_caches(node: ir.Node) -> tuple[ir.Value, ...] | None:
    """Outputs of the graph that hold an attention's values; None if those are read or made elsewhere too."""
    past, present = input_at(node, 5), node.outputs[2] if len(node.outputs) > 2 else None
    is_kept = present is not None and present.is_graph_output()
    if present is not None and _readers(present):
        return None
    # What comes in must be what went out, divided by s like all values.
    if past is not None and not (is_kept and past.is_graph_input() and _readers(past) == [node]):
        return None
    return (present,) if present is not None and is_kept else ()


def _split(node: ir.Node, place: _Place) -> _Place | str:
    """One part of a merged projection."""
    value = input_at(node, 0)
    axis = integer(node, "axis") or 0
    if value is None or value.shape is None or axis % len(value.shape) != len(value.shape) - 1:
        return "a Split cuts another axis"
    before = node.outputs[: node.outputs.index(place.value)]
    sizes = [size for output in before if (size := static_dim(output, -1)) is not None]
    if place.layout is not _Layout.LAST or len(sizes) != len(before):
        return "the parts of a Split are not known"
    return dataclasses.replace(place, value=value, start=place.start + sum(sizes))


_STEPS: dict[str, Callable[[ir.Node, _Place], _Place | str]] = {
    "Attention": _attention,
    "Identity": _elementwise,
    "LeakyRelu": _elementwise,
    "Relu": _elementwise,
    "Reshape": _reshape,
    "Split": _split,
    "Transpose": _transpose,
}
