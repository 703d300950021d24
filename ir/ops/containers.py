"""Integer containers: which ONNX dtype holds integers of a given width, and tensors of them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from ..rearranged import TransposedTensor
from ..spill import kept

_CONTAINERS = {
    (4, True): ir.DataType.INT4,
    (4, False): ir.DataType.UINT4,
    (8, True): ir.DataType.INT8,
    (8, False): ir.DataType.UINT8,
}
_PAIRS_AT_ONCE = 1 << 18


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
    return ir.PackedTensor(kept(_packed(values)), dtype, shape=values.shape, name=name)


def _packed(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Two 4-bit integers to a byte, the first one in the low half; a byte of its own for an odd last one."""
    flat = values.reshape(-1)
    flat = flat.view(np.int8) if flat.itemsize == 1 else flat.astype(np.int8)
    if flat.size % 2:
        flat = np.append(flat, np.int8(0))
    elif not flat.flags.writeable:  # torch has no such tensors
        flat = flat.copy()
    packed = np.empty(flat.size // 2, np.uint8)
    # As 16-bit numbers, since steps of two bytes take five times as long, and a few at a time, in the cache;
    # by torch, on all cores.
    pairs, result = torch.from_numpy(flat.view("<i2")), torch.from_numpy(packed)
    for some, place in zip(pairs.split(_PAIRS_AT_ONCE), result.split(_PAIRS_AT_ONCE), strict=True):
        place.copy_((some >> 4).bitwise_and_(0xF0).bitwise_or_(some & 0xF))
    return packed


def integer_values(tensor: ir.TensorProtocol) -> npt.NDArray[np.int8] | npt.NDArray[np.uint8]:
    """The integers of a tensor, one byte each: int8 for signed containers, uint8 for unsigned ones."""
    values = tensor.numpy()
    signed = values.dtype in (np.dtype(np.int8), np.dtype(ml_dtypes.int4))
    return values.astype(np.int8) if signed else values.astype(np.uint8)


def zeros_of(tensor: ir.TensorProtocol) -> int:
    """How many of a tensor's numbers are zero, without unpacking those that are packed."""
    if isinstance(tensor, TransposedTensor):
        return zeros_of(tensor.source)
    if not isinstance(tensor, ir.PackedTensor) or tensor.dtype.bitwidth != 4:
        values = integer_values(tensor) if tensor.dtype.is_integer() else tensor.numpy()
        return tensor.size - int(np.count_nonzero(values))
    packed = tensor.numpy_packed().reshape(-1)
    # A half byte may fill the last one.
    zeros = tensor.size - 2 * packed.size
    for start in range(0, packed.size, _PAIRS_AT_ONCE):
        pairs = packed[start : start + _PAIRS_AT_ONCE]
        zeros += sum(pairs.size - int(np.count_nonzero(pairs & half)) for half in (0x0F, 0xF0))
    return zeros
