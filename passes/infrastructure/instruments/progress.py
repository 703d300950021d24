"""Progress bars in a terminal: one for the pipeline, one for the loop that the current pass is in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .base import Instrument, Invocation


class ProgressBars(Instrument):
    """Shows which pass runs and how far its loops are; as a context manager, it owns the last lines.

    Args:
        console: where to; nothing is drawn if it is not a terminal.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._passes = self._progress.add_task("passes", total=None, visible=False)

    def __enter__(self) -> ProgressBars:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def before(self, invocation: Invocation, model: ir.Model) -> None:
        """Show the pass that starts."""
        del model
        self._progress.update(
            self._passes,
            description=invocation.pass_.name,
            total=len(invocation.pipeline),
            completed=invocation.position,
            visible=True,
        )

    def progress(
        self, invocation: Invocation, items: Iterator[Any], total: int, description: str
    ) -> Iterator[Any]:
        """Show one loop of the pass while it runs."""
        del invocation
        task = self._progress.add_task(f"  {description}", total=total)
        with contextlib.ExitStack() as stack:
            stack.callback(self._progress.remove_task, task)
            for item in items:
                yield item
                self._progress.advance(task)
