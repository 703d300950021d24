"""Run only the first passes of a pipeline, in the manner of LLVM's OptBisect."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from .base import Instrument, Invocation


class BisectLimit(Instrument):
    """Counts pass invocations and skips all after the first ``limit``.

    Args:
        limit: how many passes may run.
        write: takes one line about each pass, whether it runs or not.
    """

    def __init__(self, limit: int, write: Callable[[str], object] | None = None) -> None:
        self.limit = limit
        self.count = 0
        self._write = write

    def should_run(self, invocation: Invocation, model: ir.Model) -> bool:
        """Whether this invocation is still within the limit."""
        del model
        self.count += 1
        runs = self.count <= self.limit
        if self._write is not None:
            verb = "running" if runs else "NOT running"
            self._write(f"BISECT: {verb} pass ({self.count}) {invocation.pass_.name}")
        return runs
