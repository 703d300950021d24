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
from .layer_plan import LOW_RANK_KEY, LayerPlan
from .operands import WeightOperands, add_operands
from .quantized_weight import Floats, QuantizedWeight
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


def _node_name(linear: Linear) -> str:
    """The node's name or, where it has none, its layer's: names that are made of it must not collide."""
    return linear.node.name or linear.name


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
    if x.dtype is None:
        x.dtype = float_dtype(linear.weight)
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
    name = _node_name(linear)
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
        linear, activations = self.plan.linear, self.plan.activations
        if activations is None:
            operands = add_operands(self.model, quantized, linear.name)
            node, definition = ops.quantized_linear(
                self.x,
                operands.weight,
                operands.scale,
                operands.zero_point,
                linear.bias,
                bits=quantized.bits,
                block_size=self.plan.grid.block_size,
                codebook=operands.codebook,
                second_level=operands.second_level,
                outliers=operands.outliers,
                name=_node_name(linear),
            )
            return [node], definition
        operands = add_operands(
            self.model,
            quantized,
            linear.name,
            scale_dtype=np.dtype(np.float32),
            widened_zero_point=not self.plan.grid.block_size and activations.granularity != "static",
        )
        if float_dtype(linear.weight) == ir.DataType.FLOAT:
            node, definition = self._integer_product(activations, self.x, operands, linear.bias)
            return [node], definition
        return self._widened(activations, operands)

    def _integer_product(
        self, activations: Activations, x: ir.Value, operands: WeightOperands, bias: ir.Value | None
    ) -> tuple[ir.Node, OpDefinition]:
        grid, name = self.plan.grid, _node_name(self.plan.linear)
        if activations.granularity != "static":
            return ops.dynamic_quantized_linear(
                x,
                operands.weight,
                operands.scale,
                operands.zero_point,
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
            operands.weight,
            operands.scale,
            add_tensor(self.model, step, f"{layer}.input_scale"),
            add_tensor(self.model, zero, f"{layer}.input_zero_point"),
            operands.zero_point,
            bias,
            bits=grid.bits,
            name=name,
        )

    def _widened(
        self, activations: Activations, operands: WeightOperands
    ) -> tuple[list[ir.Node], OpDefinition]:
        """Cast to float32, the integer product, Cast back, and the bias in the model's own type."""
        linear = self.plan.linear
        name, dtype = _node_name(linear), float_dtype(linear.weight)
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
