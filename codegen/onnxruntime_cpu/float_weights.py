"""Weights that onnxruntime turns into floats once, when it loads the model; the file keeps few bits.

    weight[K, N] = (Cast(W) − Cast(zero_point)) · scale,  blocks of rows by Reshape

onnxruntime folds such an expression of constants, but not ``DequantizeLinear``, which it keeps for the sake
of its integer kernels. So this is ``DequantizeLinear`` spelt out, in float32.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .graph_builder import GraphBuilder

FLOAT_KERNEL = "MatMul of weights dequantised at load"
_FLOAT = ir.DataType.FLOAT


def emit_dequantized(
    build: GraphBuilder,
    weight: ir.Value,
    scale: ir.Value,
    zero_point: ir.Value | None,
    *,
    shape: tuple[int, int],
    block_size: int,
    dtype: ir.DataType,
) -> ir.Value:
    """The weight [K, N] in ``dtype``; scales and zero points are [K / block_size, N], or [N] if that is 0."""
    rows, columns = shape
    blocks = rows // block_size if block_size else 1

    def in_blocks(value: ir.Value, suffix: str, length: int) -> ir.Value:
        as_float = emit_cast(build, value, _FLOAT)
        if not block_size:
            return as_float
        sizes = build.constant(np.array([blocks, length, columns], np.int64), suffix)
        return build.op("Reshape", as_float, sizes)

    values = in_blocks(weight, "block_shape", rows // blocks)
    if zero_point is not None:
        values = build.op("Sub", values, in_blocks(zero_point, "zero_point_shape", 1))
    scaled = build.op("Mul", values, in_blocks(scale, "scale_shape", 1))
    if block_size:
        scaled = build.op("Reshape", scaled, build.constant(np.array(shape, np.int64), "weight_shape"))
    scaled.dtype = _FLOAT
    return emit_cast(build, scaled, dtype)


def emit_cast(build: GraphBuilder, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """``value`` in ``dtype``; itself where that is known to be its type."""
    if value.dtype == dtype:
        return value
    result = build.op("Cast", value, to=int(dtype))
    result.dtype = dtype
    return result


def emit_product(build: GraphBuilder, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
    """x · weight (+ bias)."""
    product = build.op("MatMul", x, weight)
    return product if bias is None else build.op("Add", product, bias)
