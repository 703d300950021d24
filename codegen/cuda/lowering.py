"""The ops of the domain ``planish.cuda``, which bound graphs have, as calls of our torch ops.

W4A16               x, weights, scales, shifts, bias               → y
W8A8                integers of x, their scales, weights, scales, bias → y
Normalize           x, weight, bias                                → y
NormalizeQuantize   the same                                       → integers, scales; also of no norm
SwiGLU              [g, u]                                         → g · sigmoid(g) · u
SwiGLUQuantize      the same                                       → integers, scales
Hadamard            x, signs of A                                  → scale · x · (I ⊗ A ⊗ S)
HadamardQuantize    the same, of whole rows                        → integers, scales
"""

from __future__ import annotations

import torch

from ...ir.graph_builder import CONTRIB
from ..torch_fx.registry import Lowering, OpKey
from . import torch_ops  # noqa: F401 (registers the ops)
from .cached_attention import group_query_attention

DOMAIN = "planish.cuda"

Tensor = torch.Tensor
_Pair = tuple[Tensor, Tensor]


def w4a16(
    x: Tensor,
    weights: Tensor,
    scales: Tensor,
    shifts: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    rows: int,
    columns: int,
    group_size: int,
) -> Tensor:
    """4-bit weights, see `planish.codegen.cuda.w4a16`."""
    found: Tensor = torch.ops.planish.w4a16(x, weights, scales, shifts, bias, rows, columns, group_size)
    return found


def sparse_w4a16(
    x: Tensor,
    weights: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    rows: int,
    columns: int,
    group_size: int,
) -> Tensor:
    """2:4-sparse 4-bit weights, see `planish.codegen.cuda.sparse_w4a16`."""
    found: Tensor = torch.ops.planish.sparse_w4a16(x, weights, scales, bias, rows, columns, group_size)
    return found


def w8a8(
    x: Tensor,
    x_scales: Tensor,
    weights: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    rows: int,
    columns: int,
    group_size: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """Integer activations and weights, see `planish.codegen.cuda.w8a8`."""
    found: Tensor = torch.ops.planish.w8a8(
        x, x_scales, weights, scales, bias, rows, columns, group_size, bits, dtype
    )
    return found


def normalize(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, kind: str, epsilon: float
) -> Tensor:
    """A norm of rows, see `planish.codegen.cuda.rows`."""
    found: Tensor = torch.ops.planish.normalize(x, weight, bias, kind, epsilon)
    return found


def normalize_quantize(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: str,
    epsilon: float,
    levels: int,
    clip: float,
) -> _Pair:
    """The same as integers and scales."""
    found: _Pair = torch.ops.planish.normalize_quantize(x, weight, bias, kind, epsilon, levels, clip)
    return found


def swiglu(gate_up: Tensor) -> Tensor:
    """The gate of a feed-forward network."""
    found: Tensor = torch.ops.planish.swiglu(gate_up)
    return found


def swiglu_quantize(gate_up: Tensor, *, levels: int, clip: float) -> _Pair:
    """The same as integers and scales."""
    found: _Pair = torch.ops.planish.swiglu_quantize(gate_up, levels, clip)
    return found


def hadamard(x: Tensor, signs: Tensor | None = None, *, block: int, scale: float) -> Tensor:
    """A Walsh-Hadamard transform of blocks of the last axis."""
    found: Tensor = torch.ops.planish.hadamard(x.unflatten(-1, (-1, block)), signs, scale)
    return found.flatten(-2)


def hadamard_quantize(
    x: Tensor, signs: Tensor | None = None, *, scale: float, levels: int, clip: float
) -> _Pair:
    """The same of the whole last axis, as integers and scales."""
    found: _Pair = torch.ops.planish.hadamard_quantize(x, signs, scale, levels, clip)
    return found


# The kernels read scales of integer products as float32, whatever the precision of the model.
OPS: dict[OpKey, Lowering] = {
    (DOMAIN, "W4A16"): Lowering(w4a16),
    (DOMAIN, "SparseW4A16"): Lowering(sparse_w4a16),
    (DOMAIN, "W8A8"): Lowering(w8a8, exact=(3,)),
    (DOMAIN, "Normalize"): Lowering(normalize),
    (DOMAIN, "NormalizeQuantize"): Lowering(normalize_quantize, several=True),
    (DOMAIN, "SwiGLU"): Lowering(swiglu),
    (DOMAIN, "SwiGLUQuantize"): Lowering(swiglu_quantize, several=True),
    (DOMAIN, "Hadamard"): Lowering(hadamard),
    (DOMAIN, "HadamardQuantize"): Lowering(hadamard_quantize, several=True),
    (CONTRIB, "GroupQueryAttention"): Lowering(
        group_query_attention, integers=(6,), exact=(12, 13), several=True
    ),
}
"""How the torch module calls them."""
