"""Where two graphs that should compute the same begin to differ.

Passes keep the names of the tensors that they keep. So the tensors that have the same name before and after
a pass can be computed in both graphs and compared; the first one, in the order of execution, that differs
lies at or right behind the rewrite that broke it.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..ir.printer import module_scope
from .measure import difference
from .reference import ancestors, run_model

Array = np.ndarray[Any, Any]

# Every tensor that is fetched stays in memory until the run ends; every further run costs a session.
_CHUNK_BYTES = 1 << 30
_UNKNOWN_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorDifference:
    """The first tensor that differs.

    Attributes:
        tensor: its name, the same in both graphs.
        error: see `relative_error`; infinite where shape, dtype or the places of NaN differ.
        detail: what differs, in words: ``by 0.5 relative`` or ``shape [2, 3] instead of [2, 4]``.
        node: name of the node that computes it now.
        op: that node's op.
        layer: the layer it belongs to: the owner of a changed weight, else the torch module if known, else
            the owner of the node's weights, else the nearest layer that the node depends on.
        changed_weights: initializers that the node reads whose values are not the same in both graphs.
        vanished: tensors that the reference computes right before this one and that are gone.
    """

    tensor: str
    error: float
    detail: str
    node: str
    op: str
    layer: str
    changed_weights: tuple[str, ...] = ()
    vanished: tuple[str, ...] = ()

    def __str__(self) -> str:
        layer = f"layer {self.layer!r}, " if self.layer else ""
        text = f"tensor {self.tensor!r} ({layer}{self.op} node {self.node!r}) differs {self.detail}"
        if self.changed_weights:
            return f"{text}; weight {self.changed_weights[0]!r} has changed"
        return f"{text}; {self.vanished[0]!r} before it is gone" if self.vanished else text


def relative_error(value: Any, reference: Any) -> tuple[float, str]:
    """‖value − reference‖∞ / ‖reference‖∞ in float64, and the difference in words.

    Against an all-zero reference the error is absolute. NaN and infinities must stand in the same places;
    what is not floating point must be equal: otherwise, and for another shape or dtype, it is infinite.
    """
    if not (isinstance(value, np.ndarray) and isinstance(reference, np.ndarray)):
        value, reference = np.asarray(value, object), np.asarray(reference, object)
    if value.shape != reference.shape:
        return float("inf"), f"in shape: {list(value.shape)} instead of {list(reference.shape)}"
    if value.dtype != reference.dtype:
        return float("inf"), f"in dtype: {value.dtype} instead of {reference.dtype}"
    if not _is_floating(reference.dtype):
        count = int(np.sum(value != reference))
        return (float("inf"), f"in {count} of {value.size} elements") if count else (0.0, "not at all")
    value, reference = value.astype(np.float64), reference.astype(np.float64)
    finite = np.isfinite(reference)
    if not np.array_equal(value[~finite], reference[~finite], equal_nan=True):
        return float("inf"), "in the places of NaN or infinity"
    if not np.isfinite(value[finite]).all():
        return float(
            "inf"
        ), f"in {int((~np.isfinite(value[finite])).sum())} elements that are no longer finite"
    measured = difference(value[finite], reference[finite])
    error = measured.max_absolute if not reference[finite].any() else measured.max_relative
    return error, f"by {error:.2g} relative to its largest value"


def _is_floating(dtype: np.dtype[Any]) -> bool:
    # ml_dtypes' types (bfloat16, float8) have kind 'V' and convert to float64.
    return dtype.kind == "f" or (dtype.kind == "V" and dtype.names is None)


def first_difference(
    before: ir.Model,
    after: ir.Model,
    feeds: Mapping[str, Array],
    *,
    tolerance: float,
    outputs: Sequence[str] | None = None,
) -> TensorDifference | None:
    """The first tensor, in the order of execution, that two graphs compute differently.

    Args:
        before: the reference graph.
        after: the graph under suspicion; its order of nodes is what "first" means.
        feeds: inputs for both, by graph-input name.
        tolerance: largest `relative_error` that is no difference.
        outputs: only tensors that these outputs depend on count; all outputs of ``after`` when absent.

    Returns:
        None if no tensor that both graphs have differs.
    """
    wanted = [value for value in after.graph.outputs if outputs is None or value.name in outputs]
    producers = {value.name: node for node in before.graph for value in node.outputs}
    needed = ancestors(wanted)
    candidates = [
        value
        for node in after.graph
        if node in needed
        for value in node.outputs
        if value.name in producers and (value.uses() or value.is_graph_output())
    ]
    for chunk in _chunks(candidates, after.graph.inputs, feeds):
        names = [value.name or "" for value in chunk]
        reference, found = run_model(before, feeds, names), run_model(after, feeds, names)
        for value, name in zip(chunk, names, strict=True):
            error, detail = relative_error(found[name], reference[name])
            if error > tolerance:
                return _describe(value, error, detail, before, after)
    return None


def layer_of(node: ir.Node) -> str:
    """The layer a node belongs to: its torch module, else the owner of a weight it reads, else nothing."""
    scope = module_scope(node)
    if scope:
        return scope
    for value in node.inputs:
        if value is not None and value.const_value is not None and "." in (value.name or ""):
            return (value.name or "").rpartition(".")[0]
    return ""


def nearest_layer(nodes: Sequence[ir.Node]) -> str:
    """The layer of the first of ``nodes`` that has one, else of the nearest node that they depend on."""
    pending = collections.deque(nodes)
    seen = set(nodes)
    while pending:
        node = pending.popleft()
        if layer := layer_of(node):
            return layer
        previous = [before for before in node.predecessors() if before not in seen]
        seen.update(previous)
        pending.extend(previous)
    return ""


def _chunks(
    values: list[ir.Value], inputs: Sequence[ir.Value], feeds: Mapping[str, Array]
) -> Iterator[list[ir.Value]]:
    """Runs of values whose tensors together stay below the budget, by what is known of their shapes."""
    lengths = {
        dim.value: length
        for value in inputs
        if value.name and value.name in feeds and value.shape is not None
        for dim, length in zip(value.shape, np.shape(feeds[value.name]), strict=False)
        if isinstance(dim, ir.SymbolicDim) and dim.value is not None
    }
    chunk: list[ir.Value] = []
    total = 0
    for value in values:
        size = _estimated_bytes(value, lengths)
        if chunk and total + size > _CHUNK_BYTES:
            yield chunk
            chunk, total = [], 0
        chunk.append(value)
        total += size
    if chunk:
        yield chunk


def _estimated_bytes(value: ir.Value, lengths: Mapping[str, int]) -> int:
    """Size of a tensor; dimensions that are not known count as the longest known one."""
    if value.shape is None:
        return _UNKNOWN_BYTES
    longest = max(lengths.values(), default=1)
    sizes = (dim if isinstance(dim, int) else lengths.get(dim.value or "", longest) for dim in value.shape)
    itemsize = value.dtype.itemsize if value.dtype is not None else 4
    return int(math.prod(sizes) * itemsize)


def _describe(
    value: ir.Value, error: float, detail: str, before: ir.Model, after: ir.Model
) -> TensorDifference:
    node = value.producer()
    assert node is not None
    changed = tuple(
        weight.name or ""
        for weight in node.inputs
        if weight is not None and weight.name in before.graph.initializers and _has_changed(weight, before)
    )
    lost = _lost_nodes(value.name or "", before, after)
    # A node with changed weights is the culprit itself; else what is gone from right before it may be.
    suspects = [node, *lost] if changed or not lost else [*lost, node]
    return TensorDifference(
        tensor=value.name or "",
        error=error,
        detail=detail,
        node=node.name or "",
        op=node.op_type,
        layer=changed[0].rpartition(".")[0] if changed and "." in changed[0] else nearest_layer(suspects),
        changed_weights=changed,
        vanished=tuple(suspect.outputs[0].name or "" for suspect in lost),
    )


def _has_changed(weight: ir.Value, before: ir.Model) -> bool:
    now, then = weight.const_value, before.graph.initializers[weight.name or ""].const_value
    if now is then or now is None or then is None:
        return now is not then
    return now.dtype != then.dtype or not np.array_equal(now.numpy(), then.numpy())


def _lost_nodes(tensor: str, before: ir.Model, after: ir.Model) -> list[ir.Node]:
    """The nodes of ``before`` between ``tensor`` and the tensors that both graphs have, nearest first.

    The tensors that both have and that come before the first difference agree, so the fault lies here.
    """
    kept = {value.name for node in after.graph for value in node.outputs}
    pending = [node for node in before.graph if any(value.name == tensor for value in node.outputs)]
    lost: dict[ir.Node, None] = {}
    while pending:
        for previous in pending.pop().predecessors():
            if previous not in lost and all(value.name not in kept for value in previous.outputs):
                lost[previous] = None
                pending.append(previous)
    return list(lost)
