"""Store fewer numbers of each key and value.

Keys: channels that rotation turns together stay or go together; a layer keeps the pairs that matter most,

    importance of pair i = Σ over heads of  √(E‖q_i‖² · E‖k_i‖²),   q_i, k_i the pair of a query, of a key

since q·k is the sum of the pairs' products. The same pairs go in all heads of a layer, with their columns of
W_q and W_k and of cosines and sines. The factor of the scores stays 1/√(the old size).

Values: each head is turned to the principal axes U of its values, and keeps the first of them,

    W_v ← W_v U,   W_o ← Uᵀ W_o      U [size, kept]: eigenvectors of E[v vᵀ] with the largest eigenvalues

which is the best projection of that rank. Both keep equally many, as kernels want it.

Preconditions: the canonical form; calibration data; queries, keys, values and output have float projections
of their own; keys are rotated in halves, or not at all, without a norm of each head. Distillation makes up
for what is lost: ``shrink-heads{keep=0.5},distill{…}``. The aim, fewer channels of keys, is that of "LeanK"
(Zhang et al., 2025, https://arxiv.org/abs/2508.02215), which learns which; here calibration chooses.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...ir.errors import PassError, PipelineError
from ...ir.graph_builder import GraphBuilder
from ...ir.views.attention import AttentionBlock, attentions
from ...ir.views.values import integer, number, static_dim
from ...runtime.calibration import ActivationStream
from ..infrastructure.base import Contract, Coverage, Fact, Pass, PassContext, PassResult, Skipped
from .projections import (
    change_columns,
    change_rows,
    chosen,
    constant,
    is_layout_only,
    path_to,
    reason_not_to_change,
    set_reshape,
)

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]

_MULTIPLE = 8
"""Of numbers that stay: what kernels of quantised caches take."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShrinkHeads(Pass):
    """Prune pairs of key channels, and project values to their principal axes.

    Attributes:
        keep: share of the numbers of a head that stay, rounded to a multiple of 8.
        layers: numbers of the layers that are shrunk, from 0; empty for all. Several of these passes, one
            behind the other, give layers sizes of their own.
    """

    name: ClassVar[str] = "shrink-heads"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.FUSED, Fact.QUANTIZED})

    keep: float = 0.5
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise PipelineError(f"shrink-heads: keep: expected a share between 0 and 1, found {self.keep}")

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        """Rewrite ``model`` in place."""
        blocks = chosen(attentions(model), self.layers, self.name)
        reasons = [self._reason_not_to(block) for block in blocks]
        covered = [block for block, reason in zip(blocks, reasons, strict=True) if reason is None]
        skipped = [
            Skipped(str(block.node.name), reason)
            for block, reason in zip(blocks, reasons, strict=True)
            if reason
        ]
        if covered:
            stream = ctx.activation_stream(model)
            found = [
                _observe(block, stream) for block in ctx.progress(covered, "observe queries, keys, values")
            ]
            for block, moments in zip(covered, found, strict=True):
                _shrink(model, block, moments, self._size(block))
        caches = [value for block in covered for value in (block.present_key, block.present_value)]
        return PassResult(
            modified=bool(covered),
            coverage=Coverage(unit="attentions", covered=len(covered), skipped=tuple(skipped)),
            redefined_outputs=frozenset(str(value.name) for value in caches if value is not None),
        )

    def _size(self, block: AttentionBlock) -> int:
        assert block.head_size is not None
        return max(_MULTIPLE, round(self.keep * block.head_size / _MULTIPLE) * _MULTIPLE)

    def _reason_not_to(self, block: AttentionBlock) -> str | None:
        reason = reason_not_to_change(block)
        if reason is not None:
            return reason
        assert block.head_size is not None
        if self._size(block) >= block.head_size:
            return (
                f"{self.keep:.0%} of {block.head_size} numbers, in multiples of {_MULTIPLE}, are all of them"
            )
        return _reason_of_rotation(block)


def _reason_of_rotation(block: AttentionBlock) -> str | None:
    rotaries = [_rotary(block.node.inputs[index]) for index in (0, 1)]
    if (rotaries[0] is None) != (rotaries[1] is None):
        return "queries and keys are not rotated alike"
    for rotary, linear, value in zip(rotaries, (block.q, block.k), block.node.inputs[:2], strict=True):
        if rotary is not None and (integer(rotary, "interleaved") or integer(rotary, "rotary_embedding_dim")):
            return "its rotation is partial or interleaved"
        if rotary is not None and len(rotary.inputs) > 3:
            return "its rotation looks positions up itself"
        before = value if rotary is None else rotary.inputs[0]
        if linear is None or not is_layout_only(linear, before, scaled=True):
            return "something else lies between its projections and its rotation"
    return None


def _rotary(value: ir.Value | None) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == "RotaryEmbedding" else None


@dataclasses.dataclass(frozen=True)
class _Moments:
    """Mean squares of queries [heads, size] and keys [kv_heads, size]; E[v vᵀ] [kv_heads, size, size]."""

    queries: Array
    keys: Array
    values: Array


