"""What is launched: a kernel's source with its constants, and the grid, the block the arguments of a call.

A kernel is one ``.cu`` file of `KERNELS` whose tile sizes and types are constants of the compiler, so that
one source gives many kernels. Nothing here needs a GPU: what launches is a `Launcher`, on a GPU (`.gpu`) or,
in the tests, a simulator on the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

KERNELS = Path(__file__).parent / "kernels"
ELEMENTS = {torch.float16: "Half", torch.bfloat16: "BFloat", torch.float32: "float"}
"""Names of element types in the sources."""

Argument = torch.Tensor | int | float | None


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One variant of a kernel.

    Attributes:
        name: of the file, without ``.cu``, and of the function in it.
        constants: what the source is compiled with.
    """

    name: str
    constants: tuple[tuple[str, str | int], ...] = ()

    @property
    def source(self) -> Path:
        """The file."""
        return KERNELS / f"{self.name}.cu"

    def __str__(self) -> str:
        return f"{self.name}<{', '.join(f'{name}={value}' for name, value in self.constants)}>"


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of a kernel, without its arguments.

    Attributes:
        kernel: which.
        grid: blocks along x, y and z.
        threads: of a block.
        shared_bytes: of dynamic shared memory.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int = 0


class Launcher(Protocol):
    """Where kernels run."""

    def launch(self, launch: Launch, arguments: Sequence[Argument]) -> None:
        """Run a kernel.

        Args:
            launch: which, and how large.
            arguments: tensors, contiguous, as pointers, None for a null pointer; integers as 32-bit ones.
        """


def padded(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """Zeros behind the last axis up to this length; the tensor itself where there are none to add."""
    missing = length - tensor.shape[-1]
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor
