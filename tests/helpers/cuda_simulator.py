"""Runs planish's CUDA kernels on the host: see `codegen/cuda/simulator/simulator.h` for how."""

import dataclasses
import functools
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from planish.codegen.cuda.kernel import KERNELS, Argument, Kernel, Launch

_SIMULATOR = Path(__file__).parents[1] / "codegen" / "cuda" / "simulator"
_ORDERS = ("forward", "backward", "shuffled")
_FLAGS = ("-std=c++17", "-O1", "-g", "-mf16c", "-mfma", "-w", "-DPLANISH_SIMULATOR")
SANITIZERS = {
    "": (),
    "address": ("-fsanitize=address",),
    "thread": ("-fsanitize=thread",),
}
compiler = shutil.which("g++")
needs_compiler = pytest.mark.skipif(compiler is None, reason="kernels are compiled for the host by g++")


class SimulationError(Exception):
    """A kernel did what no kernel may do; the text says what."""


@dataclasses.dataclass(frozen=True)
class Simulator:
    """Launches kernels on the host.

    Attributes:
        order: in which threads have their turns: forward, backward, or shuffled.
        late: asynchronous copies land when they are waited for, and not at once.
        seed: of the shuffled order.
        sanitizer: address or thread; none by default.
        kernels: folder of the sources.
    """

    order: str = "forward"
    late: bool = True
    seed: int = 0
    sanitizer: str = ""
    kernels: Path = KERNELS

    def launch(self, launch: Launch, arguments: Sequence[Argument]) -> None:
        """Run a kernel; buffers are written in place.

        Raises:
            SimulationError: what the simulator or a sanitizer found.
        """
        runner = _build(launch.kernel, self.kernels, self.sanitizer)
        header = [*launch.grid, launch.threads, 1, 1, launch.shared_bytes]
        header += [_ORDERS.index(self.order), int(self.late), self.seed, len(arguments)]
        content = struct.pack(f"<{len(header)}I", *header) + b"".join(map(_encoded, arguments))
        with tempfile.TemporaryDirectory() as folder:
            given, found = Path(folder) / "launch", Path(folder) / "result"
            given.write_bytes(content)
            options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "exitcode=66"}
            process = subprocess.run(
                [runner, given, found], capture_output=True, text=True, env=os.environ | options, timeout=300
            )
            if process.returncode:
                raise SimulationError(_reason(process))
            _decode(found.read_bytes(), arguments)


def _encoded(argument: Argument) -> bytes:
    if argument is None:
        return struct.pack("<II", 1, 0)
    if isinstance(argument, torch.Tensor):
        assert argument.is_contiguous()
        content = _bytes(argument)
        return struct.pack("<II", 1, len(content)) + content
    return struct.pack("<II", 0, 4) + struct.pack("<f" if isinstance(argument, float) else "<i", argument)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _decode(content: bytes, arguments: Sequence[Argument]) -> None:
    at = 0
    for argument in arguments:
        if isinstance(argument, torch.Tensor) and argument.numel():
            part = bytearray(content[at : at + argument.nbytes])
            argument.view(-1).view(torch.uint8).copy_(torch.frombuffer(part, dtype=torch.uint8))
            at += argument.nbytes
    assert at == len(content)


def _reason(process: subprocess.CompletedProcess) -> str:
    lines = process.stderr.splitlines()
    summary = next((line for line in lines if line.startswith("SUMMARY:") or "runtime error:" in line), "")
    return summary or (lines[-1] if lines else f"it ended with {process.returncode}")


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="planish-simulator-")


@functools.cache
def _standard_headers(flags: Sequence[str]) -> Path:
    """Those that the simulator includes, compiled once: parsing them takes longer than a kernel does."""
    headers = Path(tempfile.mkdtemp(dir=_temporary().name)) / "standard.h"
    texts = [path.read_text() for path in (*_SIMULATOR.glob("*.h"), _SIMULATOR / "main.cpp")]
    found = {line for text in texts for line in text.splitlines() if line.startswith("#include <")}
    headers.write_text("\n".join(sorted(found)))
    subprocess.run([compiler, *flags, "-x", "c++-header", headers], check=True)
    return headers


@functools.cache
def _build(kernel: Kernel, kernels: Path, sanitizer: str) -> Path:
    runner = Path(tempfile.mkdtemp(dir=_temporary().name)) / kernel.name
    defined = {**dict(kernel.constants), "KERNEL_NAME": kernel.name}
    source = kernels / f"{kernel.name}.cu"
    flags = (*_FLAGS, *SANITIZERS[sanitizer])
    process = subprocess.run(
        [
            compiler,
            *flags,
            "-include",
            str(_standard_headers(flags)),
            *(f"-D{name}={value}" for name, value in defined.items()),
            f'-DKERNEL_FILE="{source}"',
            f"-I{_SIMULATOR}",
            f"-I{kernels}",
            str(_SIMULATOR / "main.cpp"),
            "-o",
            str(runner),
        ],
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise SimulationError(f"{kernel} does not compile for the host: {process.stderr[:2000]}")
    return runner
