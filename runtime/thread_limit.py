"""One BLAS thread at a time, so that what is computed does not depend on how many there are.

A BLAS cuts a product in as many parts as it has threads, and sums come out different in their last bits. Work
that is split among workers therefore runs on one thread each, with one worker as with many. That is no
slower: two pools of threads on the same cores, one of them spinning, take several times as long as one.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from threadpoolctl import ThreadpoolController

_lock = threading.Lock()
_inside = 0
_limiter: Any = None


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit every BLAS of this process to one thread; the last of blocks that overlap lifts the limit."""
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _inside, _limiter
    import scipy.linalg  # noqa: F401 — it brings a BLAS of its own, which must be there to be limited

    with _lock:
        if not _inside:
            _limiter = ThreadpoolController().limit(limits=1, user_api="blas")
        _inside += 1


def _leave() -> None:
    global _inside, _limiter
    with _lock:
        _inside -= 1
        if not _inside:
            _limiter.restore_original_limits()
            _limiter = None
