"""``com.microsoft::MatMulNBits``: float activations times integers in blocks, packed to bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...ir import ops
from ...ir.graph_builder import CONTRIB, GraphBuilder
from ...ir.rearranged import TransposedTensor
from ..linear_op import LinearOp, constant_of

_BLOCK_SIZES = (256, 128, 64, 32, 16)


def emit_nbits(accuracy_level: int) -> Callable[[GraphBuilder, LinearOp], ir.Value]:
    """The kernel at an accuracy level: 4 quantises activations to int8 in blocks, 0 leaves them in float."""

    def emit(build: GraphBuilder, op: LinearOp) -> ir.Value:
        spec, bits, block_size = op.spec, _packed_bits(op), nbits_block_size(op)
        if block_size is None:
            raise ValueError(f"{build.layer}: MatMulNBits has no block size for {spec}")
        offset = 1 << (bits - 1) if spec.signed else 0
        blocks = spec.in_features // block_size
        shape = (spec.out_features, blocks, block_size)
        stored = constant_of(op.weight)
        weight = build.derived(
            lambda: _packed_weight(stored, shape, bits, offset),
            [stored],
            "weight_packed",
            dtype=ir.DataType.UINT8,
            shape=(*shape[:2], -(-block_size * bits // 8)),
        )
        zero_point = None
        zero_points = op.zero_points()
        if zero_points is not None or not spec.signed:
            spread = _per_block(zero_points if zero_points is not None else np.int16(0), op, blocks)
            zero_point = build.constant(_packed(spread, bits, offset), "zero_points_packed")
        return build.op(
            "MatMulNBits",
            op.x,
            weight,
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


def _packed_weight(
    stored: ir.TensorProtocol, shape: tuple[int, int, int], bits: int, offset: int
) -> npt.NDArray[np.uint8]:
    """[N, blocks, bytes of a block] of integers [K, N]."""
    by_columns = stored.source if isinstance(stored, TransposedTensor) else None
    if bits == 4 and isinstance(by_columns, ir.PackedTensor) and shape[2] % 2 == 0:
        # The same order already; to add 8 to four bits is to flip the highest.
        packed = np.asarray(by_columns.raw).reshape(*shape[:2], shape[2] // 2)
        return packed ^ np.uint8(0x88) if offset else packed
    return _packed(ops.integer_values(stored).T.reshape(shape), bits, offset)


def _packed_bits(op: LinearOp) -> int:
    """MatMulNBits stores 2, 4 or 8 bits; other widths take the next of these."""
    return next(bits for bits in (2, 4, 8) if bits >= op.spec.bits)


def nbits_block_size(op: LinearOp) -> int | None:
    """The op's own blocks, or the largest blocks that divide a channel, which then share its scale."""
    if op.spec.block_size:
        return op.spec.block_size if op.spec.block_size in _BLOCK_SIZES else None
    return next((size for size in _BLOCK_SIZES if op.spec.in_features % size == 0), None)


def _per_block(values: npt.NDArray[Any] | np.int16, op: LinearOp, blocks: int) -> npt.NDArray[Any]:
    """[K / B, N] or [N] → [N, blocks]."""
    return np.ascontiguousarray(np.broadcast_to(values, (blocks, op.spec.out_features)).T)


def _packed(values: npt.NDArray[np.integer[Any]], bits: int, offset: int) -> npt.NDArray[np.uint8]:
    """Pack the last axis of values + offset, low bits first, to whole bytes; what is padded is 0."""
    per_byte = 8 // bits
    numbers = values.astype(np.uint8) + np.uint8(offset)
    packed = np.zeros((*numbers.shape[:-1], -(-numbers.shape[-1] // per_byte)), np.uint8)
    for position in range(per_byte):
        part = numbers[..., position::per_byte]
        packed[..., : part.shape[-1]] |= part << np.uint8(position * bits)
    return packed
