"""Wall time and peak memory of every pass. The driver always adds this one, closest to the pass."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from .base import Instrument, Invocation

if sys.platform != "win32":
    import resource


class TimeAndMemory(Instrument):
    """Writes ``seconds`` and ``peak_memory_growth`` of the invocation."""

    @contextlib.contextmanager
    def around(self, invocation: Invocation) -> Iterator[None]:
        """Measure the pass."""
        peak_before = peak_memory_bytes()
        start = time.perf_counter()
        try:
            yield
        finally:
            invocation.seconds = time.perf_counter() - start
            peak_after = peak_memory_bytes()
            if peak_before is not None and peak_after is not None:
                invocation.peak_memory_growth = peak_after - peak_before


def peak_memory_bytes() -> int | None:
    """The most memory this process has held so far, resident, in bytes; None where the system is silent.

    Linux is asked for its high-water mark first: ``ru_maxrss`` of a process begins with what the process that
    started it had.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
