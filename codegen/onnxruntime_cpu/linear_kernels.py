"""The kernels that onnxruntime's CPU provider has for a quantised linear.

Each is a function of the op that says whether it applies, and one that emits its nodes. All compute the op's
body exactly, up to floating-point rounding, unless said otherwise here:

- ``MatMulNBits accuracy 4`` quantises activations to int8 in blocks (relative error about 5e-3);
- a float matrix product leaves out the activations' quantisation that a dynamic op asks for (about 1e-2);
- signed int8 kernels saturate on CPUs that add products in 16 bits. Stored as unsigned integers around 128,
  the same weights are the same function, and do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .graph_builder import CONTRIB, GraphBuilder
from .kernel import Kernel
from .linear_op import LinearOp

FLOAT_KERNEL = "MatMul of weights dequantised at load"
FOLD_AT_LOAD = {"session.disable_quant_qdq": "1"}
"""Lets onnxruntime fold DequantizeLinear of a constant when the session is made: the file keeps integers."""
_BLOCK_SIZES = (256, 128, 64, 32, 16)


def _emit_dynamic(build: GraphBuilder, op: LinearOp) -> ir.Value:
    return build.op(
        "DynamicQuantizeMatMul", op.x, op.weight, op.scale, op.zero_point, op.bias, domain=CONTRIB
    )


def _emit_dynamic_unsigned(build: GraphBuilder, op: LinearOp) -> ir.Value:
    weight, zero_point = _unsigned(build, op)
    return build.op("DynamicQuantizeMatMul", op.x, weight, op.scale, zero_point, op.bias, domain=CONTRIB)


def _emit_integer_to_float(build: GraphBuilder, op: LinearOp) -> ir.Value:
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


def _emit_token(build: GraphBuilder, op: LinearOp) -> ir.Value:
    return _token_product(build, op, op.weight, op.zero_point)


def _emit_token_unsigned(build: GraphBuilder, op: LinearOp) -> ir.Value:
    return _token_product(build, op, *_unsigned(build, op))


def _emit_token_by_rows(build: GraphBuilder, op: LinearOp) -> ir.Value:
    return _product_of_rows(build, op, op.weight, op.zero_point)


def _emit_token_by_rows_unsigned(build: GraphBuilder, op: LinearOp) -> ir.Value:
    return _product_of_rows(build, op, *_unsigned(build, op))


def _product_of_rows(
    build: GraphBuilder, op: LinearOp, weight: ir.Value, zero_point: ir.Value | None
) -> ir.Value:
    """The same with tokens as the rows of a matrix, which one QuantizeLinear turns into integers."""
    tokens = build.constant(np.array([-1, op.spec.in_features], np.int64), "tokens")
    last_axis = build.constant(np.array([-1], np.int64), "last_axis")
    rows = build.op("Reshape", op.x, tokens)
    highest = build.op("ReduceMax", rows, last_axis, keepdims=0)
    lowest = build.op("ReduceMin", rows, last_axis, keepdims=0)
    largest = build.op("Max", highest, build.op("Neg", lowest))
    scaled = build.op("Div", largest, build.constant(np.array(127, np.float32), "levels"))
    tiny = build.constant(np.array(np.finfo(np.float32).tiny), "tiny")
    x_scale = build.op("Max", scaled, tiny)
    middle = build.constant(np.array([128], np.uint8), "middle")
    zero_points = build.op("Expand", middle, build.op("Shape", x_scale))
    product = build.op(
        "MatMulIntegerToFloat",
        build.op("QuantizeLinear", rows, x_scale, zero_points, axis=0),
        weight,
        build.constant(np.array(1, np.float32), "one"),
        op.scale,
        build.constant(np.array(128, np.uint8), "x_zero_point"),
        zero_point,
        domain=CONTRIB,
    )
    result = build.op("Mul", product, build.op("Unsqueeze", x_scale, last_axis))
    if op.bias is not None:
        result = build.op("Add", result, op.bias)
    leading = build.op("Shape", op.x, start=0, end=-1)
    columns = build.constant(np.array([op.spec.out_features], np.int64), "columns")
    return build.op("Reshape", result, build.op("Concat", leading, columns, axis=0))


def _token_product(
    build: GraphBuilder, op: LinearOp, weight: ir.Value, zero_point: ir.Value | None
) -> ir.Value:
    """The steps of the body up to the integers; then one kernel multiplies, converts and scales columns."""
    one, middle = np.float32(1), np.float32(128)
    last_axis = build.constant(np.array([-1], np.int64), "last_axis")
    largest = build.op("ReduceMax", build.op("Abs", op.x), last_axis, keepdims=1)
    scaled = build.op("Div", largest, build.constant(np.array(127, np.float32), "levels"))
    tiny = build.constant(np.array(np.finfo(np.float32).tiny), "tiny")
    x_scale = build.op("Max", scaled, tiny)
    rounded = build.op("Round", build.op("Div", op.x, x_scale))
    shifted = build.op("Add", rounded, build.constant(np.array(middle), "middle"))
    product = build.op(
        "MatMulIntegerToFloat",
        build.op("Cast", shifted, to=int(ir.DataType.UINT8)),
        weight,
        build.constant(np.array(one), "one"),
        op.scale,
        build.constant(np.array(128, np.uint8), "x_zero_point"),
        zero_point,
        domain=CONTRIB,
    )
    result = build.op("Mul", product, x_scale)
    return result if op.bias is None else build.op("Add", result, op.bias)


def _unsigned(build: GraphBuilder, op: LinearOp) -> tuple[ir.Value, ir.Value]:
    """The same weights as uint8: 128 more, with a zero point that is 128 more."""
    zero_points = op.zero_points()
    if zero_points is None:
        zero_points = np.zeros(op.spec.out_features, np.int16)
    return (
        build.constant((op.integers() + 128).astype(np.uint8), "weight_unsigned"),
        build.constant((zero_points + 128).astype(np.uint8), "zero_point_unsigned"),
    )


def _emit_float(build: GraphBuilder, op: LinearOp) -> ir.Value:
    block_size = op.spec.block_size
    weight = build.op(
        "DequantizeLinear",
        op.weight,
        op.scale,
        op.zero_point,
        axis=0 if block_size else 1,
        block_size=block_size,
    )
    product = build.op("MatMul", op.x, weight)
    return product if op.bias is None else build.op("Add", product, op.bias)


def _emit_nbits(accuracy_level: int) -> Callable[[GraphBuilder, LinearOp], ir.Value]:
    def emit(build: GraphBuilder, op: LinearOp) -> ir.Value:
        spec, bits, block_size = op.spec, _packed_bits(op), _nbits_block_size(op)
        if block_size is None:
            raise ValueError(f"{build.layer}: MatMulNBits has no block size for {spec}")
        offset = 1 << (bits - 1) if spec.signed else 0
        blocks = spec.in_features // block_size
        shape = (spec.out_features, blocks, block_size)
        weight = _packed((op.integers() + offset).T.reshape(shape), bits)
        zero_point = None
        zero_points = op.zero_points()
        if zero_points is not None or not spec.signed:
            spread = _per_block(zero_points if zero_points is not None else np.int16(0), op, blocks)
            zero_point = build.constant(_packed(spread + offset, bits), "zero_points_packed")
        return build.op(
            "MatMulNBits",
            op.x,
            build.constant(weight, "weight_packed"),
            build.constant(_per_block(op.scales(), op, blocks), "scales"),
            zero_point,
            None,
            op.bias,
            domain=CONTRIB,
            K=spec.in_features,
            N=spec.out_features,
            bits=bits,
            block_size=block_size,
            accuracy_level=accuracy_level,
        )

    return emit


def _packed_bits(op: LinearOp) -> int:
    """MatMulNBits stores 2, 4 or 8 bits; other widths take the next of these."""
    return next(bits for bits in (2, 4, 8) if bits >= op.spec.bits)


def _nbits_block_size(op: LinearOp) -> int | None:
    """The op's own blocks, or the largest blocks that divide a channel, which then share its scale."""
    if op.spec.block_size:
        return op.spec.block_size if op.spec.block_size in _BLOCK_SIZES else None
    return next((size for size in _BLOCK_SIZES if op.spec.in_features % size == 0), None)


