"""Progress bars in a terminal: one for the pipeline, one for the loop that the current pass is in."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from ..base import PassResult
from .base import Instrument, Invocation


class ProgressBars(Instrument):
    """Shows which pass runs, how far its loops are and how long they still take.

    As a context manager, it owns the last lines of the terminal.

    Args:
        console: where to; nothing is drawn if it is not a terminal.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeLeftColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        # Passes take times that have nothing to do with each other: what is left of them nobody can say.
        self._passes = self._progress.add_task("passes", total=None, visible=False, is_even=False)

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

    def after(self, invocation: Invocation, model: ir.Model, result: PassResult) -> None:
        """Show, once all passes are done, what comes after them."""
        del model, result
        done = invocation.position + 1
        if done == len(invocation.pipeline):
            self._progress.update(self._passes, description="choose kernels", completed=done)

    def progress(
        self, invocation: Invocation, items: Iterator[Any], total: int, description: str
    ) -> Iterator[Any]:
        """Show one loop of the pass while it runs."""
        del invocation
        task = self._progress.add_task(f"  {description}", total=total, is_even=True)
        with contextlib.ExitStack() as stack:
            stack.callback(self._progress.remove_task, task)
            for item in items:
                yield item
                self._progress.advance(task)


class TimeLeftColumn(ProgressColumn):
    """How long a loop still takes if its steps go on as they did: ``0:03:20 left``.

    rich's own column forgets steps that are older than half a minute, and is silent about loops whose steps
    take longer than that.
    """

    def render(self, task: Task) -> Text:
        """The time that is left, once there is a step to judge by."""
        if not task.fields["is_even"] or not task.completed or task.total is None or task.elapsed is None:
            return Text("")
        seconds = task.elapsed / task.completed * (task.total - task.completed)
        return Text(f"{datetime.timedelta(seconds=round(seconds))} left", style="progress.remaining")
