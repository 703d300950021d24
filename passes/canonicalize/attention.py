"""Decomposed attention becomes one Attention node.

    Softmax(s · q kᵀ + mask) v → Attention(q, k, v, mask; scale = s)              (Vaswani et al. 2017)

with q [batch, heads, queries, head_size], k and v [batch, heads, keys, …].

Spellings understood: a soft cap c · tanh(· / c) before the masks; the scale as Mul or Div, on q, on k, on
both or on the scores; additive masks; masks by Where with −∞ or a large negative number; several of them
(combined into one float mask); Cast to float around the Softmax (``softmax_precision``); ``Where(IsNaN(p),
0, p)`` guards, since a fully masked row of Attention is zero by definition. Dropout is gone before.

Preconditions: scores and probabilities have no other reader; batch and heads of q, k and v are provably
equal; each mask broadcasts to the scores and not the other way round. A mask with one row for all queries is
expanded to them, because runtimes want that axis spelled out.

What differs: a row whose every key is masked by a *finite* number is, literally read, the mean of the values;
onnxruntime's Attention treats the lowest finite number as −∞ and returns zeros. Such rows (padding that
queries padding) carry no meaning. Needs opset 23.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from ..infrastructure.rewriter import Replacement, Rule, missed
from .graph_edits import (
    broadcasts_into,
    dims,
    integer,
    only_use,
    producer,
    rank,
    same_shape,
    scalar,
    shape_constant,
)

MASKED = -1e9
"""A fill value at or below this leaves no probability in any floating-point type."""


@dataclass(frozen=True)
class Scores:
    """What goes into the Softmax: scale · (q kᵀ), plus all that is ``added``, and −∞ where not ``kept``."""

    product: ir.Node
    scale: float = 1.0
    added: tuple[ir.Value, ...] = ()
    kept: ir.Value | None = None
    dropped: ir.Value | None = None
    """The opposite of ``kept``: −∞ where it is true."""
    softcap: float = 0.0
    """c, where the scaled product goes through c · tanh(· / c) before the masks; 0: it does not."""


class AttentionFromMatMuls(Rule):
    """Softmax(s · q kᵀ + mask) v → Attention(q, k, v, mask)."""

    name = "attention"
    roots = ("MatMul",)

    def apply(self, node: ir.Node) -> bool:
        """Rewrite ``node``, the product of probabilities and values."""
        softmax, precision = _softmax(node.inputs[0])
        if softmax is None:
            return False
        scores = _scores(softmax)
        if scores is None:
            return False
        query, query_scale = _unscaled(scores.product.inputs[0])
        key, key_scale = _key(scores.product.inputs[1])
        value = node.inputs[1]
        if query is None or key is None or value is None:
            return missed(node, "the keys are not transposed")
        if not query.dtype == key.source.dtype == value.dtype == node.outputs[0].dtype or query.dtype is None:
            return missed(node, "q, k and v are of different types")
        if not _same_batch_and_heads(query, key.source_dims, value):
            return missed(node, "batch and heads of q, k and v are not known to be equal")
        masks = (*scores.added, scores.kept, scores.dropped)
        if any(mask is not None and not _masks(mask, query, value) for mask in masks):
            return missed(node, "a mask does not have the length of the keys")
        if any(mask.dtype != query.dtype for mask in scores.added):
            return missed(node, "a mask is of another type than the queries")
        replacement = Replacement(node)
        attributes: dict[str, Any] = {"scale": scores.scale * query_scale * key_scale}
        if precision is not None and precision != query.dtype:
            attributes["softmax_precision"] = int(precision)
        if scores.softcap:
            attributes["softcap"] = scores.softcap
        keys = key.build(replacement)
        mask = _mask(replacement, scores, query)
        inputs = [query, keys, value] if mask is None else [query, keys, value, mask]
        return replacement.finish(replacement.op("Attention", *inputs, like=node.outputs[0], **attributes))


def _softmax(value: ir.Value | None) -> tuple[ir.Node | None, ir.DataType | None]:
    """The Softmax that computes the probabilities ``value``, and the type that it computes in."""
    if value is None or not only_use(value):
        return None, None
    guard = producer(value, "Where")
    if guard is not None:
        test = producer(guard.inputs[0], "IsNaN")
        value = guard.inputs[2]
        if test is None or value is None or test.inputs[0] is not value or scalar(guard.inputs[1]) != 0:
            return None, None
        if len(value.uses()) != 2 or value.is_graph_output():
            return None, None
    cast = producer(value, "Cast")
    softmax = producer(value if cast is None else cast.inputs[0], "Softmax")
    if softmax is None or (cast is not None and not only_use(softmax.outputs[0])):
        return None, None
    axes = rank(softmax.outputs[0])
    if axes != 4 or integer(softmax, "axis", -1) not in (-1, 3):
        return None, None
    return softmax, softmax.outputs[0].dtype


def _scores(softmax: ir.Node) -> Scores | None:
    """Walk from the Softmax back to the product of queries and keys."""
    value = softmax.inputs[0]
    cast = producer(value, "Cast")
    if cast is not None and value is not None and only_use(value):
        value = cast.inputs[0]
    scale, masks = 1.0, Scores(softmax)
    while value is not None and only_use(value):
        node = producer(value, "MatMul", "Mul", "Div", "Add", "Where")
        if node is None:
            return None
        if node.op_type == "MatMul":
            return replace(masks, product=node, scale=scale)
        capped = _softcap(node) if scale == 1.0 and not masks.softcap else None
        if capped is not None:
            value, masks = capped[0], replace(masks, softcap=capped[1])
            continue
        if node.op_type in ("Mul", "Div"):
            step = _scaling(node)
            # A scale between two masks would scale the inner one too.
            if step is None or not math.isfinite(step[1]):
                return None
            value, scale = step[0], scale * step[1]
            continue
        peeled = _peel_mask(node, masks) if scale == 1.0 and not masks.softcap else None
        if peeled is None:
            return None
        value, masks = peeled
    return None


def _softcap(node: ir.Node) -> tuple[ir.Value, float] | None:
    """(x, c) if ``node`` is c · tanh(x / c) (Gemma 2)."""
    step = _scaling(node) if node.op_type == "Mul" else None
    tanh = producer(step[0], "Tanh") if step is not None else None
    inner = producer(tanh.inputs[0], "Mul", "Div") if tanh is not None else None
    scaled = _scaling(inner) if inner is not None else None
    if step is None or tanh is None or scaled is None or step[1] <= 0:
        return None
    if not math.isclose(step[1] * scaled[1], 1.0, rel_tol=1e-6):
        return None
    between = (step[0], tanh.inputs[0])
    return (scaled[0], step[1]) if all(each is not None and only_use(each) for each in between) else None


def _scaling(node: ir.Node) -> tuple[ir.Value, float] | None:
    """(x, c) of a Mul or Div by a constant number."""
    left, right = node.inputs[0], node.inputs[1]
    factor = scalar(right)
    if left is not None and factor is not None and (rank(right) or 0) <= 1:
        if node.op_type == "Div":
            return (left, 1.0 / factor) if factor else None
        return left, factor
    factor = scalar(left)
    if node.op_type == "Mul" and right is not None and factor is not None and (rank(left) or 0) <= 1:
        return right, factor
    return None


def _peel_mask(node: ir.Node, masks: Scores) -> tuple[ir.Value, Scores] | None:
    """Take one mask off: the scores underneath, and what has been collected."""
    if node.op_type == "Add":
        for scores, mask in (node.inputs, reversed(node.inputs)):
            if scores is not None and mask is not None and _is_scores(scores) and not _is_scores(mask):
                return _checked(node, scores, mask, replace(masks, added=(mask, *masks.added)))
        return None
    condition, kept, filled = node.inputs
    if masks.kept is not None or masks.dropped is not None or condition is None:
        return None
    if _is_masked(filled) and kept is not None:
        return _checked(node, kept, condition, replace(masks, kept=condition))
    if _is_masked(kept) and filled is not None:
        return _checked(node, filled, condition, replace(masks, dropped=condition))
    return None


def _checked(
    node: ir.Node, scores: ir.Value, mask: ir.Value, found: Scores
) -> tuple[ir.Value, Scores] | None:
    """The mask must not enlarge the scores."""
    if not same_shape(node.outputs[0], scores) and not broadcasts_into(mask, scores):
        return None
    return scores, found


def _is_masked(value: ir.Value | None) -> bool:
    number = scalar(value)
    return number is not None and number <= MASKED


def _is_scores(value: ir.Value | None, depth: int = 8) -> bool:
    """Whether the value leads back to a product through scales and masks: tells scores and masks apart."""
    node = producer(value, "MatMul", "Mul", "Div", "Tanh", "Add", "Where")
    if node is None or depth == 0:
        return False
    if node.op_type == "MatMul":
        return rank(node.outputs[0]) == 4
    operands = node.inputs[1:] if node.op_type == "Where" else node.inputs
    return any(_is_scores(operand, depth - 1) for operand in operands)


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """(x, c) if ``value`` is c · x."""
    node = producer(value, "Mul", "Div")
    step = None if node is None else _scaling(node)
    return (value, 1.0) if step is None else step


@dataclass(frozen=True)
class _Key:
    """The keys [batch, heads, keys, head_size]: a value, perhaps to be transposed first."""

    source: ir.Value
    permutation: tuple[int, ...] | None
    source_dims: list[int | str | None]

    def build(self, replacement: Replacement) -> ir.Value:
        if self.permutation is None:
            return self.source
        output = replacement.op("Transpose", self.source, perm=self.permutation)
        output.type, output.shape = self.source.type, ir.Shape(self.source_dims)
        return output


def _key(value: ir.Value | None) -> tuple[_Key | None, float]:
    """The keys that were transposed to ``value`` [batch, heads, head_size, keys], and their scale."""
    outer, outer_scale = _unscaled(value)
    node = producer(outer, "Transpose")
    if node is None or "perm" not in node.attributes:
        return None, 1.0
    inner, inner_scale = _unscaled(node.inputs[0])
    permutation = tuple(node.attributes["perm"].as_ints())
    shape = dims(inner)
    if inner is None or shape is None or len(permutation) != 4 or len(shape) != 4:
        return None, 1.0
    straight = (permutation[0], permutation[1], permutation[3], permutation[2])
    key = _Key(
        source=inner,
        permutation=None if straight == (0, 1, 2, 3) else straight,
        source_dims=[shape[axis] for axis in straight],
    )
    return key, outer_scale * inner_scale


def _same_batch_and_heads(query: ir.Value, key: list[int | str | None], value: ir.Value) -> bool:
    q, v = dims(query), dims(value)
    if q is None or v is None or len(q) != 4 or len(v) != 4 or None in q[:2]:
        return False
    return q[:2] == key[:2] == v[:2] and key[2] == v[2] and key[2] is not None


def _masks(mask: ir.Value, query: ir.Value, value: ir.Value) -> bool:
    """Whether the last axis of the mask is that of the keys; the axis of queries may be 1."""
    shape, q, v = dims(mask), dims(query), dims(value)
    if shape is None or q is None or v is None or len(shape) < 2 or shape[-1] is None:
        return False
    return shape[-1] == v[2] and shape[-2] is not None and shape[-2] in (1, q[2])


def _mask(replacement: Replacement, scores: Scores, query: ir.Value) -> ir.Value | None:
    """One mask, boolean or float, with a row for each query."""
    kept = scores.kept
    if scores.dropped is not None:
        kept = replacement.op("Not", scores.dropped, like=scores.dropped)
    masks = [mask for mask in (kept, *scores.added) if mask is not None]
    if not masks:
        return None
    rows = {(dims(each) or [])[-2] for each in masks}
    mask = masks[0] if kept is None or not scores.added else scores.added[0]
    for further in scores.added[1:]:
        mask = _typed(replacement.op("Add", mask, further), further)
    if kept is not None and scores.added:
        assert mask.dtype is not None
        lowest = np.array(-np.inf, dtype=mask.dtype.numpy())
        fill = replacement.initializer("masked", ir.tensor(lowest))
        mask = _typed(replacement.op("Where", kept, mask, fill), mask)
    if rows == {1} and (dims(query) or [])[2] != 1:
        return _expand_rows(replacement, mask, query)
    return mask


def _typed(value: ir.Value, like: ir.Value) -> ir.Value:
    """``value`` with the element type of ``like``."""
    value.type = like.type
    return value


def _expand_rows(replacement: Replacement, mask: ir.Value, query: ir.Value) -> ir.Value:
    queries = replacement.op("Shape", query, start=2, end=3)
    assert isinstance(query.graph, ir.Graph)
    one = shape_constant(query.graph, [1])
    shape = replacement.op("Concat", queries, one, axis=0)
    return _typed(replacement.op("Expand", mask, shape), mask)


def rules(opset: int) -> list[Rule]:
    """The rules whose results exist in this opset."""
    return [AttentionFromMatMuls()] if opset >= 23 else []
