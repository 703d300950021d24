"""Reading float weights and adding quantised ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...ir import ops, release
from ...ir.errors import PassError
from ...ir.spill import kept
from .quantized_weight import Floats

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
ERROR_KEY = "planish.weight_error"
"""Metadata of a quantised node: its weight's relative error ‖W − Ŵ‖ / ‖W‖ (Frobenius)."""


def float_dtype(value: ir.Value) -> ir.DataType:
    """The float type of a weight.

    Raises:
        PassError: it has none.
    """
    if value.dtype is None or value.dtype not in FLOATS:
        raise PassError(f"quantize: weight {value.name!r}: expected a float tensor, found {value.dtype}")
    return value.dtype


def read_weight(value: ir.Value) -> Floats:
    """A float32 copy of a constant weight; what the tensor itself had loaded is released.

    Raises:
        PassError: the weight holds NaN or an infinity, which no grid covers.
    """
    tensor = value.const_value
    if tensor is None:
        raise PassError(f"quantize: weight {value.name!r} is not constant")
    weight = np.array(tensor.numpy(), dtype=np.float32)
    release(tensor)
    if not np.isfinite(weight).all():
        raise PassError(
            f"quantize: weight {value.name!r} holds NaN or infinity",
            hint="export the model again, or leave the layer out with ignore=",
        )
    return weight


def add_tensor(
    model: ir.Model, values: npt.NDArray[Any], name: str, container: ir.DataType | None = None
) -> ir.Value:
    """A new initializer, named ``name`` or, where that is taken, ``name_1``, ``name_2``, …"""
    taken = model.graph.initializers
    unique, count = name, 0
    while unique in taken:
        count += 1
        unique = f"{name}_{count}"
    if container is None:
        tensor: ir.TensorProtocol = ir.tensor(kept(values), name=unique)
    else:
        tensor = ops.integer_tensor(values, container, unique)
    value = ir.val(unique, shape=values.shape, dtype=tensor.dtype, const_value=tensor)
    model.graph.register_initializer(value)
    return value


def relative_error(weight: Floats, dequantized: Floats) -> float:
    """‖W − Ŵ‖ / ‖W‖; 0 for a weight of zeros."""
    norm = float(np.linalg.norm(weight))
    return float(np.linalg.norm(weight - dequantized)) / norm if norm else 0.0
