"""The graph of dimensions, and which indices along which axes go together.

Nodes are dimensions, (value or initializer name, axis); edges are the relations that the ops' rules give. An
index along an axis is an *element*. Elements that go together are found in two steps, because most relations
say only "the same index": axes related in this way are one axis, and on those few that remain the connected
components of elements are found by scipy. It takes time linear in the elements, and about one element per
channel of the model.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import networkx
import numpy as np
import onnx_ir as ir
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ..errors import ModelError
from ..walk import subgraphs_of
from .facts import Dimension, Fact, Pin, Relation, Use, label, pin_all
from .groups import Indices
from .rules import facts

_LONGEST_AXIS = 2**26
"""Elements: far above vocabularies and pixels, and what memory is enough for."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dimensions:
    """All related axes of a model.

    Attributes:
        graph: a node per axis with its ``size``, the ``roles`` it has as a weight, and the ``pins`` that hold
            it; an edge per relation, with its ``relation``.
        labels: the component of every element.
        starts: where the labels of an axis start; axes whose indices are the same share them.
    """

    graph: networkx.MultiGraph
    labels: Indices
    starts: dict[Dimension, int]

    def labels_of(self, dimension: Dimension) -> Indices:
        """The component of every index along an axis; elements with the same one go together."""
        start = self.starts[dimension]
        return self.labels[start : start + self.graph.nodes[dimension]["size"]]


def relate(model: ir.Model) -> Dimensions:
    """The dimensions of the model's graph.

    Raises:
        ModelError: its axes are longer than those of any model.
    """
    graph = _graph(model)
    sizes = {dimension: graph.nodes[dimension]["size"] for dimension in graph}
    longest = max(sizes, key=sizes.__getitem__, default=None)
    if longest is not None and sizes[longest] > _LONGEST_AXIS:
        name, axis = longest
        raise ModelError(
            f"'{name}' has {sizes[longest]} elements along axis {axis}, and no axis can have so many",
            hint="the file is damaged: export the model again",
        )
    labels, starts = _components(graph)
    return Dimensions(graph, labels, starts)


def _graph(model: ir.Model) -> networkx.MultiGraph:
    sizes = {
        (value.name or "", axis): size
        for value in _values(model.graph)
        for axis, size in enumerate(value.shape or ())
        if isinstance(size, int) and size > 1
    }
    graph = networkx.MultiGraph()
    for fact in _facts(model.graph):
        dimensions = (fact.first, fact.second) if isinstance(fact, Relation) else (fact.dimension,)
        for dimension in dimensions:
            if dimension not in graph:
                graph.add_node(dimension, order=len(graph), size=sizes[dimension], roles=[], pins=[])
        if isinstance(fact, Relation):
            graph.add_edge(fact.first, fact.second, relation=fact)
        elif isinstance(fact, Pin):
            graph.nodes[fact.dimension]["pins"].append(fact)
        elif fact.role not in graph.nodes[fact.dimension]["roles"]:
            graph.nodes[fact.dimension]["roles"].append(fact.role)
    return graph


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _facts(graph: ir.Graph) -> Iterator[Fact]:
    caches = _caches(graph)
    yield from _pin_ends([value for value in graph.inputs if value not in caches], "an input")
    nodes = list(graph)
    per_node = [[*facts(node), *_captured(node, graph)] for node in nodes]
    yield from itertools.chain.from_iterable(per_node)
    yield from _uses_through_transposes(nodes, per_node)
    yield from _pin_ends([value for value in graph.outputs if value not in caches], "an output")


def _pin_ends(values: list[ir.Value], what: str) -> Iterator[Fact]:
    for value in values:
        yield from pin_all([value], f"'{value.name}' is {what} of the model")


def _captured(node: ir.Node, graph: ir.Graph) -> Iterator[Fact]:
    """Values that the bodies of If, Loop and Scan read from outside stay."""
    for body in subgraphs_of(node):
        for inner in (body, *body.subgraphs()):
            for reader in inner:
                outer = [value for value in reader.inputs if value is not None and value.graph is graph]
                for pin in pin_all(outer, f"the body of {label(node)} reads it"):
                    yield dataclasses.replace(pin, unknown_op=True)


def _caches(graph: ir.Graph) -> set[ir.Value]:
    """Key-value caches that go into attentions and come out: their heads may go with the model's."""
    found: set[ir.Value] = set()
    for node in graph:
        if node.op_type == "Attention" and node.domain == "":
            inputs = [value for value in node.inputs[4:6] if value is not None and value.is_graph_input()]
            outputs = [value for value in node.outputs[1:3] if value.is_graph_output()]
            found.update(inputs, outputs)
    return found


def _uses_through_transposes(nodes: list[ir.Node], per_node: list[list[Fact]]) -> Iterator[Fact]:
    """A weight that is transposed before it is read, such as a tied embedding, is used by its reader."""
    roles: dict[Dimension, list[Use]] = {}
    for found in per_node:
        for fact in found:
            if isinstance(fact, Use):
                roles.setdefault(fact.dimension, []).append(fact)
    for node, found in zip(reversed(nodes), reversed(per_node), strict=True):
        source = node.inputs[0] if node.inputs else None
        if node.op_type not in ("Transpose", "Cast", "Identity") or source is None:
            continue
        if not source.is_initializer():
            continue
        for fact in found:
            if isinstance(fact, Relation):
                for passed in roles.get(fact.second, ()):
                    yield Use(fact.first, passed.role)


def _components(graph: networkx.MultiGraph) -> tuple[Indices, dict[Dimension, int]]:
    dimensions = list(graph)
    position = {dimension: index for index, dimension in enumerate(dimensions)}
    relations: list[Relation] = [relation for _, _, relation in graph.edges(data="relation")]
    equal = [relation for relation in relations if relation.indices is None]
    axes = _connected(
        len(dimensions),
        np.array([position[relation.first] for relation in equal], np.int64),
        np.array([position[relation.second] for relation in equal], np.int64),
    )
    sizes = np.zeros(axes.max(initial=-1) + 1, np.int64)
    sizes[axes] = [graph.nodes[dimension]["size"] for dimension in dimensions]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    starts = {dimension: int(offsets[axes[position[dimension]]]) for dimension in dimensions}
    first, second = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for relation in relations:
        if relation.indices is not None:
            first.append(starts[relation.first] + relation.indices[0])
            second.append(starts[relation.second] + relation.indices[1])
    return _connected(int(offsets[-1]), np.concatenate(first), np.concatenate(second)), starts


def _connected(count: int, first: Indices, second: Indices) -> Indices:
    """The component of each of ``count`` things, of which pairs are connected."""
    if not count:
        return np.empty(0, np.int64)
    edges = coo_array((np.ones(len(first), np.bool_), (first, second)), shape=(count, count))
    return np.asarray(connected_components(edges, directed=False)[1], np.int64)
