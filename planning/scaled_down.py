"""A model with fewer layers and made-up weights, to see for little what the whole will cost."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..ir import clone
from ..ir.structure import drop
from ..ir.views.values import is_constant
from .layers import AlikeLayers

_SMALLEST = 4096
"""Numbers in a weight from which on it is made up. Smaller ones may be shapes, and cost nothing to read."""
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gather", "Gemm", "MatMul"})


def scaled_down(model: ir.Model, counts: Mapping[str, int], layers: Sequence[AlikeLayers]) -> ir.Model:
    """A copy that keeps the first few layers of each kind, with weights that are drawn when they are read.

    Args:
        model: in canonical form; not changed, and none of its large weights is read.
        counts: how many layers of each kind to keep, by the kind's name.
        layers: all of its layers.

    Raises:
        InputError: the model cannot do without the others.
    """
    result = clone(model)
    gone = [module for alike in layers for layer in alike.layers[counts[alike.name] :] for module in layer]
    if gone:
        drop(result, gone)
    for value in result.graph.initializers.values():
        if _is_weight(value):
            value.const_value = _drawn(value)
    return result


def _is_weight(value: ir.Value) -> bool:
    tensor = value.const_value
    return (
        tensor is not None
        and tensor.dtype.is_floating_point()
        and tensor.dtype.bitwidth >= 16
        and len(tensor.shape) > 1
        and tensor.size >= _SMALLEST
        and is_constant(value)
        and any(use.node.op_type in _WEIGHTED for use in value.uses())
    )


def _drawn(value: ir.Value) -> ir.TensorProtocol:
    """Normal numbers of the size that keeps activations the size they have; the same for the same name."""
    like = value.const_value
    assert like is not None
    shape, dtype, name = like.shape.numpy(), like.dtype, str(value.name)
    deviation = math.sqrt(max(shape) / like.size)

    def draw() -> ir.TensorProtocol:
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        numbers: npt.NDArray[np.float32] = rng.standard_normal(shape, np.float32)
        numbers *= deviation
        return ir.Tensor(numbers.astype(dtype.numpy(), copy=False), dtype=dtype, name=name)

    return ir.LazyTensor(draw, dtype=dtype, shape=ir.Shape(shape), name=name)
