"""Integer containers: which ONNX dtype holds integers of a given width, and tensors of them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..rearranged import TransposedTensor
from ..spill import kept

_CONTAINERS = {
    (4, True): ir.DataType.INT4,
    (4, False): ir.DataType.UINT4,
    (8, True): ir.DataType.INT8,
    (8, False): ir.DataType.UINT8,
}


def container(bits: int, *, signed: bool) -> ir.DataType:
    """The dtype that holds ``bits``-wide integers: 4-bit containers for 2 to 4 bits, 8-bit for 5 to 8."""
    if not 2 <= bits <= 8:
        raise ValueError(f"integers of {bits} bits have no container: expected 2 to 8")
    return _CONTAINERS[4 if bits <= 4 else 8, signed]


def integer_tensor(values: npt.NDArray[Any], dtype: ir.DataType, name: str) -> ir.TensorProtocol:
    """A tensor of ``values`` (any integer array in range) that takes one byte for two 4-bit integers.

    A matrix whose columns are contiguous is stored by columns: turning it costs more than writing it.
    """
    if values.flags.f_contiguous and not values.flags.c_contiguous:
        return TransposedTensor(integer_tensor(values.T, dtype, name), range(values.ndim)[::-1], name)
    if dtype.bitwidth == 8:
        return ir.Tensor(kept(np.ascontiguousarray(values, dtype=dtype.numpy())), name=name)
    nibbles = (values.astype(np.int8, copy=False).view(np.uint8) & 0xF).reshape(-1)
    if nibbles.size % 2:
        nibbles = np.append(nibbles, np.uint8(0))
    packed = kept(nibbles[0::2] | (nibbles[1::2] << 4))
    return ir.PackedTensor(packed, dtype, shape=values.shape, name=name)


def integer_values(tensor: ir.TensorProtocol) -> npt.NDArray[np.int8] | npt.NDArray[np.uint8]:
    """The integers of a tensor, one byte each: int8 for signed containers, uint8 for unsigned ones."""
    values = tensor.numpy()
    signed = values.dtype in (np.dtype(np.int8), np.dtype(ml_dtypes.int4))
    return values.astype(np.int8) if signed else values.astype(np.uint8)
