"""Nodes and initializers that no output depends on are removed; equal computations are done once.

    y₁ = f(x), y₂ = f(x) → y = f(x) used twice         (same op, inputs and attributes; not random ops)

Both are the passes of onnx_ir. Subgraphs are cleaned of dead nodes; common subexpressions are found within
the main graph.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from .graph_edits import graphs


def remove_dead_code(model: ir.Model) -> dict[str, int]:
    """Remove nodes and initializers that nothing depends on."""
    before = _size(model)
    common.RemoveUnusedNodesPass()(model)
    for graph in graphs(model)[1:]:
        for value in list(graph.initializers.values()):
            if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
                assert value.name is not None
                del graph.initializers[value.name]
    return {"dead-code-removed": before - _size(model)}


def merge_common_subexpressions(model: ir.Model) -> dict[str, int]:
    """Compute equal things once."""
    before = len(model.graph)
    common.CommonSubexpressionEliminationPass()(model)
    return {"common-subexpressions-merged": before - len(model.graph)}


def _size(model: ir.Model) -> int:
    return sum(len(graph) + len(graph.initializers) for graph in graphs(model))
