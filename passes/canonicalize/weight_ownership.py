"""Each layer owns its weight: initializers that an exporter merged are separated again.

    Norm₁(x, w), Norm₂(y, w) → Norm₁(x, norm1.weight), Norm₂(y, norm2.weight)        no data is copied

Exporters and optimisers merge initializers with equal contents, and what they find equal in practice is what
was initialised to a constant and never or hardly trained: norm weights of all ones, biases of all zeros. So a
shared initializer is separated if all its elements are equal and different modules read it. A shared
initializer with varied contents is a tie of the model's making (two trained weights are never equal by
accident): it stays one, and its metadata ``planish.tied`` lists the modules. Several uses by one module (a
module that is called twice, such as ALBERT's layer) are no ties and are left as they are.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...ir.rearranged import alias
from .graph_edits import add_initializer, constant_tensor
from .module_paths import module_path, parameters

TIED = "planish.tied"
"""Metadata of an initializer that several modules share on purpose."""

_PROBE = 1024
"""Elements looked at before all of a large tensor."""

Use = tuple[ir.Node, int, str]


def separate_weights(model: ir.Model) -> dict[str, int]:
    """Give every module its own initializer where sharing is an artefact."""
    uses: dict[ir.Value, list[Use]] = {}
    for node, index, role in parameters(model.graph):
        value = node.inputs[index]
        assert value is not None
        uses.setdefault(value, []).append((node, index, role))
    separated = 0
    for value, readers in uses.items():
        owners = _by_module(readers)
        tensor = constant_tensor(value)
        if len(owners) < 2 or tensor is None or value.graph is not model.graph or value.is_graph_output():
            continue
        if _all_elements_equal(tensor):
            separated += _separate(model.graph, value, tensor, owners)
        else:
            value.metadata_props[TIED] = ", ".join(path for path in owners if path)
    return {"weights-separated": separated}


def _by_module(readers: list[Use]) -> dict[str, list[Use]]:
    """The uses by module; a node that does not tell its module counts as one of its own."""
    owners: dict[str, list[Use]] = {}
    for use in readers:
        path = module_path(use[0])
        owners.setdefault(f"node {use[0].name}" if path is None else path, []).append(use)
    return owners


def _all_elements_equal(tensor: ir.TensorProtocol) -> bool:
    if tensor.dtype == ir.DataType.STRING or tensor.size == 0:
        return False
    elements = tensor.numpy().reshape(-1)
    return bool(np.all(elements[:_PROBE] == elements[0]) and np.all(elements == elements[0]))


def _separate(
    graph: ir.Graph, value: ir.Value, tensor: ir.TensorProtocol, owners: dict[str, list[Use]]
) -> int:
    """All owners but one, the one that the initializer is named after or the first, get an alias."""
    assert value.name is not None
    keeper = next((path for path in owners if value.name.startswith(f"{path}.")), next(iter(owners)))
    count = 0
    for path, readers in owners.items():
        if path == keeper:
            continue
        own: dict[str, ir.Value] = {}
        for node, index, role in readers:
            if role not in own:
                name = value.name if path.startswith("node ") else f"{path}.{role}" if path else role
                own[role] = add_initializer(graph, alias(tensor, name), name)
                count += 1
            node.replace_input_with(index, own[role])
    return count