def _per_block(values: npt.NDArray[Any] | np.int16, op: LinearOp, blocks: int) -> npt.NDArray[Any]:
    """[K / B, N] or [N] → [N, blocks]."""
    return np.ascontiguousarray(np.broadcast_to(values, (blocks, op.spec.out_features)).T)


def _packed(values: npt.NDArray[np.int16], bits: int) -> npt.NDArray[np.uint8]:
    """Pack the last axis, low bits first, to whole bytes."""
    per_byte = 8 // bits
    padding = -values.shape[-1] % per_byte
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, padding)]).astype(np.uint8)
    grouped = padded.reshape(*padded.shape[:-1], -1, per_byte)
    shifted = grouped << (np.arange(per_byte, dtype=np.uint8) * bits)
    packed: npt.NDArray[np.uint8] = np.bitwise_or.reduce(shifted, axis=-1).astype(np.uint8)
    return packed


def _emit_body(build: GraphBuilder, op: LinearOp) -> ir.Value:
    node, definition = op.as_node(build.layer)
    return build.planish(node, definition)


def _is(activations: str, *, signed: bool | None = None) -> Callable[[LinearOp], bool]:
    return lambda op: op.spec.activations == activations and signed in (None, op.spec.signed)


def _takes_nbits(op: LinearOp) -> bool:
    return op.spec.activations == "float" and _nbits_block_size(op) is not None


LINEAR_KERNELS: tuple[Kernel[LinearOp], ...] = (
    Kernel("DynamicQuantizeMatMul", _is("tensor"), _emit_dynamic),
    Kernel("DynamicQuantizeMatMul of unsigned weights", _is("tensor", signed=True), _emit_dynamic_unsigned),
    Kernel("DynamicQuantizeLinear + MatMulIntegerToFloat", _is("tensor"), _emit_integer_to_float),
    Kernel("MatMulIntegerToFloat by token", _is("token"), _emit_token),
    Kernel(
        "MatMulIntegerToFloat by token of unsigned weights", _is("token", signed=True), _emit_token_unsigned
    ),
    Kernel("QuantizeLinear by token + MatMulIntegerToFloat", _is("token"), _emit_token_by_rows),
    Kernel(
        "QuantizeLinear by token + MatMulIntegerToFloat of unsigned weights",
        _is("token", signed=True),
        _emit_token_by_rows_unsigned,
    ),
    Kernel("MatMulNBits accuracy 4", _takes_nbits, _emit_nbits(4)),
    Kernel("MatMulNBits accuracy 0", _takes_nbits, _emit_nbits(0)),
    Kernel(FLOAT_KERNEL, lambda op: True, _emit_float, FOLD_AT_LOAD),
)
LINEAR_BODY: Kernel[LinearOp] = Kernel("body", lambda op: True, _emit_body)
