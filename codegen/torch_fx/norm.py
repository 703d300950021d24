"""Normalisations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .registry import Lowering, standard

Tensor = torch.Tensor


def rms_normalization(
    x: Tensor,
    scale: Tensor,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: torch.dtype = torch.float32,
) -> Tensor:
    """``x / √(mean(x²) + epsilon) · scale``, the mean over ``axis`` and all dimensions after it."""
    wide = _at_least(x, stash_type)
    dims = list(range(axis % x.ndim, x.ndim))
    mean_square = (wide * wide).mean(dims, keepdim=True)
    return (wide * torch.rsqrt(mean_square + epsilon)).to(x.dtype) * scale


def layer_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: torch.dtype = torch.float32,
) -> Tensor:
    """``(x − mean) / √(variance + epsilon) · scale + bias``, over ``axis`` and all dimensions after it."""
    shape = x.shape[axis % x.ndim :]
    result = F.layer_norm(_at_least(x, stash_type), shape, eps=epsilon).to(x.dtype) * scale
    return result if bias is None else result + bias


def batch_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> Tensor:
    """Normalise each channel of [N, C, …] with the statistics given."""
    del momentum, training_mode  # of training, which is refused
    # Torch's own function has no gradient with respect to the statistics.
    factor = scale * torch.rsqrt(variance + epsilon)
    shape = [-1] + [1] * (x.ndim - 2)
    result = x * factor.reshape(shape) + (bias - mean * factor).reshape(shape)
    return result.to(x.dtype)


def group_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    epsilon: float = 1e-5,
    stash_type: torch.dtype = torch.float32,
) -> Tensor:
    """Normalise groups of channels of [N, C, …]; scale and bias are [C]."""
    result = torch.group_norm(_at_least(x, stash_type), num_groups, eps=epsilon).to(x.dtype)
    shape = [1, -1] + [1] * (x.ndim - 2)
    return result * scale.reshape(shape) + bias.reshape(shape)


def instance_normalization(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """Normalise each channel of each sample of [N, C, …]."""
    # Torch's own function refuses samples of one element.
    return torch.group_norm(x, x.shape[1], scale, bias, eps=epsilon)


def mean_variance_normalization(x: Tensor, *, axes: Sequence[int] = (0, 2, 3)) -> Tensor:
    """``(x − mean) / (deviation + 1e-9)`` over ``axes``."""
    dims = list(axes)
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True).sqrt() + 1e-9)


def local_response_normalization(
    x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0
) -> Tensor:
    """``x / (bias + alpha / size · Σ x²)^beta``, the sum over ``size`` channels around each one."""
    squares = x.square().movedim(1, -1)
    around = F.pad(squares, ((size - 1) // 2, size // 2)).unfold(-1, size, 1).sum(-1)
    return x / (bias + alpha / size * around.movedim(-1, 1)) ** beta


def lp_normalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """Divide by the norm along ``axis``; zeros stay zeros."""
    norm = torch.linalg.vector_norm(x, ord=p, dim=axis, keepdim=True)
    result: Tensor = x / norm.masked_fill(norm == 0, math.inf)
    return result


def _at_least(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the precision asked for, or in its own if that is higher."""
    return x.to(torch.promote_types(x.dtype, dtype))


OPS = standard(
    {
        "BatchNormalization": Lowering(batch_normalization, only={"training_mode": 0}),
        "GroupNormalization": group_normalization,
        "InstanceNormalization": instance_normalization,
        "LayerNormalization": layer_normalization,
        "LRN": local_response_normalization,
        "LpNormalization": lp_normalization,
        "MeanVarianceNormalization": mean_variance_normalization,
        "RMSNormalization": rms_normalization,
    }
)
