"""One linear layer: ``MatMul`` or ``Gemm``, with or without bias, becomes a quantised linear.

MatMul(x, W) + b   →   Q(x)                        Q: planish::QuantizedLinear, Dynamic… or Static…
                   →   Q(x) + (x · A) · B          with a low-rank residual, see `low_rank`
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...ir import ops
from ...ir.ops.definition import OpDefinition
from ...ir.views import Linear
from .activations import Activations
from .grid import Floats, QuantizedWeight
from .layer_plan import LOW_RANK_KEY, LayerPlan
from .weights import ERROR_KEY, add_tensor, float_dtype, read_weight

LowRank = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""A [K, r] and B [r, N]."""


def read_linear_weight(linear: Linear) -> Floats:
    """The layer's weight as float32 [K, N]."""
    weight = read_weight(linear.weight)
    return np.ascontiguousarray(weight.T) if linear.transposed else weight


def current_input(linear: Linear) -> ir.Value:
    """The input as it is now: the layer before this one may have been replaced since the view was made."""
    return linear.node.inputs[0] or linear.input


def replace_linear(
    model: ir.Model,
    plan: LayerPlan,
    quantized: QuantizedWeight,
    error: float,
    low_rank: LowRank | None = None,
) -> None:
    """Replace the layer in place.

    Args:
        model: holds the layer.
        plan: the layer and its grids; the grid of static activations has its scale by now.
        quantized: its weight.
        error: relative error of the weight, noted in the node's metadata.
        low_rank: A and B of a residual.
    """
    linear = plan.linear
    x = current_input(linear)
    nodes, definition = _Builder(model, plan, x).nodes(quantized)
    nodes[-1].metadata_props[ERROR_KEY] = f"{error:.3e}"
    if low_rank is not None:
        nodes += _low_rank_nodes(model, linear, x, nodes[-1].outputs[0], low_rank)
    last = linear.bias_node or linear.node
    ops.define(model, definition)
    ops.replace(last, nodes)
    if last is not linear.node and linear.node.graph is not None:
        linear.node.graph.remove(linear.node, safe=True)
        ops.drop_unused_initializer(linear.weight)


def _low_rank_nodes(
    model: ir.Model, linear: Linear, x: ir.Value, product: ir.Value, low_rank: LowRank
) -> list[ir.Node]:
    dtype = float_dtype(linear.weight)
    down, up = (
        add_tensor(model, matrix.astype(dtype.numpy()), f"{linear.name}.low_rank_{side}")
        for side, matrix in zip(("down", "up"), low_rank, strict=True)
    )
    name = linear.node.name
    narrow = ir.node("MatMul", [x, down], name=f"{name}.low_rank_down")
    wide = ir.node("MatMul", [narrow.outputs[0], up], name=f"{name}.low_rank_up")
    total = ir.node("Add", [product, wide.outputs[0]], name=f"{name}.low_rank_add")
    for node in (narrow, wide, total):
        node.metadata_props[LOW_RANK_KEY] = linear.name
        node.outputs[0].dtype = dtype
    wide.outputs[0].shape = total.outputs[0].shape = product.shape
    if x.shape is not None:
        narrow.outputs[0].shape = ir.Shape([*x.shape[:-1], low_rank[0].shape[1]])
    return [narrow, wide, total]


@dataclasses.dataclass(frozen=True)
class _Builder:
    """Makes the nodes that compute one layer, its output last."""

    model: ir.Model
    plan: LayerPlan
    x: ir.Value

    def nodes(self, quantized: QuantizedWeight) -> tuple[list[ir.Node], OpDefinition]:
        """Integer products run in float32, whatever the model's type."""
        linear, activations, grid = self.plan.linear, self.plan.activations, self.plan.grid
        if activations is None:
            weight, scale, zero_point = self._operands(quantized, quantized.scale)
            node, definition = ops.quantized_linear(
                self.x,
                weight,
                scale,
                zero_point,
                linear.bias,
                bits=grid.bits,
                block_size=grid.block_size,
                name=linear.node.name,
            )
            return [node], definition
        operands = self._operands(quantized, quantized.scale.astype(np.float32))
        if float_dtype(linear.weight) == ir.DataType.FLOAT:
            node, definition = self._integer_product(activations, self.x, operands, linear.bias)
            return [node], definition
        return self._widened(activations, operands)

    def _operands(
        self, quantized: QuantizedWeight, scales: npt.NDArray[np.floating]
    ) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        grid, name = self.plan.grid, self.plan.linear.name
        container = ops.container(grid.bits, signed=grid.symmetric)
        weight = add_tensor(self.model, quantized.integers, f"{name}.weight_quantized", container)
        scale = add_tensor(self.model, scales, f"{name}.weight_scale")
        if quantized.zero_point is None:
            return weight, scale, None
        # A 4-bit weight per channel is widened to int8 before an integer product: so are its zero points.
        return weight, scale, self._zero_points(quantized.zero_point, container)

    def _zero_points(self, values: npt.NDArray[np.integer], container: ir.DataType) -> ir.Value:
        activations, grid = self.plan.activations, self.plan.grid
        per_channel_product = activations is not None and not grid.block_size
        if per_channel_product and activations is not None and activations.granularity != "static":
            container = ir.DataType.UINT8 if container == ir.DataType.UINT8 else ir.DataType.INT8
        return add_tensor(self.model, values, f"{self.plan.linear.name}.weight_zero_point", container)

    def _integer_product(
        self,
        activations: Activations,
        x: ir.Value,
        operands: tuple[ir.Value, ir.Value, ir.Value | None],
        bias: ir.Value | None,
    ) -> tuple[ir.Node, OpDefinition]:
        weight, scale, zero_point = operands
        grid, name = self.plan.grid, self.plan.linear.node.name
        if activations.granularity != "static":
            return ops.dynamic_quantized_linear(
                x,
                weight,
                scale,
                zero_point,
                bias,
                bits=grid.bits,
                granularity=activations.granularity,
                activation_bits=activations.bits,
                activation_clip=activations.clip,
                block_size=grid.block_size,
                name=name,
            )
        layer = self.plan.linear.name
        step = np.array(activations.scale, np.float32)
        zero = np.array(activations.zero_point, np.uint8)
        return ops.static_quantized_linear(
            x,
            weight,
            scale,
            add_tensor(self.model, step, f"{layer}.input_scale"),
            add_tensor(self.model, zero, f"{layer}.input_zero_point"),
            zero_point,
            bias,
            bits=grid.bits,
            name=name,
        )

    def _widened(
        self, activations: Activations, operands: tuple[ir.Value, ir.Value, ir.Value | None]
    ) -> tuple[list[ir.Node], OpDefinition]:
        """Cast to float32, the integer product, Cast back, and the bias in the model's own type."""
        linear = self.plan.linear
        name, dtype = linear.node.name, float_dtype(linear.weight)
        widen = ir.node("Cast", [self.x], {"to": int(ir.DataType.FLOAT)}, name=f"{name}.widen")
        widen.outputs[0].dtype, widen.outputs[0].shape = ir.DataType.FLOAT, self.x.shape
        node, definition = self._integer_product(activations, widen.outputs[0], operands, None)
        narrow = ir.node("Cast", [node.outputs[0]], {"to": int(dtype)}, name=f"{name}.narrow")
        nodes = [widen, node, narrow]
        if linear.bias is not None:
            nodes.append(ir.node("Add", [narrow.outputs[0], linear.bias], name=f"{name}.bias"))
        for last in nodes[2:]:
            last.outputs[0].dtype, last.outputs[0].shape = dtype, node.outputs[0].shape
        return nodes, definition
