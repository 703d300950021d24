"""Putting one node in another's place."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir


def replace(old: ir.Node, new: ir.Node | Sequence[ir.Node]) -> None:
    """Put ``new``, one node or several in order, in the place of ``old``; the last one's outputs take over.

    Outputs keep their names, also where they are outputs of the graph. Types, shapes and metadata are taken
    over where the new node has none. ``old`` and the initializers that only it read are removed.
    """
    nodes = [new] if isinstance(new, ir.Node) else list(new)
    graph = old.graph
    if graph is None:
        raise ValueError(f"node {old.name!r} is in no graph")
    for node in nodes:
        for key, text in old.metadata_props.items():
            node.metadata_props.setdefault(key, text)
    graph.insert_before(old, nodes)
    for before, after in zip(old.outputs, nodes[-1].outputs, strict=True):
        after.name, before.name = before.name, None
        after.type = after.type or before.type
        after.shape = after.shape or before.shape
        ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    inputs = set(old.inputs)
    graph.remove(old, safe=True)
    for value in inputs:
        if value is not None:
            drop_unused_initializer(value)


def drop_unused_initializer(value: ir.Value) -> None:
    """Take ``value`` out of its graph's initializers if no node and no graph output reads it."""
    if (
        value.is_initializer()
        and not value.uses()
        and not value.is_graph_output()
        and value.graph is not None
    ):
        value.graph.initializers.pop(str(value.name))
