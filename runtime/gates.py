"""Gates on the branches of the residual stream: one session runs every combination of dropped modules.

x + f(x)   →   x + g · f(x)        g [1], 1 or 0: x + 0 · f(x) is x exactly
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from ..ir.structure import ResidualModule


def add_gates(graph: ir.Graph, modules: Iterable[ResidualModule]) -> dict[str, str]:
    """Multiply the branches of modules by gates that are 1, in place.

    Returns:
        The names of the gates, which are initializers [1], by the modules' names. A module whose branch is
        not added to the stream where it says has none.
    """
    adds = {node.outputs[0].name: node for node in graph if node.op_type == "Add"}
    names: dict[str, str] = {}
    for module in modules:
        add = adds.get(module.output)
        operands = () if add is None else add.inputs
        branch = next((value for value in operands if value and value.name == module.branch), None)
        if add is None or branch is None or branch.dtype is None:
            continue
        name = names[module.name] = f"planish.gate.{module.name}"
        one = ir.tensor(np.ones(1, branch.dtype.numpy()), name=name)
        gate = ir.Value(name=name, shape=ir.Shape([1]), type=ir.TensorType(one.dtype), const_value=one)
        graph.register_initializer(gate)
        product = ir.node("Mul", [branch, gate], name=name)
        gated = product.outputs[0]
        gated.name, gated.type, gated.shape = f"{name}.branch", branch.type, branch.shape
        graph.insert_before(add, product)
        add.replace_input_with(add.inputs.index(branch), gated)
    return names
