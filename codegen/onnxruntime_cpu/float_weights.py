"""Weights that onnxruntime turns into floats once, when it loads the model; the file keeps few bits.

onnxruntime keeps ``DequantizeLinear`` of constants for the sake of its integer kernels, and folds it only if
the session says that there are none to be made (`FOLD_AT_LOAD`). Cast and Mul would need no setting, but
each of them leaves a float copy of every weight in memory until all are folded.
"""

from __future__ import annotations

import onnx_ir as ir

from ...ir.graph_builder import GraphBuilder

FLOAT_KERNEL = "MatMul of weights dequantised at load"
CONV_KERNEL = "Conv of weights dequantised at load"
FOLD_AT_LOAD = {"session.disable_quant_qdq": "1"}
"""Holds for the whole session: a model that brings QDQ nodes of its own must do without."""


def emit_dequantized(
    build: GraphBuilder, weight: ir.Value, scale: ir.Value, zero_point: ir.Value | None, block_size: int
) -> ir.Value:
    """The weight [K, N] in the scale's dtype; scales are [K / block_size, N], or [N] if that is 0.

    Zero points may be in the wider container that 4-bit weights per channel are widened to.
    """
    axis = 0 if block_size else 1
    if zero_point is not None and zero_point.dtype != weight.dtype:
        weight = build.op("Cast", weight, to=int(zero_point.dtype or ir.DataType.INT8))
    return build.op("DequantizeLinear", weight, scale, zero_point, axis=axis, block_size=block_size)


def emit_product(build: GraphBuilder, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
    """x · weight (+ bias)."""
    product = build.op("MatMul", x, weight)
    return product if bias is None else build.op("Add", product, bias)
