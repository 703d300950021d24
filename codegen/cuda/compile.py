"""Compiling kernels at run time by NVRTC, without a GPU and without a CUDA toolkit, and keeping the result.

Cubins are kept in planish's cache folder under a hash of everything that they depend on: the sources, the
constants, the architecture and the compiler's version.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import io
import re
from typing import Any

from ...ir.errors import TargetError
from ...ir.files import write_whole
from ..machine import cache_directory
from .kernel import KERNELS, Kernel

_STANDARD = "c++17"


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        registers: of a thread.
        spilled_bytes: of registers, per thread, that did not fit and go through memory.
        stack_bytes: of a thread.
    """

    registers: int
    spilled_bytes: int
    stack_bytes: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel for one architecture: its machine code, and what it takes."""

    cubin: bytes
    resources: Resources


def compiled(kernel: Kernel, architecture: str) -> Compiled:
    """Compile a kernel, or read it from the cache.

    Args:
        kernel: which variant.
        architecture: such as ``sm_90a``.

    Raises:
        TargetError: cuda-core or NVRTC is not installed, or the source does not compile.
    """
    folder = cache_directory() / "cubins"
    stem = folder / _key(kernel, architecture)
    code, log = stem.with_suffix(".cubin"), stem.with_suffix(".log")
    with contextlib.suppress(OSError, TargetError):
        return Compiled(code.read_bytes(), resources(log.read_text(), kernel))
    found, text = _compile(kernel, architecture)
    result = Compiled(found, resources(text, kernel))
    folder.mkdir(parents=True, exist_ok=True)
    # The code last: an entry without its log is compiled again.
    write_whole(log, text.encode())
    write_whole(code, found)
    return result


def resources(log: str, kernel: Kernel) -> Resources:
    """What the assembler says of a kernel in its log.

    Raises:
        TargetError: it says nothing.
    """
    registers = re.search(r"Used (\d+) registers", log)
    memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if registers is None or memory is None:
        raise TargetError(f"cuda: the compiler's log of {kernel} does not say what it takes")
    stack, stores, loads = map(int, memory.groups())
    return Resources(int(registers.group(1)), stores + loads, stack)


def _compile(kernel: Kernel, architecture: str) -> tuple[bytes, str]:
    core = cuda_core()
    options = core.ProgramOptions(
        name=kernel.source.name,
        arch=architecture,
        std=_STANDARD,
        include_path=[str(KERNELS)],
        define_macro=[(name, str(value)) for name, value in kernel.constants],
        ptxas_options=["-v"],
    )
    log = io.StringIO()
    try:
        program = core.Program(kernel.source.read_text(), "c++", options)
        code = program.compile("cubin", logs=log).code
    except Exception as error:
        raise TargetError(f"cuda: {kernel} does not compile for {architecture}: {error}") from error
    return bytes(code), log.getvalue()


def cuda_core() -> Any:
    """The module `cuda.core`.

    Raises:
        TargetError: it is not installed.
    """
    return _imported("cuda.core")


def cuda_bindings(name: str) -> Any:
    """A module of `cuda.bindings`.

    Raises:
        TargetError: it is not installed.
    """
    return _imported(f"cuda.bindings.{name}")


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TargetError(f"cuda: {name} is not installed", hint="pip install 'planish[cuda]'") from error


def compiler_version() -> str:
    """NVRTC's, such as ``13.4``."""
    nvrtc = cuda_bindings("nvrtc")
    error, major, minor = nvrtc.nvrtcVersion()
    if int(error):
        raise TargetError(f"cuda: NVRTC does not say its version: {error}")
    return f"{major}.{minor}"


def _key(kernel: Kernel, architecture: str) -> str:
    text = [architecture, _STANDARD, compiler_version(), str(kernel)]
    text += [path.read_text() for path in sorted({kernel.source, *KERNELS.glob("*.cuh")})]
    return hashlib.sha256("\0".join(text).encode()).hexdigest()
