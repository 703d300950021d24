"""Iterating over everything a model holds: its graph, its functions' graphs, and their subgraphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir


def root_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """The model's graph and the body of each model-local function: the graphs with no outer scope."""
    yield model.graph
    for function in model.functions.values():
        yield function.graph


def graphs(model: ir.Model) -> list[ir.Graph]:
    """The main graph and its subgraphs, outer ones first; function bodies are left out."""
    found = [model.graph]
    for graph in found:  # grows while it is walked
        for node in graph:
            found.extend(subgraphs_of(node))
    return found


def all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """Every graph of the model, outer graphs before their subgraphs (If, Loop, Scan bodies)."""
    for root in root_graphs(model):
        yield root
        yield from root.subgraphs()


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Every node of every graph, function bodies and subgraphs included."""
    for graph in all_graphs(model):
        yield from graph


def all_values(model: ir.Model) -> Iterator[ir.Value]:
    """Every value of every graph: inputs, initializers and node outputs; inputs may come twice."""
    for graph in all_graphs(model):
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def replace_tensors(model: ir.Model, replace: Callable[[ir.TensorProtocol], ir.TensorProtocol]) -> None:
    """Replace the tensor of every initializer and tensor attribute by what ``replace`` makes of it."""
    for graph in all_graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = replace(value.const_value)
        for node in graph:
            for name, attribute in node.attributes.items():
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    tensor = replace(attribute.value)
                    if tensor is not attribute.value:
                        node.attributes[name] = ir.AttrTensor(name, tensor, doc_string=attribute.doc_string)


def subgraphs_of(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs that ``node`` holds as attributes."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def values_read(node: ir.Node) -> Iterator[ir.Value]:
    """The values of its own graph that ``node`` reads, those that its subgraphs read included."""
    yield from (value for value in node.inputs if value is not None)
    for graph in subgraphs_of(node):
        for inner in graph.all_nodes():
            yield from (value for value in inner.inputs if value is not None and value.graph is node.graph)
