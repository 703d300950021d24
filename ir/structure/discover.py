"""Finding the structures: which channels, heads and branches of a model can go.

Elements (indices along axes) that the rules relate go together, or not at all. Those that no reason pins, and
that both come out of a weight and go into one, are structures; structures of the same make-up, one channel of
each of the same tensors, are a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import networkx
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..views import blocks
from .dimensions import Dimensions, relate
from .facts import Dimension, Pin
from .groups import ChannelGroup, GroupKind, Indices, Member, Role, Structure, Unprunable
from .modules import residual_modules
from .names import group_names, module_path

_PRODUCER_AND_CONSUMER = frozenset({"producer", "consumer"})


def discover(model: ir.Model) -> Structure:
    """Find what can be pruned from ``model``, which stays as it is.

    The model is in canonical form with shapes inferred; axes whose sizes are not known are left alone.
    """
    dimensions = relate(model)
    streams = _stream_dimensions(model)
    weights = {name for name, value in model.graph.initializers.items() if not value.is_graph_input()}
    found = [
        part
        for component in networkx.connected_components(dimensions.graph)
        for part in _of_component(dimensions, component, streams, weights)
    ]
    _note_nodes(model.graph, found)
    position = {node: index for index, node in enumerate(model.graph)}
    # The width of the residual stream comes last: it touches nearly everything.
    found.sort(key=lambda part: (part.is_stream, position[part.nodes[0]]))
    kinds = [_kind(part, model.graph) for part in found]
    names = group_names([part.members for part in found], kinds)
    named = list(zip(found, kinds, names, strict=True))
    groups = tuple(
        ChannelGroup(
            name=name,
            kind=kind,
            structures=len(part.labels),
            members=part.members,
            nodes=tuple(node.outputs[0].name or "" for node in part.nodes),
        )
        for part, kind, name in named
        if part.reason is None
    )
    held = [Unprunable(name, part.reason) for part, _, name in named if part.reason is not None]
    unprunable = held if named else _why_nothing(dimensions, weights)
    return Structure(groups, residual_modules(model, groups), tuple(unprunable), dimensions.graph)


@dataclasses.dataclass(frozen=True, eq=False)
class _Found:
    """Elements of the same make-up that go, or for a reason do not go, one by one."""

    labels: Indices
    dimensions: tuple[Dimension, ...]
    members: tuple[Member, ...]
    is_stream: bool
    reason: str | None
    nodes: list[ir.Node] = dataclasses.field(default_factory=list)


def _stream_dimensions(model: ir.Model) -> set[Dimension]:
    """The width of the residual stream, of token features."""
    streams = {value for block in blocks(model) for value in (block.input, block.output)}
    return {
        (value.name or "", len(value.shape) - 1)
        for value in streams
        if value.shape is not None and len(value.shape) in (2, 3)
    }


def _of_component(
    dimensions: Dimensions, component: set[Dimension], streams: set[Dimension], weights: set[str]
) -> Iterator[_Found]:
    nodes = dimensions.graph.nodes
    roles = {role for dimension in component if dimension[0] in weights for role in nodes[dimension]["roles"]}
    ends_here = any(pin.unknown_op for dimension in component for pin in nodes[dimension]["pins"])
    needed = {"producer"} if ends_here else _PRODUCER_AND_CONSUMER
    if not roles >= needed:
        return
    is_stream = not streams.isdisjoint(component)
    axes = _ordered(dimensions, component)
    labels, classes = _classes(dimensions, axes)
    pins = [
        (axis, pin) for axis in axes for pin in nodes[axis]["pins"] if not (is_stream and pin.unless_hidden)
    ]
    pinned = np.zeros(len(labels), np.bool_)
    for axis, _ in pins:
        pinned[np.searchsorted(labels, dimensions.labels_of(axis))] = True
    for chosen in _in_order_of_use(classes):
        for held in (False, True):
            part = labels[(classes == chosen) & (pinned == held)]
            if not len(part):
                continue
            members = tuple(_members(dimensions, axes, part, weights))
            if not {member.role for member in members} >= (needed if held else _PRODUCER_AND_CONSUMER):
                continue
            touched = tuple(axis for axis in axes if np.isin(dimensions.labels_of(axis), part).any())
            reason = _reason(dimensions, pins, part) if held else None
            if reason is None and len(part) == 1:
                reason = "all its channels belong together"
            yield _Found(part, touched, members, is_stream, reason)


def _ordered(dimensions: Dimensions, component: set[Dimension]) -> list[Dimension]:
    return sorted(component, key=lambda dimension: int(dimensions.graph.nodes[dimension]["order"]))


def _classes(dimensions: Dimensions, axes: Sequence[Dimension]) -> tuple[Indices, npt.NDArray[np.uint64]]:
    """The components of elements along these axes, and for each a number that says what it is made of.

    The number is a hash of how many elements it has along each axis. Components with equal numbers are alike.
    """
    starts = {dimensions.starts[axis]: axis for axis in axes}
    held = [dimensions.labels_of(axis) for axis in starts.values()]
    labels = np.unique(np.concatenate(held))
    keys = np.random.default_rng(0).integers(1 << 63, size=len(held), dtype=np.uint64)
    classes = np.zeros(len(labels), np.uint64)
    for key, along_axis in zip(keys, held, strict=True):
        counts = np.bincount(np.searchsorted(labels, along_axis), minlength=len(labels))
        classes += counts.astype(np.uint64) * key
    return labels, classes


def _in_order_of_use(classes: npt.NDArray[np.uint64]) -> list[np.uint64]:
    distinct, first = np.unique(classes, return_index=True)
    return list(distinct[np.argsort(first)])


def _members(
    dimensions: Dimensions, axes: Sequence[Dimension], labels: Indices, weights: set[str]
) -> Iterator[Member]:
    """The axes of weights that hold these components; structures in the order of the first such axis."""
    order: Indices | None = None
    for tensor, axis in axes:
        if tensor not in weights:
            continue
        along_axis = dimensions.labels_of((tensor, axis))
        belongs = np.flatnonzero(np.isin(along_axis, labels))
        if not len(belongs):
            continue
        if order is None:
            distinct, first = np.unique(along_axis[belongs], return_index=True)
            order = np.empty(len(labels), np.int64)
            order[np.searchsorted(labels, distinct[np.argsort(first)])] = np.arange(len(distinct))
        structure = order[np.searchsorted(labels, along_axis[belongs])]
        indices = belongs[np.argsort(structure, kind="stable")].reshape(len(labels), -1)
        roles: list[Role] = dimensions.graph.nodes[tensor, axis]["roles"] or ["passenger"]
        for role in roles:
            yield Member(tensor, axis, indices, role)


def _reason(dimensions: Dimensions, pins: Sequence[tuple[Dimension, Pin]], labels: Indices) -> str:
    return next(pin.reason for axis, pin in pins if np.isin(dimensions.labels_of(axis), labels).any())


def _why_nothing(dimensions: Dimensions, weights: set[str]) -> list[Unprunable]:
    """Where no channels lie between two weights: what holds the axes of the weights, each reason once."""
    reasons: dict[str, str] = {}
    for component in networkx.connected_components(dimensions.graph):
        axes = _ordered(dimensions, component)
        tensor = next((name for name, _ in axes if name in weights), None)
        for axis in axes if tensor is not None else ():
            for pin in dimensions.graph.nodes[axis]["pins"]:
                reasons.setdefault(pin.reason, module_path(tensor or ""))
    return [Unprunable(name, reason) for reason, name in reasons.items()]


def _note_nodes(graph: ir.Graph, found: Sequence[_Found]) -> None:
    """Note the nodes that read or make an axis of each part."""
    parts: dict[Dimension, list[_Found]] = {}
    for part in found:
        for axis in part.dimensions:
            parts.setdefault(axis, []).append(part)
    for node in graph:
        if node.op_type == "Shape":
            continue
        values = [value for value in (*node.inputs, *node.outputs) if value is not None]
        touched = {
            part: None
            for value in values
            for axis in range(0 if value.shape is None else len(value.shape))
            for part in parts.get((value.name or "", axis), ())
        }
        for part in touched:
            part.nodes.append(node)


def _kind(part: _Found, graph: ir.Graph) -> GroupKind:
    if part.is_stream:
        return "hidden"
    if any(node.op_type == "Attention" for node in part.nodes):
        return "attention"
    weights = [member.tensor for member in part.members if member.role != "passenger"]
    readers = {use.node.op_type for name in weights for use in graph.initializers[name].uses()}
    if "Conv" in readers:
        return "convolution"
    return "ffn" if readers <= {"MatMul", "Gemm"} else "other"
