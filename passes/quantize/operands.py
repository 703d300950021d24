"""The constants of a quantised linear: a `QuantizedWeight` as initializers of the model."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...ir import ops
from .quantized_weight import QuantizedWeight
from .weights import add_tensor


@dataclasses.dataclass(frozen=True)
class WeightOperands:
    """What the ops take; see `planish.ir.ops.quantized_linear`."""

    weight: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None
    codebook: ir.Value | None = None
    second_level: ops.SecondLevel | None = None
    outliers: ops.Outliers | None = None


def add_operands(
    model: ir.Model,
    quantized: QuantizedWeight,
    layer: str,
    *,
    scale_dtype: np.dtype[Any] | None = None,
    widened_zero_point: bool = False,
) -> WeightOperands:
    """Add the constants of one layer to ``model``, named after it.

    Args:
        model: gets the initializers.
        quantized: what is stored.
        layer: its name.
        scale_dtype: convert float scales to this type; None keeps theirs.
        widened_zero_point: 4-bit zero points become int8, as the weight does before an integer product.
    """

    def add(values: npt.NDArray[Any], suffix: str, container: ir.DataType | None = None) -> ir.Value:
        return add_tensor(model, values, f"{layer}.{suffix}", container)

    container = _container(quantized)
    weight = add(quantized.integers, "weight_quantized", container)
    level = quantized.second_level
    small = None if level is None else ops.container(level.bits, signed=False)
    scale = quantized.scale
    if level is None and scale_dtype is not None:
        scale = scale.astype(scale_dtype)
    elif scale.dtype.name == "float8_e8m0fnu":
        # The op takes the bits of a power of two: see its overload ``codebook_exponent``.
        scale = scale.view(np.uint8)
    zero_point = None
    if quantized.zero_point is not None:
        narrow = container in (ir.DataType.INT4, ir.DataType.UINT4)
        zero_container = ir.DataType.INT8 if widened_zero_point and narrow else small or container
        zero_point = add(quantized.zero_point, "weight_zero_point", zero_container)
    return WeightOperands(
        weight,
        add(scale, "weight_scale", small),
        zero_point,
        None if quantized.codebook is None else add(quantized.codebook, "weight_codebook"),
        None
        if level is None
        else ops.SecondLevel(
            add(level.scale_scale, "weight_scale_scale"),
            add(level.scale_zero, "weight_scale_zero"),
            add(level.zero_scale, "weight_zero_scale"),
            add(level.zero_zero, "weight_zero_zero"),
            level.block_size,
        ),
        None
        if quantized.outliers is None
        else ops.Outliers(
            add(ops.outlier_gaps(quantized.outliers.positions), "outlier_gaps"),
            add(quantized.outliers.values, "outlier_values"),
        ),
    )


def _container(quantized: QuantizedWeight) -> ir.DataType | None:
    """The type of the integers in the model; float8 stays what it is."""
    if quantized.integers.dtype.kind not in "iu":
        return None
    return ops.container(quantized.bits, signed=quantized.integers.dtype.kind == "i")