def _observe(block: AttentionBlock, stream: ActivationStream) -> _Moments:
    """Over all real tokens of the calibration data. Rotation does not change what pairs sum up to."""
    assert block.q is not None
    assert block.k is not None
    assert block.v is not None
    sums: list[Array] = [np.zeros(())] * 3
    count = 0
    for tap in stream.advance([block.q.output, block.k.output, block.v.output]):
        q, k, v = (
            tap.rows(linear.output).astype(np.float64).reshape(-1, heads or 1, block.head_size or 1)
            for linear, heads in (
                (block.q, block.num_heads),
                (block.k, block.kv_heads),
                (block.v, block.kv_heads),
            )
        )
        count += len(q)
        new = (np.square(q).sum(0), np.square(k).sum(0), np.einsum("thd,the->hde", v, v))
        sums = [total + part for total, part in zip(sums, new, strict=True)]
    moments = _Moments(*(total / max(count, 1) for total in sums))
    if not all(np.isfinite(array).all() for array in (moments.queries, moments.keys, moments.values)):
        raise PassError(
            f"shrink-heads: queries, keys or values of {block.node.name!r} are not finite on the data",
            hint="look at the calibration data and at the model's weights",
        )
    return moments


def _shrink(model: ir.Model, block: AttentionBlock, moments: _Moments, size: int) -> None:
    assert block.q is not None
    assert block.k is not None
    assert block.v is not None
    assert block.o is not None
    old = block.head_size
    assert old is not None
    rotary = _rotary(block.node.inputs[1])
    channels = important_channels(moments.queries, moments.keys, size, in_pairs=rotary is not None)
    for linear in (block.q, block.k):
        change_columns(linear, lambda array: _per_head(array, old)[:, :, channels].reshape(len(array), -1))
    axes = principal_axes(moments.values, size)
    shared = (block.num_heads or 1) // (block.kv_heads or 1)
    change_columns(block.v, lambda array: _projected(array, axes))
    change_rows(block.o, lambda array: _projected(array, np.repeat(axes, shared, axis=0)))
    if rotary is not None:
        _slice_angles(model, block, channels[: size // 2])
    block.node.attributes["scale"] = ir.AttrFloat32("scale", number(block.node, "scale", old**-0.5))
    _resize_paths(block, old, size)


def important_channels(queries: Array, keys: Array, size: int, *, in_pairs: bool) -> Indices:
    """Which channels of a head stay, [size], rising; the pair of channel i is i + half the old size.

    Args:
        queries, keys: mean squares, [heads, old size] and [kv_heads, old size].
        size: that stay.
        in_pairs: channels go in pairs.
    """
    shared = len(queries) // len(keys)
    keys = np.repeat(keys, shared, axis=0)
    if in_pairs:
        queries, keys = (array.reshape(len(array), 2, -1).sum(axis=1) for array in (queries, keys))
    importance = np.sqrt(queries * keys).sum(axis=0)
    count = size // 2 if in_pairs else size
    best = np.sort(np.argsort(-importance, kind="stable")[:count])
    return np.concatenate([best, best + queries.shape[1]]) if in_pairs else best


def principal_axes(moments: Array, size: int) -> Array:
    """[heads, old size, size]: of second moments [heads, old size, old size], by falling eigenvalue."""
    _, vectors = np.linalg.eigh(moments)
    axes: Array = vectors[..., ::-1][..., :size]
    return axes


def _per_head(array: Array, size: int) -> Array:
    return array.reshape(len(array), -1, size)


def _projected(array: Array, axes: Array) -> Array:
    """[rows, heads · old size] times the axes of each head."""
    split = _per_head(array, axes.shape[1]).astype(np.float64)
    found: Array = np.einsum("rhd,hde->rhe", split, axes).reshape(len(array), -1).astype(array.dtype)
    return found


def _slice_angles(model: ir.Model, block: AttentionBlock, pairs: Indices) -> None:
    """Give the layer's rotations the cosines and sines of the pairs that stay, [batch, length, pairs]."""
    build = GraphBuilder(f"{block.node.name}.angles")
    chosen = build.constant(pairs, "pairs")
    rotaries = [node for node in (_rotary(block.node.inputs[index]) for index in (0, 1)) if node is not None]
    for index in (1, 2):
        angles = rotaries[0].inputs[index]
        assert angles is not None
        fewer = build.op("Gather", angles, chosen, axis=-1)
        fewer.type = angles.type
        if angles.shape is not None:
            fewer.shape = ir.Shape([*angles.shape[:-1], len(pairs)])
        for rotary in rotaries:
            rotary.replace_input_with(index, fewer)
    for value in build.initializers:
        model.graph.register_initializer(value)
    first = min(rotaries, key=list(model.graph).index)
    model.graph.insert_before(first, build.nodes)


def _resize_paths(block: AttentionBlock, old: int, new: int) -> None:
    """Say the new size wherever the old one is said, from the projections to the cache and the output."""
    for linear, start in zip((block.q, block.k, block.v), block.node.inputs[:3], strict=True):
        assert linear is not None
        for value, node in list(path_to(linear, start)):
            _resize(value, old, new)
            _resize_reshape(node, old, new)
    assert block.o is not None
    value = block.node.outputs[0]
    _resize(value, old, new)
    while value is not block.o.input:
        reader = next(iter(value.uses())).node
        _resize_reshape(reader, old, new)
        value = reader.outputs[0]
        _resize(value, old, new)
    for cache in (block.past_key, block.past_value, block.present_key, block.present_value):
        if cache is not None:
            _resize(cache, old, new)


def _resize(value: ir.Value, old: int, new: int) -> None:
    """The last axis is [.., size] or [.., heads · size]."""
    last = static_dim(value, -1)
    if value.shape is not None and last is not None:
        value.shape = ir.Shape([*value.shape[:-1], last // old * new])


def _resize_reshape(node: ir.Node | None, old: int, new: int) -> None:
    """A constant shape whose last entry is [.., size] or [.., heads · size], or −1."""
    if node is None or node.op_type != "Reshape" or node.inputs[1] is None:
        return
    sizes = constant(node.inputs[1]).copy()
    if sizes[-1] > 0:
        sizes[-1] = sizes[-1] // old * new
        set_reshape(node, sizes)
