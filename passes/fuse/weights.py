"""Write new contents into the weight of a node."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from ..infrastructure.rewriter import Replacement

Array = np.ndarray[Any, np.dtype[Any]]


def set_weight(replacement: Replacement, node: ir.Node, position: int, tensor: ir.TensorProtocol) -> None:
    """Let ``node`` read ``tensor`` at input ``position``.

    A weight that only this node reads keeps its value and name; a shared one is left to its other readers.
    """
    value = node.inputs[position] if position < len(node.inputs) else None
    if value is not None and len(value.uses()) == 1 and value.is_initializer():
        value.const_value = tensor
        return
    if position >= len(node.inputs):
        node.resize_inputs(position + 1)
    base = value.name if value is not None else f"{_stem(node)}.bias"
    node.replace_input_with(position, replacement.initializer(str(base), tensor))


def _stem(node: ir.Node) -> str:
    weight = node.inputs[1]
    return str(weight.name).removesuffix(".weight") if weight is not None else str(node.name)


def scaled(array: Array, scale: Array, shift: Array | float, dtype: ir.DataType) -> ir.TensorProtocol | None:
    """array · scale + shift in float64, rounded to ``dtype``; None if it does not fit there."""
    with np.errstate(over="ignore"):
        cast = (array.astype(np.float64) * scale + shift).astype(dtype.numpy())
    return ir.Tensor(cast, dtype=dtype) if bool(np.isfinite(cast.astype(np.float64)).all()) else None
