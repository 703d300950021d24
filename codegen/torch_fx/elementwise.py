"""Arithmetic, comparisons, activations and casts: every element on its own, with broadcasting."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from ...ir.errors import TargetError
from .registry import Lowering, standard

Tensor = torch.Tensor
_E4M3FN_END = 464.0
"""The largest number that is rounded to a finite float8_e4m3fn; torch keeps larger ones finite too."""


def div(dividend: Tensor, divisor: Tensor) -> Tensor:
    """Divide; integers towards zero."""
    rounding = None if dividend.is_floating_point() else "trunc"
    return torch.div(dividend, divisor, rounding_mode=rounding)


def mod(dividend: Tensor, divisor: Tensor, *, fmod: int = 0) -> Tensor:
    """The remainder with the sign of the divisor, or of the dividend with ``fmod``."""
    return torch.fmod(dividend, divisor) if fmod else torch.remainder(dividend, divisor)


def power(base: Tensor, exponent: Tensor) -> Tensor:
    """``base ** exponent`` in the type of ``base``."""
    # Torch gives numbers without axes the type of the other operand.
    wide = torch.promote_types(base.dtype, exponent.dtype)
    return torch.pow(base.to(wide), exponent.to(wide)).to(base.dtype)


def clip(x: Tensor, minimum: Tensor | None = None, maximum: Tensor | None = None) -> Tensor:
    """Limit to [minimum, maximum]; where they cross, the maximum holds."""
    if minimum is not None:
        x = torch.maximum(x, minimum)
    return x if maximum is None else torch.minimum(x, maximum)


def variadic_max(*operands: Tensor) -> Tensor:
    """The largest operand at each place."""
    return functools.reduce(torch.maximum, operands)


def variadic_min(*operands: Tensor) -> Tensor:
    """The smallest operand at each place."""
    return functools.reduce(torch.minimum, operands)


def variadic_sum(*operands: Tensor) -> Tensor:
    """The sum of the operands."""
    return functools.reduce(torch.add, operands)


def variadic_mean(*operands: Tensor) -> Tensor:
    """The mean of the operands."""
    return variadic_sum(*operands) / len(operands)


def bit_shift(x: Tensor, bits: Tensor, *, direction: str) -> Tensor:
    """Shift unsigned integers LEFT or RIGHT; what falls out is lost."""
    return torch.bitwise_left_shift(x, bits) if direction == "LEFT" else torch.bitwise_right_shift(x, bits)


def cast(x: Tensor, *, to: torch.dtype, saturate: int = 1) -> Tensor:
    """Convert; floats to integers towards zero. ``saturate`` keeps 8-bit floats finite."""
    if to.is_floating_point and to.itemsize == 1 and x.dtype != torch.bool:
        if saturate:
            x = x.clamp(-torch.finfo(to).max, torch.finfo(to).max)
        elif to == torch.float8_e4m3fn:
            x = torch.where(x.abs() > _E4M3FN_END, math.nan, x)
    return x.to(to)


def cast_like(x: Tensor, like: Tensor, *, saturate: int = 1) -> Tensor:
    """Convert to the type of ``like``."""
    return cast(x, to=like.dtype, saturate=saturate)


def is_infinite(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """Where x is one of the infinities asked for."""
    positive, negative = torch.isposinf(x), torch.isneginf(x)
    return (positive & bool(detect_positive)) | (negative & bool(detect_negative))


def dropout(
    x: Tensor, ratio: Tensor | None = None, training: Tensor | bool | None = None, *, seed: int = 0
) -> Tensor:
    """x itself.

    Raises:
        TargetError: the node drops elements, in training mode.
    """
    del ratio, seed  # of training
    if training is not None and bool(training):
        raise TargetError("torch-fx: Dropout in training mode is not lowered")
    return x


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """``x · Φ(x)``, exact or by tanh."""
    return F.gelu(x, approximate=approximate)


def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """``x · sigmoid(alpha · x)``."""
    return x * torch.sigmoid(alpha * x)


def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    """``x`` where positive, ``alpha · x`` elsewhere."""
    return F.leaky_relu(x, alpha)


def parametric_relu(x: Tensor, slope: Tensor) -> Tensor:
    """``x`` where positive, ``slope · x`` elsewhere."""
    return torch.where(x < 0, slope * x, x)


def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """``x`` where positive, ``alpha · (exp(x) − 1)`` elsewhere."""
    return F.elu(x, alpha)


def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """``x`` where positive, ``alpha · (exp(x / alpha) − 1)`` elsewhere."""
    return F.celu(x, alpha)


def selu(
    x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875
) -> Tensor:
    """``gamma`` times `elu`."""
    return gamma * F.elu(x, alpha)


def softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))``; torch's own is x itself from 20 on, which float64 can tell apart."""
    return torch.logaddexp(x, torch.zeros_like(x))


