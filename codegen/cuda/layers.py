"""Random layers to time products with, and which of the candidate plans of a product is the fastest."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, cast

import torch

from . import sparse_w4a16, w4a16, w8a8
from .hardware import Gpu
from .kernel import Launcher
from .products import Configuration, Fallback, Plan
from .tuning import Case, Table

Tensor = torch.Tensor
Timer = Callable[[Callable[[], Any]], float]
"""Seconds of a call."""

ROWS = tuple(1 << exponent for exponent in range(13))
"""Of activations, that plans are measured for."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A weight of one kernel, and what it is multiplied with.

    Attributes:
        kernel: module of the product.
        n, k: columns and rows of the weight.
        options: of plans and predictions, beside sizes: group_size, and shifted or bits.
        dtype: of results.
        operands: of ``kernel.run``, after the launcher, for so many rows; the first of them are activations.
    """

    kernel: ModuleType
    n: int
    k: int
    options: Mapping[str, Any]
    dtype: torch.dtype
    operands: Callable[[int], tuple[Any, ...]]

    @property
    def name(self) -> str:
        """Of the kernel."""
        return self.kernel.__name__.rpartition(".")[2]

    def case(self, m: int) -> Case:
        """Its product with so many rows, in a tuning table."""
        return Case(self.name, m, self.n, self.k, str(self.dtype), **self.options)

    def plan(self, m: int, gpu: Gpu, table: Table) -> Plan | Fallback:
        """The plan of its product with so many rows."""
        options = {**self.options, "dtype": self.dtype, "bias": False, "gpu": gpu, "table": table}
        return cast(Plan | Fallback, self.kernel.plan(m, self.n, self.k, **options))

    def candidates(self, m: int, gpu: Gpu) -> Mapping[Configuration, Plan | Fallback]:
        """What `plan` chooses from."""
        options = {**self.options, "dtype": self.dtype, "bias": False, "gpu": gpu}
        found = self.kernel.candidates(m, self.n, self.k, **options)
        return cast(Mapping[Configuration, Plan | Fallback], found)

    def run(self, plan: Plan | Fallback, launcher: Launcher, operands: tuple[Any, ...]) -> Tensor:
        """The product by a plan."""
        return cast(Tensor, self.kernel.run(plan, launcher, *operands))


def _w4a16(n: int, k: int, *, group_size: int, shifted: bool, dtype: torch.dtype) -> Layer:
    scales = _scales(n, k, group_size).to(dtype)
    zero_points = torch.randint(0, 16, scales.shape, dtype=torch.uint8) if shifted else None
    packed = w4a16.pack(torch.randint(0, 16, (k, n), dtype=torch.uint8), scales, zero_points, group_size)
    options = {"group_size": group_size, "shifted": shifted}
    return Layer(w4a16, n, k, options, dtype, lambda m: (torch.randn(m, k, dtype=dtype), packed, None))


def _sparse_w4a16(n: int, k: int, *, group_size: int, dtype: torch.dtype) -> Layer:
    integers = torch.randint(0, 16, (k, n), dtype=torch.uint8)
    integers[torch.arange(k) % 4 > 1] = 8
    packed = sparse_w4a16.pack(integers, _scales(n, k, group_size).to(dtype), group_size)
    options = {"group_size": group_size}
    return Layer(sparse_w4a16, n, k, options, dtype, lambda m: (torch.randn(m, k, dtype=dtype), packed, None))


def _w8a8(n: int, k: int, *, group_size: int, bits: int, dtype: torch.dtype) -> Layer:
    half = 1 << (bits - 1)
    integers = torch.randint(-half, half, (k, n), dtype=torch.int8)
    packed = w8a8.pack(integers, _scales(n, k, group_size), group_size=group_size, bits=bits)

    def operands(m: int) -> tuple[Any, ...]:
        x = torch.randint(-127, 128, (m, k), dtype=torch.int8)
        return x, torch.rand(m) / k, packed, None, dtype

    return Layer(w8a8, n, k, {"group_size": group_size, "bits": bits}, dtype, operands)


def _scales(n: int, k: int, group_size: int) -> Tensor:
    return torch.rand(-(-k // group_size) if group_size else 1, n) * 0.01


_HALF, _BFLOAT = torch.float16, torch.bfloat16
TIMED = (
    functools.partial(_w4a16, group_size=128, shifted=False, dtype=_HALF),
    functools.partial(_sparse_w4a16, group_size=128, dtype=_HALF),
    functools.partial(_w8a8, group_size=0, bits=8, dtype=_HALF),
)
"""Makers of layers, given columns and rows: one of each kernel."""
TUNED = (
    *TIMED,
    functools.partial(_w4a16, group_size=128, shifted=True, dtype=_HALF),
    functools.partial(_w8a8, group_size=0, bits=4, dtype=_HALF),
    functools.partial(_w8a8, group_size=128, bits=4, dtype=_HALF),
    functools.partial(_w4a16, group_size=128, shifted=False, dtype=_BFLOAT),
    functools.partial(_w4a16, group_size=128, shifted=True, dtype=_BFLOAT),
    functools.partial(_sparse_w4a16, group_size=128, dtype=_BFLOAT),
    functools.partial(_w8a8, group_size=0, bits=8, dtype=_BFLOAT),
    functools.partial(_w8a8, group_size=0, bits=4, dtype=_BFLOAT),
    functools.partial(_w8a8, group_size=128, bits=4, dtype=_BFLOAT),
)
"""Those of the formats that the passes make when nothing else is asked for, in both types of activations."""


def fastest(
    launcher: Launcher, gpu: Gpu, timer: Timer, shapes: Sequence[tuple[int, int]], device: str
) -> Iterator[tuple[Case, Configuration]]:
    """Rows of a tuning table: of each layer and number of rows, which candidate takes the least time.

    Args:
        launcher: where kernels run.
        gpu: what plans are made for.
        timer: measures a call.
        shapes: columns and rows of weights.
        device: where tensors live.
    """
    torch.manual_seed(0)
    with torch.device(device):
        for n, k in shapes:
            for make in TUNED:
                layer = make(n, k)
                for m in ROWS:
                    operands = layer.operands(m)
                    seconds = {
                        configuration: timer(functools.partial(layer.run, plan, launcher, operands))
                        for configuration, plan in layer.candidates(m, gpu).items()
                    }
                    yield layer.case(m), min(seconds, key=seconds.__getitem__)
