"""Anonymous weights are named after the module that they came from.

    MatMul(x, onnx::MatMul_123) of module model.layers.0.mlp.up_proj
    → MatMul(x, model.layers.0.mlp.up_proj.weight)

A name is anonymous if it has no dot and is not a parameter name of a root module (``weight``, ``bias``):
exporters write ``val_84``, ``onnx::MatMul_123``, ``mul_7``. Anonymous weights whose node tells no module keep
their names; so do all weights with dotted names.
"""

from __future__ import annotations

import onnx_ir as ir

from .graph_edits import free_name
from .module_paths import module_path, parameters

ROOT_PARAMETERS = ("weight", "bias", "running_mean", "running_var")


def name_weights(model: ir.Model) -> dict[str, int]:
    """Name the anonymous parameters of the main graph; the first module that reads one gives the name."""
    graph = model.graph
    named = 0
    for node, index, role in list(parameters(graph)):
        value = node.inputs[index]
        assert value is not None
        path = module_path(node)
        if path is None or not is_anonymous(value) or value.graph is not graph or value.is_graph_output():
            continue
        value.name = free_name(graph, f"{path}.{role}" if path else role)
        named += 1
    return {"weights-named": named}


def is_anonymous(value: ir.Value) -> bool:
    """Whether the name was made up by an exporter."""
    name = value.name or ""
    return "." not in name and not name.endswith(ROOT_PARAMETERS)
