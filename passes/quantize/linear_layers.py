"""One linear layer: ``MatMul`` or ``Gemm``, with or without bias, becomes a quantised linear."""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_ir as ir

from ...ir import ops
from ...ir.ops.definition import OpDefinition
from ...ir.views import Linear
from .algorithms import Algorithm
from .grid import Grid, QuantizedWeight
from .scheme import Scheme
from .weights import ERROR_KEY, FLOATS, add_tensor, float_dtype, read_weight, relative_error


def reason_to_skip_linear(linear: Linear, scheme: Scheme) -> str | None:
    """Why ``linear`` cannot be quantised by ``scheme``; None if it can."""
    if linear.is_quantized:
        return "quantised already"
    weight = linear.weight
    if weight.const_value is None:
        return "its weight is not constant"
    if weight.dtype not in FLOATS:
        return f"its weight is {weight.dtype}"
    if len(weight.uses()) > 1:
        return "its weight is shared"
    if scheme.group_size > 0 and linear.in_features % scheme.group_size:
        return f"in_features % {scheme.group_size}"
    return None


def quantize_linear(
    model: ir.Model,
    linear: Linear,
    algorithm: Algorithm,
    grid: Grid,
    activations: Literal["tensor", "token"] | None,
) -> float:
    """Replace the layer in place; returns the relative error of its weight.

    Args:
        model: holds the layer.
        linear: what to replace.
        algorithm: chooses the integers.
        grid: they are chosen from.
        activations: what shares a grid at run time; None leaves activations in float.
    """
    weight = read_weight(linear.weight)
    if linear.transposed:
        weight = np.ascontiguousarray(weight.T)
    quantized = algorithm(weight, grid, None, lambda reason: None)
    error = relative_error(weight, quantized.dequantized())
    last = linear.bias_node or linear.node
    nodes, definition = _nodes(model, linear, quantized, grid, activations)
    nodes[-1].metadata_props[ERROR_KEY] = f"{error:.3e}"
    ops.define(model, definition)
    ops.replace(last, nodes)
    if last is not linear.node and linear.node.graph is not None:
        linear.node.graph.remove(linear.node, safe=True)
        ops.drop_unused_initializer(linear.weight)
    return error


def _nodes(
    model: ir.Model,
    linear: Linear,
    quantized: QuantizedWeight,
    grid: Grid,
    activations: Literal["tensor", "token"] | None,
) -> tuple[list[ir.Node], OpDefinition]:
    """The nodes that compute the layer, its output last; integer products run in float32."""
    dtype = float_dtype(linear.weight)
    widened = activations is not None and dtype != ir.DataType.FLOAT
    container = ops.container(grid.bits, signed=grid.symmetric)
    scales = quantized.scale.astype(np.float32) if widened else quantized.scale
    weight = add_tensor(model, quantized.integers, f"{linear.name}.weight_quantized", container)
    scale = add_tensor(model, scales, f"{linear.name}.weight_scale")
    zero_point = None
    if quantized.zero_point is not None:
        zero_point = add_tensor(model, quantized.zero_point, f"{linear.name}.weight_zero_point", container)
    name = linear.node.name
    if activations is None:
        node, definition = ops.quantized_linear(
            _current_input(linear),
            weight,
            scale,
            zero_point,
            linear.bias,
            bits=grid.bits,
            block_size=grid.block_size,
            name=name,
        )
        return [node], definition
    if not widened:
        node, definition = ops.dynamic_quantized_linear(
            _current_input(linear), weight, scale, zero_point, linear.bias, granularity=activations, name=name
        )
        return [node], definition
    return _widened(linear, weight, scale, zero_point, activations)


def _current_input(linear: Linear) -> ir.Value:
    """The input as it is now: the layer before this one may have been replaced since the view was made."""
    return linear.node.inputs[0] or linear.input


def _widened(
    linear: Linear,
    weight: ir.Value,
    scale: ir.Value,
    zero_point: ir.Value | None,
    activations: Literal["tensor", "token"],
) -> tuple[list[ir.Node], OpDefinition]:
    """Cast to float32, the integer product, Cast back, and the bias in the model's own type."""
    name, dtype, x = linear.node.name, float_dtype(linear.weight), _current_input(linear)
    widen = ir.node("Cast", [x], {"to": int(ir.DataType.FLOAT)}, name=f"{name}.widen")
    widen.outputs[0].dtype, widen.outputs[0].shape = ir.DataType.FLOAT, x.shape
    node, definition = ops.dynamic_quantized_linear(
        widen.outputs[0], weight, scale, zero_point, granularity=activations, name=name
    )
    narrow = ir.node("Cast", [node.outputs[0]], {"to": int(dtype)}, name=f"{name}.narrow")
    nodes = [widen, node, narrow]
    if linear.bias is not None:
        nodes.append(ir.node("Add", [narrow.outputs[0], linear.bias], name=f"{name}.bias"))
    for last in nodes[2:]:
        last.outputs[0].dtype, last.outputs[0].shape = dtype, node.outputs[0].shape
    return nodes, definition
