"""Putting quantised linears of a checkpoint into a traced graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from .. import ops
from ..graph_builder import GraphBuilder
from ..ops.definition import OpDefinition
from ..views import Linear
from .stored_linear import Activations, StoredLinear


class Placement:
    """Replaces linears of one model, and shares the permutations of their inputs.

    Args:
        model: changed in place.
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._permuted: dict[tuple[ir.Value, bytes], ir.Value] = {}

    def replace(self, linear: Linear, stored: StoredLinear) -> None:
        """Replace ``MatMul(x, W)`` and its bias by the op that says what ``stored`` is."""
        x = self._input(linear, stored)
        build = GraphBuilder(linear.name)
        _emit(build, linear, stored, x)
        self._register(build)
        last = linear.bias_node or linear.node
        ops.replace(last, build.nodes)
        if last is not linear.node and linear.node.graph is not None:
            linear.node.graph.remove(linear.node, safe=True)
            ops.drop_unused_initializer(linear.weight)

    def _input(self, linear: Linear, stored: StoredLinear) -> ir.Value:
        """The activations in the order of the weight's rows."""
        x = linear.input
        if stored.order is None:
            return x
        key = (x, stored.order.tobytes())
        if key not in self._permuted:
            build = GraphBuilder(f"{linear.name}.input")
            permuted = build.op("Gather", x, build.constant(stored.order, "order"), axis=-1)
            permuted.type, permuted.shape = x.type, x.shape
            self._register(build)
            self._model.graph.insert_before(linear.node, build.nodes)
            self._permuted[key] = permuted
        return self._permuted[key]

    def _register(self, build: GraphBuilder) -> None:
        for value in build.initializers:
            self._model.graph.register_initializer(value)
        for definition in build.definitions:
            ops.define(self._model, definition)


def _emit(build: GraphBuilder, linear: Linear, stored: StoredLinear, x: ir.Value) -> None:
    """The nodes of the layer; products of integers are in float32, whatever the model's type."""
    dtype = x.dtype or ir.DataType.FLOAT
    if stored.activations is None or dtype == ir.DataType.FLOAT:
        build.planish(*_op(build, stored, x, linear.bias, dtype))
        return
    wide = _cast(build, x, ir.DataType.FLOAT, "widen")
    product = build.planish(*_op(build, stored, wide, None, ir.DataType.FLOAT))
    narrow = _cast(build, product, dtype, "narrow")
    if linear.bias is not None:
        total = build.op("Add", narrow, linear.bias)
        total.dtype, total.shape = dtype, narrow.shape


def _cast(build: GraphBuilder, value: ir.Value, dtype: ir.DataType, label: str) -> ir.Value:
    result = build.op("Cast", value, to=int(dtype))
    build.nodes[-1].name = f"{build.layer}.{label}"
    result.dtype, result.shape = dtype, value.shape
    return result


def _op(
    build: GraphBuilder, stored: StoredLinear, x: ir.Value, bias: ir.Value | None, dtype: ir.DataType
) -> tuple[ir.Node, OpDefinition]:
    container = ops.container(stored.bits, signed=stored.integers.dtype == np.int8)
    weight = build.constant(stored.integers, "weight_quantized", container)
    scale = build.constant(stored.scale.astype(dtype.numpy()), "weight_scale")
    activations = stored.activations
    widened = activations is not None and activations.granularity == "token" and not stored.block_size
    zero_point = None
    if stored.zero_point is not None:
        zero_container = ir.DataType.INT8 if widened and container.bitwidth == 4 else container
        zero_point = build.constant(stored.zero_point, "weight_zero_point", zero_container)
    common: dict[str, Any] = {"bits": stored.bits, "name": build.layer}
    if activations is None:
        return ops.quantized_linear(
            x, weight, scale, zero_point, bias, block_size=stored.block_size, **common
        )
    if activations.granularity == "static":
        grid = _static_grid(build, activations)
        return ops.static_quantized_linear(x, weight, scale, *grid, zero_point, bias, **common)
    return ops.dynamic_quantized_linear(
        x,
        weight,
        scale,
        zero_point,
        bias,
        granularity="token",
        activation_bits=activations.bits,
        block_size=stored.block_size,
        **common,
    )


def _static_grid(build: GraphBuilder, activations: Activations) -> tuple[ir.Value, ir.Value]:
    return (
        build.constant(np.array(activations.scale, np.float32), "input_scale"),
        build.constant(np.array(activations.zero_point, np.int8), "input_zero_point"),
    )
