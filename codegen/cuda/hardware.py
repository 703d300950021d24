"""What a kernel's plan has to know of a GPU, and the figures of those that plans are made for without one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: of the product.
        capability: compute capability.
        processors: streaming multiprocessors.
        shared_bytes: that a block may have, asked for.
        bandwidth: of its memory, bytes per second.
        half_rate: products of 16-bit floats on tensor cores, operations per second, dense.
        int8_rate: the same of 8-bit integers.
        clock: of the processors, per second.
        warp_share: of those rates, what instructions of one warp (``mma``) reach. Hopper's tensor cores need
            those of four for more: 62.9 % were measured (https://arxiv.org/abs/2402.13499).
    """

    name: str
    capability: tuple[int, int]
    processors: int
    shared_bytes: int
    bandwidth: float
    half_rate: float
    int8_rate: float
    clock: float
    warp_share: float = 1.0

    @property
    def architecture(self) -> str:
        """As the compiler calls it; from 9.0 on with all that this very generation has."""
        major, minor = self.capability
        return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", (8, 0), 108, 163 * 1024, 2.039e12, 312e12, 624e12, 1.41e9),
        Gpu("RTX 3090", (8, 6), 82, 99 * 1024, 0.936e12, 71e12, 142e12 * 2, 1.70e9),
        Gpu("L4", (8, 9), 58, 99 * 1024, 0.300e12, 121e12, 242e12, 2.04e9),
        Gpu("H100", (9, 0), 132, 227 * 1024, 3.35e12, 989e12, 1979e12, 1.83e9, 0.63),
        Gpu("H200", (9, 0), 132, 227 * 1024, 4.8e12, 989e12, 1979e12, 1.83e9, 0.63),
    )
}
"""By name; figures of the makers' data sheets, without sparsity."""


def present(device: int = 0) -> Gpu:
    """The GPU of this machine: its sizes as the driver says them, its rates from the table.

    One that the table does not know has the rates of one of its generation; they only matter for predictions.
    """
    found = torch.cuda.get_device_properties(device)
    capability = (found.major, found.minor)
    named = next((gpu for name, gpu in GPUS.items() if name in found.name), None)
    near = named or min(GPUS.values(), key=lambda gpu: abs(_number(gpu.capability) - _number(capability)))
    return dataclasses.replace(
        near,
        name=found.name,
        capability=capability,
        processors=found.multi_processor_count,
        shared_bytes=int(getattr(found, "shared_memory_per_block_optin")),  # noqa: B009 (torch's stubs lack it)
    )


def _number(capability: tuple[int, int]) -> int:
    return 10 * capability[0] + capability[1]
