"""Tensors of the IR as torch tensors that share their memory."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

DTYPES: dict[ir.DataType, torch.dtype] = {
    ir.DataType.BOOL: torch.bool,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.FLOAT8E5M2: torch.float8_e5m2,
    # Torch has no arithmetic on narrower integers: they live one to a byte.
    ir.DataType.INT2: torch.int8,
    ir.DataType.UINT2: torch.uint8,
    ir.DataType.INT4: torch.int8,
    ir.DataType.UINT4: torch.uint8,
}
_EXTENSION = 2
"""``isbuiltin`` of a type that numpy only knows through an extension."""
_BITS = {1: np.int8, 2: np.int16}
"""Integers of the width of the float types that numpy only knows through an extension."""


def torch_dtype(dtype: ir.DataType, floating: torch.dtype | None = None) -> torch.dtype | None:
    """The torch type of an element type, None if torch has none.

    ``floating``, where given, takes the place of float16, bfloat16, float32 and float64.
    """
    found = DTYPES.get(dtype)
    if found is None or floating is None or not found.is_floating_point or found.itemsize == 1:
        return found
    return floating


def from_array(array: npt.NDArray[Any], dtype: torch.dtype | None = None) -> torch.Tensor:
    """The array in torch, in its own memory unless it is packed or not contiguous; not to be written.

    ``dtype`` is the torch type of the array's elements, by default that of its numpy type.
    """
    dtype = dtype or DTYPES[ir.DataType.from_numpy(array.dtype)]
    if array.dtype.isbuiltin == _EXTENSION:  # same bits, or integers narrower than a byte
        narrow = not dtype.is_floating_point
        array = array.astype(np.int16).astype(_BITS[1]) if narrow else array.view(_BITS[dtype.itemsize])
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    with warnings.catch_warnings():
        # Weights are mapped from files: torch warns of any memory that cannot be written.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        result = torch.from_numpy(array)
    return result if result.dtype == dtype else result.view(dtype)


def torch_tensor(tensor: ir.TensorProtocol, floating: torch.dtype | None = None) -> torch.Tensor | None:
    """The tensor in torch; None if torch has no such element type.

    Memory is shared with ``tensor``, and must not be written, unless the type changes or the integers are
    narrower than a byte.
    """
    dtype = torch_dtype(tensor.dtype)
    if dtype is None:
        return None
    result = from_array(np.asarray(tensor.numpy()), dtype)
    target = torch_dtype(tensor.dtype, floating)
    return result if target is None or target == dtype else result.to(target)
