"""What products of packed weights share: plans, and the sum over parts that the depth is split into."""

from __future__ import annotations

import dataclasses

import torch

from .kernel import ELEMENTS, Argument, Kernel, Launch, Launcher

Tensor = torch.Tensor

_THREADS = 128


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a product is run.

    Attributes:
        product: the launch of the product.
        splits: parts that its depth is split into.
        addition: the launch that adds the parts up; None if there is one.
    """

    product: Launch
    splits: int
    addition: Launch | None


@dataclasses.dataclass(frozen=True)
class Fallback:
    """Why no kernel runs a product: it is run by dequantising the weight first.

    Attributes:
        reason: in words.
        by_kernel: whether a kernel dequantises.
    """

    reason: str
    by_kernel: bool = False


def addition(m: int, n: int, dtype: torch.dtype, *, bias: bool) -> Launch:
    """The launch that adds up parts [splits, M, N] float32, N even, and a bias, rounded to ``dtype``."""
    kernel = Kernel(
        "add_parts",
        (
            ("ELEMENT", ELEMENTS[dtype]),
            ("ELEMENT_IS_FLOAT", int(dtype == torch.float32)),
            ("BIAS", int(bias)),
        ),
    )
    return Launch(kernel, (-(-n // (2 * _THREADS)), m, 1), _THREADS)


def run_product(
    plan: Plan, launcher: Launcher, operands: list[Argument], bias: Tensor | None, y: Tensor, *sizes: int
) -> None:
    """Launch a product, and the sum of its parts where there are several.

    Args:
        plan: which.
        launcher: where.
        operands: of the kernel, before y and the parts.
        bias: [N] or None.
        y: [M, N], written.
        sizes: K, and what else comes behind M and N.
    """
    parts = None
    if plan.splits > 1:
        parts = torch.empty(plan.splits, *y.shape, dtype=torch.float32, device=y.device)
    launcher.launch(plan.product, [*operands, y, parts, *y.shape, *sizes])
    if plan.addition is not None:
        launcher.launch(plan.addition, [parts, bias, y, *y.shape, plan.splits])
