"""Nodes and initializers that no output depends on are removed; equal computations are done once.

    y₁ = f(x), y₂ = f(x) → y = f(x) used twice         (same op, inputs and attributes; not random ops)

Unused *outputs* of nodes stay, unlike in onnx_ir's pass: onnxruntime's Attention with a past must also write
the present. Common subexpressions are found within the main graph, by onnx_ir.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from ...ir.walk import graphs


def remove_dead_code(model: ir.Model) -> dict[str, int]:
    """Remove nodes and initializers that nothing depends on, inner graphs first."""
    removed = 0
    for graph in reversed(graphs(model)):
        dead: set[ir.Node] = set()
        for node in reversed(graph):
            if not any(_is_needed(value, dead) for value in node.outputs):
                dead.add(node)
        graph.remove(dead, safe=True)
        removed += len(dead)
        for name, value in list(graph.initializers.items()):
            if not _is_needed(value, set()) and not value.is_graph_input():
                del graph.initializers[name]
                removed += 1
    return {"dead-code-removed": removed}


def _is_needed(value: ir.Value, dead: set[ir.Node]) -> bool:
    return value.is_graph_output() or any(use.node not in dead for use in value.uses())


def merge_common_subexpressions(model: ir.Model) -> dict[str, int]:
    """Compute equal things once."""
    before = len(model.graph)
    common.CommonSubexpressionEliminationPass()(model)
    return {"common-subexpressions-merged": before - len(model.graph)}
