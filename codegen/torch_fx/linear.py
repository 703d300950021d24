"""Products and determinants of matrices."""

from __future__ import annotations

import torch

from .registry import standard

Tensor = torch.Tensor


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803 - the op's own names
    transB: int = 0,  # noqa: N803
) -> Tensor:
    """``alpha · a · b + beta · c``; a and b transposed where asked."""
    product = torch.matmul(a.mT if transA else a, b.mT if transB else b)
    product = product if alpha == 1 else alpha * product
    if c is None:
        return product
    return product + (c if beta == 1 else beta * c)


def einsum(*operands: Tensor, equation: str) -> Tensor:
    """The sum of products that ``equation`` describes."""
    return torch.einsum(equation, *operands).to(operands[0].dtype)  # torch sums int32 up to int64


OPS = standard({"Det": torch.linalg.det, "Einsum": einsum, "Gemm": gemm, "MatMul": torch.matmul})
