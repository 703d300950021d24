"""What two models differ in: interface, ops, nodes and weights; not the order in which they are written."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from .external import release
from .printer import format_bytes, format_node, format_value
from .walk import all_graphs, all_nodes

T = TypeVar("T")

_AT_ONCE = 1 << 22
"""Elements of two weights that are compared at a time, in float64."""

_MOST_LISTED = 8
"""How many entries of each kind the text shows."""


@dataclasses.dataclass(frozen=True)
class Change:
    """Something that both models have under one name, as each of them has it."""

    name: str
    before: str
    after: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDiff:
    """The differences from one model to another; false where there are none.

    Attributes:
        interface: inputs and outputs that were added, removed or changed.
        ops: per op, how many nodes more (or fewer) the second model has, where that is not 0.
        added_nodes, removed_nodes: nodes whose names only one model has, as text.
        changed_nodes: nodes of one name that differ in op, operands or attributes.
        added_weights, removed_weights: initializers whose names only one model has.
        changed_weights: initializers of one name that differ in dtype, shape or content.
        bytes_before, bytes_after: the size of all initializers.
    """

    interface: tuple[Change, ...]
    ops: Mapping[str, int]
    added_nodes: tuple[str, ...]
    removed_nodes: tuple[str, ...]
    changed_nodes: tuple[Change, ...]
    added_weights: tuple[str, ...]
    removed_weights: tuple[str, ...]
    changed_weights: tuple[Change, ...]
    bytes_before: int
    bytes_after: int

    def __bool__(self) -> bool:
        return any(
            (
                self.interface,
                self.added_nodes,
                self.removed_nodes,
                self.changed_nodes,
                self.added_weights,
                self.removed_weights,
                self.changed_weights,
            )
        )

    def __str__(self) -> str:
        if not self:
            return "no differences"
        lines = [
            f"nodes: {len(self.added_nodes)} added, {len(self.removed_nodes)} removed, "
            f"{len(self.changed_nodes)} changed",
            f"weights: {len(self.added_weights)} added, {len(self.removed_weights)} removed, "
            f"{len(self.changed_weights)} changed; "
            f"{format_bytes(self.bytes_before)} → {format_bytes(self.bytes_after)}",
        ]
        if self.ops:
            lines.append("ops: " + ", ".join(f"{op} {count:+d}" for op, count in self.ops.items()))
        lines += _changes(self.interface)
        lines += _listed("-", self.removed_nodes)
        lines += _listed("+", self.added_nodes)
        lines += _changes(self.changed_nodes)
        lines += _listed("-", [f"weight {name}" for name in self.removed_weights])
        lines += _listed("+", [f"weight {name}" for name in self.added_weights])
        lines += _changes(self.changed_weights)
        return "\n".join(lines)


def diff_models(before: ir.Model, after: ir.Model, *, check_content: bool = True) -> ModelDiff:
    """Compare two models by the names of their nodes and weights; neither is changed.

    Args:
        before: the first model.
        after: the second model.
        check_content: compare the weights' data too, which reads all weights that the models do not share.
    """
    nodes_before, nodes_after = _nodes(before), _nodes(after)
    weights_before, weights_after = _weights(before), _weights(after)
    removed_nodes, added_nodes, changed_nodes = _compare(nodes_before, nodes_after, _node_change)
    removed, added, changed = _compare(
        weights_before, weights_after, lambda name, a, b: _weight_change(name, a, b, check_content)
    )
    return ModelDiff(
        interface=_interface_changes(before, after),
        ops=_op_changes(before, after),
        added_nodes=tuple(format_node(nodes_after[name]) for name in added_nodes),
        removed_nodes=tuple(format_node(nodes_before[name]) for name in removed_nodes),
        changed_nodes=changed_nodes,
        added_weights=added,
        removed_weights=removed,
        changed_weights=changed,
        bytes_before=_total_bytes(weights_before.values()),
        bytes_after=_total_bytes(weights_after.values()),
    )


def _compare(
    before: Mapping[str, T], after: Mapping[str, T], change: Callable[[str, T, T], Change | None]
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[Change, ...]]:
    """The names that were removed, those that were added, and what changed under the names that stayed."""
    changes = (change(name, before[name], after[name]) for name in before if name in after)
    return (
        tuple(name for name in before if name not in after),
        tuple(name for name in after if name not in before),
        tuple(found for found in changes if found is not None),
    )


def _nodes(model: ir.Model) -> dict[str, ir.Node]:
    """Every node by its name, or by its first output's name where it has none of its own or shares it."""
    result: dict[str, ir.Node] = {}
    for node in all_nodes(model):
        name = node.name or ""
        if not name or name in result:
            name = next((f"→{output.name}" for output in node.outputs if output.name), f"#{len(result)}")
        result[name if name not in result else f"{name}#{len(result)}"] = node
    return result


