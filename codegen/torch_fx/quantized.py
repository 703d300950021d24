"""Quantisation, its inverse, and integer products, in integers and with the rounding of ONNX."""

from __future__ import annotations

from typing import Any

import torch

from .elementwise import cast
from .image import conv
from .registry import Lowering, standard

Tensor = torch.Tensor


def dequantize_linear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """``(x − zero_point) · scale``: per tensor, per channel along ``axis``, or in blocks along ``axis``."""
    # Floats of 16 bits do not have all integers of more than 8.
    wide = scale.dtype if x.dtype.itemsize == 1 else torch.promote_types(scale.dtype, torch.float32)
    centred = x.to(wide)
    if zero_point is not None:
        centred = centred - _spread(zero_point.to(wide), x, axis, block_size)
    return (centred * _spread(scale.to(wide), x, axis, block_size)).to(output_dtype or scale.dtype)


def quantize_linear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: torch.dtype | None = None,
    precision: torch.dtype | None = None,
    saturate: int = 1,
) -> Tensor:
    """``clip(round(x / scale) + zero_point)`` to 8 or more bits; halves are rounded to even.

    To floats of 8 bits, ``x / scale`` is cast.
    """
    dtype = output_dtype or (torch.uint8 if zero_point is None else zero_point.dtype)
    precise = precision or scale.dtype
    quotients = x.to(precise) / _spread(scale.to(precise), x, axis, block_size)
    if dtype.is_floating_point:
        return cast(quotients, to=dtype, saturate=saturate)
    places = torch.round(quotients).to(torch.promote_types(precise, torch.float32))
    if zero_point is not None:
        places = places + _spread(zero_point.to(places.dtype), x, axis, block_size)
    return _clamped(places, dtype)


def _clamped(values: Tensor, dtype: torch.dtype) -> Tensor:
    limits = torch.iinfo(dtype)
    return values.clamp(limits.min, limits.max).to(dtype)


def dynamic_quantize_linear(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 on the asymmetric grid that just covers x and 0; also the grid's scale and zero point."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # a tensor of zeros has no range
    zero_point = torch.round(-low / scale).clamp(0, 255)
    quantized = (torch.round(x / scale) + zero_point).clamp(0, 255)
    return quantized.to(torch.uint8), scale, zero_point.to(torch.uint8)


def matmul_integer(
    a: Tensor, b: Tensor, a_zero_point: Tensor | None = None, b_zero_point: Tensor | None = None
) -> Tensor:
    """``(a − a_zero_point) · (b − b_zero_point)`` in int32; a's zero point may be per row, b's per column."""
    left, right = a.to(torch.int32), b.to(torch.int32)
    if a_zero_point is not None:
        zero = a_zero_point.to(torch.int32)
        left = left - (zero.unsqueeze(-1) if zero.ndim == 1 and zero.numel() > 1 else zero)
    if b_zero_point is not None:
        right = right - b_zero_point.to(torch.int32)
    if a.device.type == "cpu":
        return torch.matmul(left, right)
    # No integer product there; sums of products of 9-bit integers are exact in float64.
    return torch.matmul(left.double(), right.double()).to(torch.int32)


def qlinear_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
) -> Tensor:
    """`matmul_integer` of quantised matrices, quantised again; b's grid may be per column."""
    product = matmul_integer(a, b, a_zero_point, b_zero_point)
    return _requantized(product, a_scale * b_scale / y_scale, y_zero_point)


def conv_integer(
    x: Tensor,
    weight: Tensor,
    x_zero_point: Tensor | None = None,
    weight_zero_point: Tensor | None = None,
    **attributes: Any,
) -> Tensor:
    """``conv(x − x_zero_point, weight − weight_zero_point)`` in int32; the weight's may be per channel."""
    left, right = x.double(), weight.double()  # its sums of products of 9-bit integers are exact
    if x_zero_point is not None:
        left = left - x_zero_point.double()
    if weight_zero_point is not None:
        right = right - _per_channel(weight_zero_point, weight.ndim).double()
    return conv(left, right, **attributes).to(torch.int32)


def qlinear_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    bias: Tensor | None = None,
    **attributes: Any,
) -> Tensor:
    """`conv_integer` of quantised images plus int32 ``bias``, quantised again."""
    total = conv_integer(x, weight, x_zero_point, weight_zero_point, **attributes)
    if bias is not None:
        total = total + _per_channel(bias, x.ndim - 1)
    factor = _per_channel(x_scale * weight_scale / y_scale, x.ndim - 1)
    return _requantized(total, factor, y_zero_point)


def _requantized(total: Tensor, factor: Tensor, zero_point: Tensor) -> Tensor:
    """An int32 product on the grid of the result."""
    places = torch.round(total.to(factor.dtype) * factor) + zero_point.to(factor.dtype)
    return _clamped(places, zero_point.dtype)


def _per_channel(parameter: Tensor, rank: int) -> Tensor:
    """One number, or one for each of the first of ``rank`` dimensions."""
    return parameter.reshape(()) if parameter.numel() == 1 else parameter.reshape([-1] + [1] * (rank - 1))


def _spread(parameter: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """A scale or zero point in a shape that broadcasts with x."""
    if parameter.numel() == 1 and not block_size:
        return parameter.reshape(())
    axis = axis % x.ndim
    if block_size:
        return parameter.repeat_interleave(block_size, dim=axis).narrow(axis, 0, x.shape[axis])
    shape = [1] * x.ndim
    shape[axis] = -1
    return parameter.reshape(shape)


OPS = standard(
    {
        "ConvInteger": conv_integer,
        "DequantizeLinear": dequantize_linear,
        "DynamicQuantizeLinear": Lowering(dynamic_quantize_linear, several=True),
        "MatMulInteger": matmul_integer,
        "QLinearConv": qlinear_conv,
        "QLinearMatMul": qlinear_matmul,
        "QuantizeLinear": Lowering(quantize_linear, like=2),
    }
)
