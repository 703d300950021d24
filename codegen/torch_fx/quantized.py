"""Quantisation, its inverse, and integer products, in integers and with the rounding of ONNX."""

from __future__ import annotations

import torch

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
    centred = x.to(scale.dtype)
    if zero_point is not None:
        centred = centred - _spread(zero_point, x, axis, block_size).to(scale.dtype)
    return (centred * _spread(scale, x, axis, block_size)).to(output_dtype or scale.dtype)


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
    """``clip(round(x / scale) + zero_point)`` to 8 or more bits; halves are rounded to even."""
    del saturate  # of 8-bit floats
    dtype = output_dtype or (torch.uint8 if zero_point is None else zero_point.dtype)
    precise = x if precision is None else x.to(precision)
    rounded = torch.round(precise / _spread(scale, x, axis, block_size).to(precise.dtype))
    if zero_point is not None:
        rounded = rounded + _spread(zero_point, x, axis, block_size).to(rounded.dtype)
    limits = torch.iinfo(dtype)
    return rounded.clamp(limits.min, limits.max).to(dtype)


def dynamic_quantize_linear(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 on the asymmetric grid that just covers x and 0; also the grid's scale and zero point."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    # A tensor of zeros has no range: any scale will do, and a division by zero will not.
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero_point = torch.round(-low / divisor).clamp(0, 255)
    quantized = (torch.round(x / divisor) + zero_point).clamp(0, 255)
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
        "DequantizeLinear": dequantize_linear,
        "DynamicQuantizeLinear": Lowering(dynamic_quantize_linear, several=True),
        "MatMulInteger": matmul_integer,
        "QuantizeLinear": quantize_linear,
    }
)
