"""Store keys and values around zero, where symmetric grids are.

    values   v ← v − m    folded into the bias of W_v;   y ← y + m, folded into the bias of W_o: b + W_oᵀ m
    keys     k ← k − c    folded into the bias of W_k;   softmax(q · (k − c) + …) = softmax(q · k + …)

m and c are the means over the tokens of calibration data, a constant for every channel. Both changes are
exact: the weights of an attention sum to 1, and a constant in all scores of a query changes nothing. A key
that is rotated by its position has no constant part, so only keys without rotation are centred. It goes
before `kv-cache`, whose grids then need not reach as far; the cache holds other numbers from here on.

Preconditions: the canonical form; calibration data; keys, values and output have float projections of their
own, with nothing between them and the attention that is not a layout. Keys stay where scores have a soft cap.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...ir.errors import PassError
from ...ir.views.attention import AttentionBlock, attentions
from ...ir.views.values import number
from ...runtime.calibration import ActivationStream
from ..infrastructure.base import Coverage, Fact, Pass, PassContext, PassResult, Skipped
from ..rotate.biases import shift_output
from ..rotate.streams import read_vector
from ..rotate.vectors import projections
from .projections import LAYOUT, is_layout_only, reason_not_to_change

Means = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class _Means:
    """Of keys and of values, [kv_heads · size]; None where they stay as they are."""

    keys: Means | None
    values: Means


@dataclasses.dataclass(frozen=True, kw_only=True)
class CenterCache(Pass):
    """Subtract the means of keys and values from what is cached, and make up for it behind the attention."""

    name: ClassVar[str] = "center-cache"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.FUSED, Fact.QUANTIZED})

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        """Rewrite ``model`` in place."""
        covered: list[AttentionBlock] = []
        skipped = []
        for block in attentions(model):
            reason = reason_not_to_change(block) or _reason_of_values(block)
            if reason is None:
                covered.append(block)
            else:
                skipped.append(Skipped(str(block.node.name), reason))
        stream = ctx.activation_stream(model) if covered else None
        found = [
            _observe(block, stream) for block in ctx.progress(covered, "observe keys and values") if stream
        ]
        for block, means in zip(covered, found, strict=True):
            _center(block, means, model.graph)
        keys = sum(means.keys is not None for means in found)
        if covered and keys < len(covered):
            ctx.remark("keys", f"{len(covered) - keys} layers keep theirs: they are rotated, or capped")
        caches = [value for block in covered for value in (block.present_key, block.present_value)]
        return PassResult(
            modified=bool(covered),
            coverage=Coverage(unit="attentions", covered=len(covered), skipped=tuple(skipped)),
            statistics={"keys-centred": keys, "values-centred": len(covered)},
            redefined_outputs=frozenset(str(value.name) for value in caches if value is not None),
        )


def _reason_of_values(block: AttentionBlock) -> str | None:
    assert block.v is not None
    assert block.o is not None
    if not is_layout_only(block.v, block.node.inputs[2]):
        return "something else than a layout lies between its values and their projection"
    result = block.node.outputs[0]
    if not _is_result(block.o.input, result):
        return "something else than a layout lies between its result and the output projection"
    return None


def _is_result(value: ir.Value | None, result: ir.Value) -> bool:
    """Whether the output projection reads the attention's result, heads side by side."""
    while value is not None and value is not result:
        node = value.producer()
        if node is None or node.op_type not in LAYOUT:
            return False
        value = node.inputs[0]
    return value is result


def _observe(block: AttentionBlock, stream: ActivationStream) -> _Means:
    """Over all real tokens of the calibration data."""
    assert block.k is not None
    assert block.v is not None
    center_keys = is_layout_only(block.k, block.node.inputs[1]) and not number(block.node, "softcap", 0.0)
    sums = [np.zeros(())] * 2
    count = 0
    for tap in stream.advance([block.k.output, block.v.output]):
        rows = [tap.rows(linear.output).astype(np.float64) for linear in (block.k, block.v)]
        count += len(rows[0])
        sums = [total + part.sum(axis=0) for total, part in zip(sums, rows, strict=True)]
    keys, values = (total / max(count, 1) for total in sums)
    if not (np.isfinite(keys).all() and np.isfinite(values).all()):
        raise PassError(
            f"center-cache: keys or values of {block.node.name!r} are not finite on the data",
            hint="look at the calibration data and at the model's weights",
        )
    return _Means(keys if center_keys else None, values)


def _center(block: AttentionBlock, means: _Means, graph: ir.Graph) -> None:
    assert block.k is not None
    assert block.v is not None
    assert block.o is not None
    shared = (block.num_heads or 1) // (block.kv_heads or 1)
    # A head of queries gets back the mean of the head of values that it read.
    per_query = np.repeat(means.values.reshape(block.kv_heads or 1, -1), shared, axis=0).reshape(-1)
    reader = read_vector(block.o.node)
    assert reader is not None
    shift_output(block.o.node, projections(reader, per_query), graph)
    shift_output(block.v.node, -means.values, graph)
    if means.keys is not None:
        shift_output(block.k.node, -means.keys, graph)
