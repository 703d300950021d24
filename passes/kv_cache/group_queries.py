"""Let more heads of queries share heads of keys and values, whose projections become the means of theirs.

    W_k [in, kv_heads · size]  →  W̄_k [in, groups · size],   W̄_k[:, g] = mean of W_k[:, h] over h in group g

and W_v alike. The cache has ``groups / kv_heads`` of the bytes, and decoding reads as much less. Groups are
neighbours, or the most alike heads (``similar``: equally large groups of least squared distance between their
key and value weights), for which heads of queries, and the rows of the output projection, change places
first: that is exact.

The mean is a starting point, from which the model is trained on: ``group-queries{kv_heads=2},distill{…}``.
Groups of different sizes, by the norms of keys, are not made: no kernel takes them.

Preconditions: the canonical form; queries, keys, values and output have float projections of their own.
Source: Ainslie et al., 2023, "GQA: training generalized multi-query transformer models from multi-head
checkpoints" (https://arxiv.org/abs/2305.13245).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from scipy.optimize import linear_sum_assignment

from ...ir.errors import PipelineError
from ...ir.views import Linear
from ...ir.views.attention import AttentionBlock, attentions
from ...ir.views.values import static_dim
from ..infrastructure.base import Contract, Coverage, Fact, Pass, PassContext, PassResult, Skipped
from .projections import (
    change_columns,
    change_rows,
    chosen,
    constant,
    path_to,
    reason_not_to_change,
    set_reshape,
)

Array = npt.NDArray[Any]
Heads = npt.NDArray[np.int64]

_STARTS = 10
_ROUNDS = 20
"""Of assigning heads to groups; it has long come to rest by then."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupQueries(Pass):
    """Merge heads of keys and values.

    Attributes:
        kv_heads: that stay in each layer; must divide the number that there are.
        layers: numbers of the layers whose heads are merged, from 0; empty for all. Several of these passes,
            one behind the other, give layers numbers of heads of their own.
        grouping: which heads are merged: neighbours, or similar ones.
    """

    name: ClassVar[str] = "group-queries"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.FUSED, Fact.QUANTIZED})

    kv_heads: int = 1
    layers: tuple[int, ...] = ()
    grouping: Literal["neighbours", "similar"] = "similar"

    def __post_init__(self) -> None:
        if self.kv_heads < 1:
            raise PipelineError(f"group-queries: kv_heads: expected 1 or more, found {self.kv_heads}")

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        """Rewrite ``model`` in place."""
        covered: list[AttentionBlock] = []
        skipped = []
        for block in ctx.progress(chosen(attentions(model), self.layers, self.name), "merge heads"):
            reason = self._reason_not_to(block)
            if reason is None:
                self._merge(block, ctx)
                covered.append(block)
            else:
                skipped.append(Skipped(str(block.node.name), reason))
        caches = [value for block in covered for value in (block.present_key, block.present_value)]
        return PassResult(
            modified=bool(covered),
            coverage=Coverage(unit="attentions", covered=len(covered), skipped=tuple(skipped)),
            redefined_outputs=frozenset(str(value.name) for value in caches if value is not None),
        )

    def _reason_not_to(self, block: AttentionBlock) -> str | None:
        reason = reason_not_to_change(block)
        if reason is not None:
            return reason
        assert block.kv_heads is not None
        if block.kv_heads % self.kv_heads:
            return f"{block.kv_heads} heads do not form {self.kv_heads} equal groups"
        if block.kv_heads == self.kv_heads:
            return f"it has {self.kv_heads} heads already"
        return None

    def _merge(self, block: AttentionBlock, ctx: PassContext) -> None:
        assert block.q is not None
        assert block.k is not None
        assert block.v is not None
        assert block.o is not None
        assert block.kv_heads is not None
        assert block.num_heads is not None
        keys, values = (_heads_of(linear, block.kv_heads) for linear in (block.k, block.v))
        groups = np.arange(block.kv_heads).reshape(self.kv_heads, -1)
        if self.grouping == "similar":
            features = np.concatenate([_unit(keys), _unit(values)], axis=1)
            groups = balanced_groups(features, self.kv_heads, ctx.rng)
        if (np.diff(groups.reshape(-1)) < 0).any():
            queries = groups.reshape(-1, 1) * (block.num_heads // block.kv_heads)
            _reorder(block, (queries + np.arange(block.num_heads // block.kv_heads)).reshape(-1))
        for linear in (block.k, block.v):
            change_columns(linear, lambda array: _mean(array, groups))
        _shorten_paths(block, self.kv_heads)


def balanced_groups(features: Array, count: int, rng: np.random.Generator) -> Heads:
    """Equally large groups of rows with small squared distances to their means, [count, size], rows sorted.

    Lloyd's algorithm, with an assignment that fills every group alike (scipy's `linear_sum_assignment`), the
    best of several starts.

    Args:
        features: [heads, any].
        count: groups; divides the heads.
        rng: chooses the first centres.
    """
    found = [_groups_from(features, features[rng.permutation(len(features))[:count]]) for _ in range(_STARTS)]
    return min(found, key=lambda groups: float(features[groups].var(axis=1).sum()))


def _groups_from(features: Array, centres: Array) -> Heads:
    count, heads = len(centres), len(features)
    size = heads // count
    groups = np.arange(heads).reshape(count, size)
    for _ in range(_ROUNDS):
        distances = np.square(features[:, None] - centres[None]).sum(axis=-1)
        _, places = linear_sum_assignment(np.repeat(distances, size, axis=1))
        found = np.stack([np.flatnonzero(places // size == group) for group in range(count)])
        if (found == groups).all():
            break
        groups = found
        centres = features[groups].mean(axis=1)
    return groups[np.argsort(groups[:, 0])]


def _unit(weights: Array) -> Array:
    """[heads, any], so that keys and values count alike."""
    flat = weights.transpose(1, 0, 2).reshape(weights.shape[1], -1).astype(np.float64)
    scaled: Array = flat / max(float(np.linalg.norm(flat)), np.finfo(np.float64).tiny)
    return scaled


def _heads_of(linear: Linear, heads: int) -> Array:
    """The weight as [in, heads, size]."""
    array = constant(linear.weight)
    array = array.T if linear.transposed else array
    return array.reshape(len(array), heads, -1)


def _mean(array: Array, groups: Heads) -> Array:
    """[rows, heads · size] → [rows, groups · size]."""
    split = array.reshape(len(array), groups.size, -1)
    merged: Array = (
        split[:, groups].mean(axis=2, dtype=np.float64).reshape(len(array), -1).astype(array.dtype)
    )
    return merged


def _reorder(block: AttentionBlock, queries: Heads) -> None:
    """Let heads of queries change places, and with them what reads their results."""
    assert block.q is not None
    assert block.o is not None
    count = len(queries)

    def columns(array: Array) -> Array:
        return array.reshape(len(array), count, -1)[:, queries].reshape(array.shape)

    change_columns(block.q, columns)
    change_rows(block.o, columns)


def _shorten_paths(block: AttentionBlock, kv_heads: int) -> None:
    """Say the new number of heads wherever the old one is said, from the projections to the cache."""
    assert block.kv_heads is not None
    for linear, start in ((block.k, block.node.inputs[1]), (block.v, block.node.inputs[2])):
        assert linear is not None
        for value, node in list(path_to(linear, start)):
            _resize(value, block.kv_heads, kv_heads)
            if node is not None and node.op_type == "Reshape" and node.inputs[1] is not None:
                sizes = constant(node.inputs[1]).copy()
                sizes[2] = kv_heads if sizes[2] == block.kv_heads else sizes[2]
                set_reshape(node, sizes)
    for cache in (block.past_key, block.past_value, block.present_key, block.present_value):
        if cache is not None and cache.shape is not None:
            batch, _, length, size = cache.shape
            cache.shape = ir.Shape([batch, kv_heads, length, size])


def _resize(value: ir.Value, old: int, new: int) -> None:
    """[batch, length, heads · size] or 4-D with heads at axis 1 or 2."""
    if value.shape is None:
        return
    dims: list[int | ir.SymbolicDim | None] = list(value.shape)
    if len(dims) == 3:
        width = static_dim(value, 2)
        dims[2] = None if width is None else width * new // old
    elif len(dims) == 4:
        dims[1 if dims[1] == old else 2] = new
    value.shape = ir.Shape(dims)
