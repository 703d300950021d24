"""What products of packed weights share: plans, and the sum over parts that the depth is split into.

The modules of products are alike: of all ``candidates``, ``plan`` takes the one that was measured to be the
fastest (see `planish.codegen.cuda.tuning`) or is ``predicted`` to be, and ``run`` runs it, or what stands in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final, Literal

import torch

from .hardware import Gpu
from .kernel import ELEMENTS, Argument, Kernel, Launch, Launcher

Tensor = torch.Tensor

Configuration = tuple[int, int] | Literal["library"]
"""What tells the candidates of a product apart: rows of a block and parts of the depth, or `LIBRARY`."""
LIBRARY: Final = "library"
"""The weight is dequantised by a kernel, and the library multiplies."""

_THREADS = 128
_SPLITS = (1, 2, 4, 8, 16)
_MOST_ROUNDS = 16
"""Of blocks on all processors, when a depth is split: its parts are only there to keep them busy."""


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
    """Why no kernel of its own runs a product: its reference does, or the library.

    Attributes:
        reason: in words.
        by_kernel: whether a kernel dequantises the weight for the library.
    """

    reason: str
    by_kernel: bool = False


def ways_to_split(blocks: int, tiles: int, fewest_tiles: int, gpu: Gpu) -> Iterator[int]:
    """Numbers of parts that the depth of a product may be split into.

    Args:
        blocks: of the product, not split.
        tiles: along its depth.
        fewest_tiles: that a part has.
        gpu: where it runs.
    """
    for parts in _SPLITS:
        if parts == 1 or (tiles // parts >= fewest_tiles and blocks * parts <= _MOST_ROUNDS * gpu.processors):
            yield parts


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
