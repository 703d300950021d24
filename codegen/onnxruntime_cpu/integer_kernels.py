"""Kernels that multiply integers: weights per output channel, activations on a grid of 8 bits or fewer.

Weights in 4-bit containers are the same integers in int8: the cast is folded when the model is loaded.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...ir.graph_builder import CONTRIB, GraphBuilder
from ..linear_op import LinearOp, constant_of
from .token_grid import emit_integers, emit_scale, middle

_SIGN_OFFSET = 128
"""What is added to int8 to store it as uint8."""


def emit_dynamic(build: GraphBuilder, op: LinearOp) -> ir.Value:
    """One node for all of it."""
    return _dynamic(build, op, op.weight, op.zero_point)


def emit_dynamic_unsigned(build: GraphBuilder, op: LinearOp) -> ir.Value:
    """The same of unsigned weights."""
    return _dynamic(build, op, *_unsigned(build, op))


def _dynamic(build: GraphBuilder, op: LinearOp, weight: ir.Value, zero_point: ir.Value | None) -> ir.Value:
    return build.op("DynamicQuantizeMatMul", op.x, weight, op.scale, zero_point, op.bias, domain=CONTRIB)


def emit_integer_to_float(build: GraphBuilder, op: LinearOp) -> ir.Value:
    """One grid per tensor, then the product."""
    quantized = build.op("DynamicQuantizeLinear", op.x, outputs=3)
    _, x_scale, x_zero_point = build.nodes[-1].outputs
    return build.op(
        "MatMulIntegerToFloat",
        quantized,
        op.weight,
        x_scale,
        op.scale,
        x_zero_point,
        op.zero_point,
        op.bias,
        domain=CONTRIB,
    )


def emit_static(build: GraphBuilder, op: LinearOp) -> ir.Value:
    """The fixed grid, then the product."""
    return _static(build, op, *_widened(build, op))


def emit_static_unsigned(build: GraphBuilder, op: LinearOp) -> ir.Value:
    """The same of unsigned weights."""
    return _static(build, op, *_unsigned(build, op))


def _static(build: GraphBuilder, op: LinearOp, weight: ir.Value, zero_point: ir.Value | None) -> ir.Value:
    x_scale, x_zero_point = op.static_grid()
    if op.spec.activations_signed:
        # Signed times unsigned has no kernel; the same grid in uint8 has one for all weights.
        shifted = constant_of(x_zero_point).numpy().astype(np.int16) + _SIGN_OFFSET
        x_zero_point = build.constant(shifted.astype(np.uint8), "x_zero_point_unsigned")
    quantized = build.op("QuantizeLinear", op.x, x_scale, x_zero_point)
    return build.op(
        "MatMulIntegerToFloat",
        quantized,
        weight,
        x_scale,
        op.scale,
        x_zero_point,
        zero_point,
        op.bias,
        domain=CONTRIB,
    )


def emit_token(build: GraphBuilder, op: LinearOp) -> ir.Value:
    """The steps of the body up to the integers, then the product."""
    return _token_product(build, op, *_widened(build, op))


def emit_token_unsigned(build: GraphBuilder, op: LinearOp) -> ir.Value:
    """The same of unsigned weights."""
    return _token_product(build, op, *_unsigned(build, op))


def emit_token_by_rows(build: GraphBuilder, op: LinearOp) -> ir.Value:
    """Tokens as the rows of a matrix, which one QuantizeLinear turns into integers, then the product."""
    return _product_of_rows(build, op, *_widened(build, op))


def emit_token_by_rows_unsigned(build: GraphBuilder, op: LinearOp) -> ir.Value:
    """The same of unsigned weights."""
    return _product_of_rows(build, op, *_unsigned(build, op))


def quantizes_by_rows(op: LinearOp) -> bool:
    """Whether QuantizeLinear clamps where the op's grid does: at 8 bits, or if nothing exceeds the grid."""
    return op.spec.activation_bits == 8 or op.spec.activation_clip == 1


def _product_of_rows(
    build: GraphBuilder, op: LinearOp, weight: ir.Value, zero_point: ir.Value | None
) -> ir.Value:
    tokens = build.constant(np.array([-1, op.spec.in_features], np.int64), "tokens")
    last_axis = build.constant(np.array([-1], np.int64), "last_axis")
    rows = build.op("Reshape", op.x, tokens)
    highest = build.op("ReduceMax", rows, last_axis, keepdims=0)
    lowest = build.op("ReduceMin", rows, last_axis, keepdims=0)
    x_scale = emit_scale(build, op.spec, build.op("Max", highest, build.op("Neg", lowest)))
    zero_point_of_all = build.constant(np.array([middle(op.spec)], np.uint8), "middle")
    zero_points = build.op("Expand", zero_point_of_all, build.op("Shape", x_scale))
    quantized = build.op("QuantizeLinear", rows, x_scale, zero_points, axis=0)
    product = _unscaled_product(build, op, quantized, weight, zero_point)
    result = build.op("Mul", product, build.op("Unsqueeze", x_scale, last_axis))
    if op.bias is not None:
        result = build.op("Add", result, op.bias)
    leading = build.op("Shape", op.x, start=0, end=-1)
    columns = build.constant(np.array([op.spec.out_features], np.int64), "columns")
    return build.op("Reshape", result, build.op("Concat", leading, columns, axis=0))


def _token_product(
    build: GraphBuilder, op: LinearOp, weight: ir.Value, zero_point: ir.Value | None
) -> ir.Value:
    rounded, x_scale = emit_integers(build, op)
    shifted = build.op("Add", rounded, build.constant(np.array(middle(op.spec), np.float32), "middle"))
    quantized = build.op("Cast", shifted, to=int(ir.DataType.UINT8))
    result = build.op("Mul", _unscaled_product(build, op, quantized, weight, zero_point), x_scale)
    return result if op.bias is None else build.op("Add", result, op.bias)


def _unscaled_product(
    build: GraphBuilder, op: LinearOp, quantized: ir.Value, weight: ir.Value, zero_point: ir.Value | None
) -> ir.Value:
    """One kernel multiplies, converts and scales columns; tokens are yet to be scaled."""
    return build.op(
        "MatMulIntegerToFloat",
        quantized,
        weight,
        build.constant(np.array(1, np.float32), "one"),
        op.scale,
        build.constant(np.array(middle(op.spec), np.uint8), "x_zero_point"),
        zero_point,
        domain=CONTRIB,
    )


def _widened(build: GraphBuilder, op: LinearOp) -> tuple[ir.Value, ir.Value | None]:
    """Weight and zero points in 8 bits."""
    weight, zero_point = op.weight, op.zero_point
    if _is_4_bit(weight):
        weight = build.op("Cast", weight, to=int(ir.DataType.INT8))
    if zero_point is not None and _is_4_bit(zero_point):
        zero_point = build.op("Cast", zero_point, to=int(ir.DataType.INT8))
    return weight, zero_point


def _is_4_bit(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.INT4, ir.DataType.UINT4)


def _unsigned(build: GraphBuilder, op: LinearOp) -> tuple[ir.Value, ir.Value]:
    """The same weights as uint8: 128 more, with a zero point that is 128 more."""
    zero_points = op.zero_points()
    if zero_points is None:
        zero_points = np.zeros(op.spec.out_features, np.int16)
    return (
        build.constant((op.integers() + _SIGN_OFFSET).astype(np.uint8), "weight_unsigned"),
        build.constant((zero_points + _SIGN_OFFSET).astype(np.uint8), "zero_point_unsigned"),
    )
