"""What a process that is a worker does: one piece on one thread, with a shared value that it fetched once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .thread_limit import one_blas_thread

_held: tuple[str, Any] = ("", None)
"""Which shared value this process has, and the value."""


def do_piece(function: Callable[[Any, Any], Any], name: str, fetch: Callable[[], Any], item: Any) -> Any:
    """``function(shared, item)``.

    Args:
        function: see `planish.runtime.workers.Workers.map`.
        name: of the shared value; another name is another value.
        fetch: gives the value, and is called when the process has another one, or none.
        item: what the piece is about.
    """
    global _held
    import torch

    torch.set_num_threads(1)
    if _held[0] != name:
        _held = ("", None)  # the one before is gone before the next is fetched
        _held = (name, fetch())
    with one_blas_thread():
        return function(_held[1], item)
