"""``com.microsoft::MatMulNBits``: float activations times integers in blocks, packed to bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...ir.graph_builder import CONTRIB, GraphBuilder
from ..linear_op import LinearOp

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


def nbits_block_size(op: LinearOp) -> int | None:
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