def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """``x`` where it is more than ``alpha``, 0 elsewhere."""
    return torch.where(x > alpha, x, 0)


def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    """``x`` moved towards 0 by ``bias``, and 0 between ``−lambd`` and ``lambd``."""
    moved = torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, 0))
    return moved.to(x.dtype)


def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """``clip(alpha · x + beta, 0, 1)``."""
    return torch.clamp(alpha * x + beta, 0, 1)


OPS = standard(
    {
        "Abs": torch.abs,
        "Acos": torch.acos,
        "Acosh": torch.acosh,
        "Add": torch.add,
        "And": torch.logical_and,
        "Asin": torch.asin,
        "Asinh": torch.asinh,
        "Atan": torch.atan,
        "Atanh": torch.atanh,
        "BitShift": bit_shift,
        "BitwiseAnd": torch.bitwise_and,
        "BitwiseNot": torch.bitwise_not,
        "BitwiseOr": torch.bitwise_or,
        "BitwiseXor": torch.bitwise_xor,
        "Cast": cast,
        "CastLike": Lowering(cast_like, like=1),
        "Ceil": torch.ceil,
        "Celu": celu,
        "Clip": clip,
        "Cos": torch.cos,
        "Cosh": torch.cosh,
        "Div": div,
        "Dropout": Lowering(dropout, integers=(2,)),
        "Elu": elu,
        "Equal": torch.eq,
        "Erf": torch.erf,
        "Exp": torch.exp,
        "Floor": torch.floor,
        "Gelu": gelu,
        "Greater": torch.gt,
        "GreaterOrEqual": torch.ge,
        "HardSigmoid": hard_sigmoid,
        "HardSwish": F.hardswish,
        "IsInf": is_infinite,
        "IsNaN": torch.isnan,
        "LeakyRelu": leaky_relu,
        "Less": torch.lt,
        "LessOrEqual": torch.le,
        "Log": torch.log,
        "Max": variadic_max,
        "Mean": variadic_mean,
        "Min": variadic_min,
        "Mish": F.mish,
        "Mod": mod,
        "Mul": torch.mul,
        "Neg": torch.neg,
        "Not": torch.logical_not,
        "Or": torch.logical_or,
        "PRelu": parametric_relu,
        "Pow": power,
        "Reciprocal": torch.reciprocal,
        "Relu": torch.relu,
        "Round": torch.round,
        "Selu": selu,
        "Shrink": shrink,
        "Sigmoid": torch.sigmoid,
        "Sign": torch.sign,
        "Sin": torch.sin,
        "Sinh": torch.sinh,
        "Softplus": softplus,
        "Softsign": F.softsign,
        "Sqrt": torch.sqrt,
        "Sub": torch.sub,
        "Sum": variadic_sum,
        "Swish": swish,
        "Tan": torch.tan,
        "Tanh": torch.tanh,
        "ThresholdedRelu": thresholded_relu,
        "Where": torch.where,
        "Xor": torch.logical_xor,
    }
)