def _weights(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    return {
        name: value.const_value
        for graph in all_graphs(model)
        for name, value in graph.initializers.items()
        if value.const_value is not None
    }


def _total_bytes(tensors: Iterable[ir.TensorProtocol]) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor.dtype != ir.DataType.STRING)


def _op_changes(before: ir.Model, after: ir.Model) -> dict[str, int]:
    counts = Counter(_op(node) for node in all_nodes(after))
    counts.subtract(Counter(_op(node) for node in all_nodes(before)))
    return {op: count for op, count in sorted(counts.items()) if count}


def _op(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _node_change(name: str, before: ir.Node, after: ir.Node) -> Change | None:
    if _node_key(before) == _node_key(after):
        return None
    return Change(name, format_node(before), format_node(after))


def _node_key(node: ir.Node) -> tuple[object, ...]:
    """What makes a node what it is; inferred types and metadata do not."""
    operands = tuple(None if value is None else value.name for value in node.inputs)
    results = tuple(value.name for value in node.outputs)
    attributes = tuple(sorted((name, _attribute_key(a)) for name, a in node.attributes.items()))
    return node.domain, node.op_type, node.overload, operands, results, attributes


def _attribute_key(attribute: ir.Attr) -> str:
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
    if attribute.type == ir.AttributeType.TENSOR:
        return _content_hash(attribute.value)
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return "graph"  # the nodes inside are compared by themselves
    return f"{attribute.type.name} {attribute.value}"


def _weight_change(
    name: str, before: ir.TensorProtocol, after: ir.TensorProtocol, check_content: bool
) -> Change | None:
    if before is after:
        return None
    texts = [f"{tensor.dtype.name}[{','.join(map(str, tensor.shape))}]" for tensor in (before, after)]
    if texts[0] == texts[1]:
        if not check_content:
            return None
        hashes = [_content_hash(tensor)[:12] for tensor in (before, after)]
        if hashes[0] == hashes[1]:
            return None
        texts = [f"{text} {digest}" for text, digest in zip(texts, hashes, strict=True)]
        texts[1] += _distance(before, after)
    return Change(f"weight {name}", *texts)


def _distance(before: ir.TensorProtocol, after: ir.TensorProtocol) -> str:
    """How far two tensors of one dtype and shape are apart, in words; nothing for strings."""
    if before.dtype == ir.DataType.STRING:
        return ""
    old, new = (tensor.numpy().reshape(-1) for tensor in (before, after))
    largest, scale, count = 0.0, 0.0, 0
    for start in range(0, old.size, _AT_ONCE):
        a, b = (array[start : start + _AT_ONCE].astype(np.float64) for array in (old, new))
        distance = np.abs(a - b)
        largest, scale = max(largest, float(distance.max())), max(scale, float(np.abs(a).max()))
        count += int(np.count_nonzero(distance))
    release(before)
    release(after)
    share = f" ({largest / scale:.2g} of the largest)" if scale else ""
    return f", {count} of {old.size} elements by at most {largest:.3g}{share}"


def _content_hash(tensor: ir.TensorProtocol) -> str:
    digest = hashlib.sha256(f"{tensor.dtype.name} {list(tensor.shape)} ".encode())
    if tensor.dtype == ir.DataType.STRING:
        digest.update(repr(tensor.numpy().tolist()).encode())
    else:
        digest.update(tensor.tobytes())
        release(tensor)
    return digest.hexdigest()


def _interface_changes(before: ir.Model, after: ir.Model) -> tuple[Change, ...]:
    changes: list[Change] = []
    for kind, old, new in (
        ("input", before.graph.inputs, after.graph.inputs),
        ("output", before.graph.outputs, after.graph.outputs),
    ):
        texts_before = {value.name or "": format_value(value) for value in old}
        texts_after = {value.name or "": format_value(value) for value in new}
        for name in dict.fromkeys((*texts_before, *texts_after)):
            a, b = texts_before.get(name, "—"), texts_after.get(name, "—")
            if a != b:
                changes.append(Change(f"{kind} {name}", a, b))
    return tuple(changes)


def _listed(sign: str, entries: Sequence[str]) -> list[str]:
    lines = [f"{sign} {entry}" for entry in entries[:_MOST_LISTED]]
    if len(entries) > _MOST_LISTED:
        lines.append(f"{sign} … {len(entries) - _MOST_LISTED} more")
    return lines


def _changes(changes: Sequence[Change]) -> list[str]:
    lines: list[str] = []
    for change in changes[:_MOST_LISTED]:
        lines += [f"~ {change.name}", f"    {change.before}", f"    {change.after}"]
    if len(changes) > _MOST_LISTED:
        lines.append(f"~ … {len(changes) - _MOST_LISTED} more")
    return lines
