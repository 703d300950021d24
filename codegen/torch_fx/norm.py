"""Normalisations."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ...ir.errors import TargetError
from .registry import standard

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
    wide = x.to(stash_type)
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
    result = F.layer_norm(x.to(stash_type), shape, eps=epsilon).to(x.dtype) * scale
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
    """Normalise each channel of [N, C, …] with the statistics given.

    Raises:
        TargetError: the node computes the statistics itself, in training mode.
    """
    del momentum  # of training
    if training_mode:
        raise TargetError("torch-fx: BatchNormalization in training mode is not lowered")
    return F.batch_norm(x, mean, variance, scale, bias, eps=epsilon)


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
    result = F.group_norm(x.to(stash_type), num_groups, eps=epsilon).to(x.dtype)
    shape = [1, -1] + [1] * (x.ndim - 2)
    return result * scale.reshape(shape) + bias.reshape(shape)


def instance_normalization(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """Normalise each channel of each sample of [N, C, …]."""
    result: Tensor = F.instance_norm(x, weight=scale, bias=bias, eps=epsilon)
    return result


def lp_normalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """Divide by the norm along ``axis``; zeros stay zeros."""
    norm = torch.linalg.vector_norm(x, ord=p, dim=axis, keepdim=True)
    result: Tensor = x / norm.masked_fill(norm == 0, math.inf)
    return result


OPS = standard(
    {
        "BatchNormalization": batch_normalization,
        "GroupNormalization": group_normalization,
        "InstanceNormalization": instance_normalization,
        "LayerNormalization": layer_normalization,
        "LpNormalization": lp_normalization,
        "RMSNormalization": rms_normalization,
    }
)
