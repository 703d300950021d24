"""Dropping residual modules: ``x + f(x)`` becomes ``x``, and what only f needed disappears.

A dropped attention takes its key-value cache with it: ``past_key_values.i.*`` is no input any more and
``present.i.*`` no output. Where the length of that cache was asked for, to number positions, the cache of an
attention that stays is asked instead: all caches are equally long.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from ..errors import InputError
from .groups import ResidualModule
from .modules import unneeded_without
from .shrink import remove_unused_initializers


def drop(model: ir.Model, modules: Sequence[ResidualModule]) -> frozenset[str]:
    """Make the branches of these modules the identity on the residual stream, in place.

    Returns:
        Names of the graph outputs that are gone: caches.

    Raises:
        InputError: a module is not in the model, or the model needs the cache of a dropped attention.
    """
    graph = model.graph
    cut = [_branch(graph, module) for module in modules]
    unneeded = unneeded_without(cut)
    lost = _lost_caches(graph, unneeded)
    instead = {
        cache: _other_cache(graph, cache, unneeded, lost) for cache in lost if _is_read(cache, unneeded)
    }
    for cache, other in instead.items():
        cache.replace_all_uses_with(other)
    dropped_outputs = {value for node in unneeded for value in node.outputs if value.is_graph_output()}
    graph.outputs[:] = [value for value in graph.outputs if value not in dropped_outputs]
    for node, branch in cut:
        if node not in unneeded:
            _bypass(graph, node, branch)
    removed = unneeded.union(node for node, _ in cut)
    graph.remove(removed, safe=True)
    graph.inputs[:] = [value for value in graph.inputs if value not in lost]
    remove_unused_initializers(graph)
    return frozenset(str(value.name) for value in dropped_outputs)


def _branch(graph: ir.Graph, module: ResidualModule) -> tuple[ir.Node, ir.Value]:
    """The residual Add of the module, and which operand the branch is."""
    node = next((node for node in graph if node.outputs[0].name == module.output), None)
    operands = [] if node is None else [value for value in node.inputs if value is not None]
    by_name = {value.name: value for value in operands}
    if node is not None and node.op_type == "Add" and len(by_name) == 2:
        if module.branch in by_name:
            return node, by_name[module.branch]
        if module.input in by_name:  # a module inside this one has been dropped, and its output with it
            return node, next(value for value in operands if value.name != module.input)
    raise InputError(
        f"drop: no Add of '{module.branch}' makes '{module.output}' of module '{module.name}'",
        hint="discover the structure of this model; a module can be dropped once",
    )


def _lost_caches(graph: ir.Graph, unneeded: set[ir.Node]) -> list[ir.Value]:
    """The cache inputs that only attentions that go read as a cache."""
    attentions = [node for node in graph if node.op_type == "Attention" and node.domain == ""]
    lost: set[ir.Value] = set()
    for node in unneeded.intersection(attentions):
        lost.update(value for value in node.inputs[4:6] if value is not None and value.is_graph_input())
    for node in attentions:
        if node not in unneeded:
            lost.difference_update(value for value in node.inputs[4:6] if value is not None)
    return [value for value in graph.inputs if value in lost]


def _is_read(cache: ir.Value, unneeded: set[ir.Node]) -> bool:
    return any(use.node not in unneeded for use in cache.uses())


def _other_cache(
    graph: ir.Graph, cache: ir.Value, unneeded: set[ir.Node], lost: Sequence[ir.Value]
) -> ir.Value:
    """A cache that stays, to be asked for its length."""
    readers = [use.node for use in cache.uses() if use.node not in unneeded]
    other = next(
        (
            value
            for node in graph
            if node.op_type == "Attention" and node not in unneeded
            for value in node.inputs[4:6]
            if value is not None and value.is_graph_input() and value not in lost
        ),
        None,
    )
    wrong = next((node for node in readers if node.op_type != "Shape"), None)
    if wrong is not None or other is None:
        reader = wrong or readers[0]
        raise InputError(
            f"drop: {reader.op_type} '{reader.outputs[0].name}' reads '{cache.name}', the cache of a dropped "
            "attention, and no cache is left that could take its place",
            hint="keep one attention with a cache",
        )
    return other


def _bypass(graph: ir.Graph, node: ir.Node, branch: ir.Value) -> None:
    """Let the stream before the residual Add be read wherever the stream after it was."""
    stream = next(value for value in node.inputs if value is not None and value is not branch)
    output = node.outputs[0]
    if output.is_graph_output():
        # The model's output keeps its name, so something must still make it.
        identity = ir.node("Identity", [stream], name=node.name, metadata_props=dict(node.metadata_props))
        made = identity.outputs[0]
        made.shape, made.type, made.name = output.shape, output.type, output.name
        output.name = f"{output.name}.dropped"
        graph.insert_before(node, identity)
        output.replace_all_uses_with(made, replace_graph_outputs=True)
    else:
        output.replace_all_uses_with(stream)
