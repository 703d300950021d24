"""Launching kernels on a GPU, on torch's current stream."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch

from ...ir.errors import TargetError
from .compile import compiled, cuda_bindings, cuda_core
from .hardware import Gpu, present
from .kernel import Argument, Kernel, Launch

_WITHOUT_ASKING = 48 * 1024
"""Bytes of dynamic shared memory that a kernel has without asking for more."""


class GpuLauncher:
    """Launches on one device.

    Args:
        device: torch's number of it.

    Attributes:
        gpu: what it is.
    """

    def __init__(self, device: int = 0) -> None:
        torch.cuda.current_stream(device)  # torch's own context is the one that kernels run in
        self._core = cuda_core()
        self._device = self._core.Device(device)
        self._device.set_current()
        self._number = device
        self.gpu: Gpu = present(device)
        self._loaded = functools.cache(self._load)

    def launch(self, launch: Launch, arguments: Sequence[Argument]) -> None:
        """See `Launcher`."""
        stream = self._core.Stream.from_handle(torch.cuda.current_stream(self._number).cuda_stream)
        config = self._core.LaunchConfig(
            grid=launch.grid, block=launch.threads, shmem_size=launch.shared_bytes
        )
        kernel = self._loaded(launch.kernel, launch.shared_bytes)
        self._core.launch(stream, config, kernel, *map(_passed, arguments))

    def _load(self, kernel: Kernel, shared_bytes: int) -> Any:
        driver = cuda_bindings("driver")
        code = self._core.ObjectCode.from_cubin(compiled(kernel, self.gpu.architecture).cubin)
        loaded = code.get_kernel(kernel.name)
        if shared_bytes > _WITHOUT_ASKING:
            (error,) = driver.cuKernelSetAttribute(
                driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                shared_bytes,
                driver.CUkernel(int(loaded.handle)),
                driver.CUdevice(self._number),
            )
            if int(error):
                raise TargetError(
                    f"cuda: {kernel} was refused {shared_bytes} bytes of shared memory: {error}"
                )
        return loaded


def _passed(argument: Argument) -> Any:
    """A pointer, or a number of 32 bits: plain ones would be passed as 64."""
    if argument is None:
        return 0
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int32(argument)
