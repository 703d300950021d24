"""Building nodes: of a kernel, alike for the model that is bound and the one that is timed, or of a pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from . import ops
from .derived import DerivedTensor
from .ops.definition import OpDefinition
from .spill import kept

CONTRIB = "com.microsoft"


class GraphBuilder:
    """Collects nodes, in order, and initializers named after the layer that they belong to."""

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self.definitions: list[OpDefinition] = []

    def constant(
        self, values: npt.NDArray[Any], suffix: str, container: ir.DataType | None = None
    ) -> ir.Value:
        """An initializer ``<layer>.<suffix>``; integers of 4 bits need their ``container``."""
        name = f"{self.layer}.{suffix}"
        if container is None:
            tensor: ir.TensorProtocol = ir.tensor(kept(np.asarray(values, order="C")), name=name)
        else:
            tensor = ops.integer_tensor(values, container, name)
        return self._initializer(tensor, name)

    def derived(
        self,
        read: Callable[[], npt.NDArray[Any]],
        sources: Sequence[ir.TensorProtocol],
        suffix: str,
        *,
        dtype: ir.DataType,
        shape: Sequence[int],
    ) -> ir.Value:
        """An initializer whose values are computed when they are read, see `planish.ir.derived`."""
        name = f"{self.layer}.{suffix}"
        tensor = DerivedTensor(
            lambda: ir.Tensor(read(), dtype=dtype, name=name), sources, dtype=dtype, shape=shape, name=name
        )
        return self._initializer(tensor, name)

    def _initializer(self, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        value = ir.val(name, shape=ir.Shape(tensor.shape.numpy()), dtype=tensor.dtype, const_value=tensor)
        self.initializers.append(value)
        return value

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        outputs: int = 1,
        **attributes: Any,
    ) -> ir.Value:
        """Append a node and return its first output; the others are at ``nodes[-1].outputs``."""
        used = len(inputs)
        while used and inputs[used - 1] is None:
            used -= 1
        name = f"{self.layer}.{op_type}.{len(self.nodes)}" if self.nodes else self.layer
        node = ir.node(op_type, inputs[:used], attributes, domain=domain, num_outputs=outputs, name=name)
        self.nodes.append(node)
        return node.outputs[0]

    def planish(self, node: ir.Node, definition: OpDefinition) -> ir.Value:
        """Append a planish op, to be replaced by its body, and return its output."""
        self.nodes.append(node)
        self.definitions.append(definition)
        return node.outputs[0]
