"""Decomposed rotary position embeddings become one node (Su et al. 2021, in the half-split layout).

    x · cos(θ) + rotate_half(x) · sin(θ) → RotaryEmbedding(x, cos(θ½), sin(θ½))
    rotate_half([x₁, x₂]) = [−x₂, x₁],   θ = [θ½, θ½]

``x`` is [batch, heads, sequence, head_size]; the caches are [batch, sequence, head_size / 2], computed from
the angles before they are doubled, so that all layers share one cosine and one sine (equal nodes are merged
later). A constant table that is gathered by position is halved and stays two-dimensional, with position_ids.

    Concat(RotaryEmbedding(x[…, :r]), x[…, r:]) → RotaryEmbedding(x, rotary_embedding_dim = r)

Preconditions: the two halves of cos and sin are provably equal (a Concat of one value with itself, or a
constant whose halves are); ranks and head_size are known; float32 or smaller, the types that the op has. A
batch of 1 in the angles is expanded to the batch of ``x``: runtimes want it spelled out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..infrastructure.rewriter import Replacement, Rule, missed
from .graph_edits import (
    Array,
    add_initializer,
    constant,
    constant_tensor,
    dims,
    integer,
    integers,
    producer,
    rank,
    scalar,
    shape_constant,
)

TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})

TABLE_LIMIT = 1 << 24
"""Elements of the largest constant cosine table that is compared and halved."""

Build = Callable[[Replacement], ir.Value]


@dataclass(frozen=True)
class Half:
    """The first half along the last axis of a value whose second half is the same."""

    build: Build
    """Adds the nodes that compute it."""
    positions: ir.Value | None = None
    """Position ids that index the rows of what ``build`` makes; ``None``: it has a row for each token."""
    batch: int | str | None = None


class RotaryHalves(Rule):
    """x · cos + rotate_half(x) · sin → RotaryEmbedding(x, cos½, sin½)."""

    name = "rotary-embedding"
    roots = ("Add",)

    def apply(self, node: ir.Node) -> bool:
        """Rewrite ``node``, the sum of the two products."""
        for direct, rotated in (node.inputs, reversed(node.inputs)):
            match = _match_products(direct, rotated)
            if match is None:
                continue
            value, cosine, sine = match
            if rank(value) != 4 or value.dtype not in TYPES:
                return missed(node, "the input is not [batch, heads, sequence, head_size] in float32 or less")
            cos, sin = _per_token_half(cosine), _per_token_half(sine)
            if cos is None or sin is None or cos.positions is not sin.positions or cos.batch != sin.batch:
                return missed(node, "the halves of the cosine or sine are not known to be equal")
            return _replace(node, value, cos, sin)
        return False


def _replace(node: ir.Node, value: ir.Value, cos: Half, sin: Half) -> bool:
    batch = (dims(value) or [None])[0]
    if batch is None or cos.batch not in (1, batch):
        return missed(node, "the batch of the angles is not that of the input")
    replacement = Replacement(node)
    caches = [cos.build(replacement), sin.build(replacement)]
    positions = cos.positions
    if cos.batch != batch:
        if positions is not None:
            positions = _expand_batch(replacement, positions, value)
        else:
            caches = [_expand_batch(replacement, cache, value) for cache in caches]
    inputs = [value, *caches] if positions is None else [value, *caches, positions]
    return replacement.finish(replacement.op("RotaryEmbedding", *inputs, like=node.outputs[0]))


def _expand_batch(replacement: Replacement, value: ir.Value, like: ir.Value) -> ir.Value:
    """``value`` of batch 1 repeated to the batch of ``like``; read off a graph input where one has it."""
    source, axis = _batch_source(like)
    batch = replacement.op("Shape", source, start=axis, end=axis + 1)
    tail = shape_constant(_graph_of(like), [1] * ((rank(value) or 3) - 1))
    shape = replacement.op("Concat", batch, tail, axis=0)
    expanded = replacement.op("Expand", value, shape)
    expanded.type = value.type
    return expanded


def _graph_of(value: ir.Value) -> ir.Graph:
    assert isinstance(value.graph, ir.Graph)
    return value.graph


def _batch_source(value: ir.Value) -> tuple[ir.Value, int]:
    symbol = (dims(value) or [None])[0]
    graph = value.graph
    for candidate in graph.inputs if isinstance(graph, ir.Graph) else ():
        found = dims(candidate) or []
        if isinstance(symbol, str) and symbol in found:
            return candidate, found.index(symbol)
    return value, 0


def _match_products(
    direct: ir.Value | None, rotated: ir.Value | None
) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """(x, cos, sin) of the two summands x · cos and rotate_half(x) · sin."""
    left, right = producer(direct, "Mul"), producer(rotated, "Mul")
    if left is None or right is None:
        return None
    for turned, sine in (right.inputs, reversed(right.inputs)):
        source = _rotate_half_source(turned)
        if source is None or sine is None:
            continue
        for value, cosine in (left.inputs, reversed(left.inputs)):
            if value is source and cosine is not None:
                return source, cosine, sine
    return None


def _rotate_half_source(value: ir.Value | None) -> ir.Value | None:
    """``x`` if ``value`` is Concat(−x₂, x₁) of the halves of ``x``."""
    concat = producer(value, "Concat")
    if concat is None or len(concat.inputs) != 2 or not _is_last(concat, value):
        return None
    negation = producer(concat.inputs[0], "Neg")
    if negation is None:
        return None
    first, second = part_of(concat.inputs[1]), part_of(negation.inputs[0])
    if first is None or second is None or first.source is not second.source:
        return None
    size = (dims(first.source) or [None])[-1]
    if not isinstance(size, int) or size % 2:
        return None
    halves = (first.start, first.end, second.start, second.end) == (0, size // 2, size // 2, size)
    return first.source if halves else None


def _is_last(node: ir.Node, value: ir.Value | None) -> bool:
    axis = integer(node, "axis", 0)
    return axis == -1 or (rank(value) is not None and axis == (rank(value) or 0) - 1)


@dataclass(frozen=True)
class Part:
    """``source[…, start:end]``."""

    source: ir.Value
    start: int
    end: int


def part_of(value: ir.Value | None) -> Part | None:
    """What contiguous part of which value a Slice or Split along the last axis takes; its size is known."""
    node = producer(value, "Slice", "Split")
    source = None if node is None else node.inputs[0]
    shape = dims(source)
    if node is None or source is None or not shape or not isinstance(shape[-1], int) or value is None:
        return None
    if node.op_type == "Split":
        return _split_part(node, source, value)
    parts = [integers(each) for each in node.inputs[1:]]
    if len(parts) < 2 or any(part is None or len(part) != 1 for part in parts):
        return None
    start, end = (part[0] for part in parts[:2] if part)
    axis = parts[2][0] if len(parts) > 2 and parts[2] else 0
    step = parts[3][0] if len(parts) > 3 and parts[3] else 1
    size = shape[-1]
    if step != 1 or axis not in (-1, len(shape) - 1):
        return None
    start, end = (index + size if index < 0 else min(index, size) for index in (start, end))
    return Part(source, start, end) if 0 <= start < end <= size else None


def _split_part(node: ir.Node, source: ir.Value, value: ir.Value) -> Part | None:
    """The sizes come from inference: the op may give them as an input or only their number."""
    if integer(node, "axis", 0) not in (-1, (rank(source) or 0) - 1):
        return None
    start = 0
    for output in node.outputs:
        size = (dims(output) or [None])[-1]
        if not isinstance(size, int):
            return None
        if output is value:
            return Part(source, start, start + size)
        start += size
    return None


def _per_token_half(value: ir.Value) -> Half | None:
    """The half of a cosine or sine [batch, 1, sequence, head_size], without its axis of heads."""
    unsqueeze = producer(value, "Unsqueeze")
    if unsqueeze is not None and integers(unsqueeze.inputs[1]) in ([1], [-3]) and rank(value) == 4:
        inner = unsqueeze.inputs[0]
        return None if inner is None else _table_half(inner) or _computed_half(inner)
    return None


def _table_half(value: ir.Value) -> Half | None:
    """Gather(table[positions, head_size], position_ids[batch, sequence])."""
    gather = producer(value, "Gather")
    if gather is None or integer(gather, "axis", 0) != 0 or rank(gather.inputs[1]) != 2:
        return None
    table = constant(gather.inputs[0], limit=TABLE_LIMIT)
    if table is None or table.ndim != 2 or not _halves_equal(table):
        return None
    source = gather.inputs[0]
    assert source is not None
    batch = (dims(gather.inputs[1]) or [None])[0]
    return Half(lambda _: _halved_table(source, table), positions=gather.inputs[1], batch=batch)


def _halved_table(source: ir.Value, table: Array) -> ir.Value:
    """One initializer for all layers that gather from ``source``."""
    assert isinstance(source.graph, ir.Graph)
    name, half = f"{source.name}.half", table[:, : table.shape[1] // 2]
    existing = source.graph.initializers.get(name)
    known = constant(existing, limit=TABLE_LIMIT)
    if existing is not None and known is not None and np.array_equal(known, half):
        return existing
    return add_initializer(source.graph, ir.tensor(np.ascontiguousarray(half)), name)


def _halves_equal(array: Array) -> bool:
    size = array.shape[-1]
    return size % 2 == 0 and bool(np.array_equal(array[..., : size // 2], array[..., size // 2 :]))


def _computed_half(value: ir.Value) -> Half | None:
    """A chain of elementwise ops on Concat(θ½, θ½), computed again on θ½."""
    build = _elementwise_half(value)
    if build is None or rank(value) != 3:
        return None
    return Half(build, batch=(dims(value) or [None])[0])


def _elementwise_half(value: ir.Value | None) -> Build | None:
    concat = producer(value, "Concat")
    if value is None:
        return None
    if concat is not None:
        doubled = len(concat.inputs) == 2 and concat.inputs[0] is concat.inputs[1]
        half = concat.inputs[0]
        return (lambda _: half) if doubled and half is not None and _is_last(concat, value) else None
    node = producer(value, "Cos", "Sin", "Cast", "Mul")
    if node is None:
        return None
    if node.op_type != "Mul":
        inner = _elementwise_half(node.inputs[0])
        return None if inner is None else _rebuild(node, inner)
    for operand, factor in (node.inputs, reversed(node.inputs)):
        inner = _elementwise_half(operand) if scalar(factor) is not None else None
        if inner is not None and constant_tensor(factor) is not None and rank(factor) in (0, 1):
            return _rebuild(node, inner, factor)
    return None


def _rebuild(node: ir.Node, inner: Build, factor: ir.Value | None = None) -> Build:
    """The same op on the half."""
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}

    def build(replacement: Replacement) -> ir.Value:
        operands = [inner(replacement)] if factor is None else [inner(replacement), factor]
        output = replacement.op(node.op_type, *operands, **attributes)
        output.type, output.shape = node.outputs[0].type, operands[0].shape
        return output

    return build


class PartialRotary(Rule):
    """Concat(RotaryEmbedding(x[…, :r]), x[…, r:]) → RotaryEmbedding(x, rotary_embedding_dim = r)."""

    name = "partial-rotary-embedding"
    roots = ("Concat",)

    def apply(self, node: ir.Node) -> bool:
        """Rewrite ``node``, the Concat that puts the parts together again."""
        rotary = producer(node.inputs[0], "RotaryEmbedding")
        if rotary is None or len(node.inputs) != 2 or not _is_last(node, node.outputs[0]):
            return False
        turned, kept = part_of(rotary.inputs[0]), part_of(node.inputs[1])
        if turned is None or kept is None or turned.source is not kept.source or rank(turned.source) != 4:
            return False
        size = (dims(turned.source) or [None])[-1]
        if (turned.start, kept.start, kept.end) != (0, turned.end, size):
            return missed(node, "the parts are not the beginning and the rest of one value")
        if integer(rotary, "rotary_embedding_dim", 0):
            return missed(node, "it is partial already")
        replacement = Replacement(node)
        attributes = {name: attribute.value for name, attribute in rotary.attributes.items()}
        attributes["rotary_embedding_dim"] = turned.end
        inputs = [turned.source, *rotary.inputs[1:]]
        output = replacement.op("RotaryEmbedding", *inputs, like=node.outputs[0], **attributes)
        return replacement.finish(output)


def rules(opset: int) -> list[Rule]:
    """The rules whose results exist in this opset."""
    return [RotaryHalves(), PartialRotary()] if opset >= 23 else []
