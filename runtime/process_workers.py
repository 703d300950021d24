"""Workers that are processes of this machine.

For work in many small operations, such as the loop of GPTQ, in which threads wait for the interpreter's lock.
Each process takes seconds to import what it needs, and pieces are sent to it and back, so they are for long
work. What all pieces share is written to a temporary file once, whose arrays the processes map: it is in
memory once for all of them.

joblib's loky starts the processes: unlike those of the standard library they do not run the caller's main
module again, so that scripts need no ``if __name__ == "__main__"``.

Source: https://joblib.readthedocs.io and https://loky.readthedocs.io.
"""

from __future__ import annotations

import functools
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import joblib

from ..ir.errors import InputError, WorkerError
from .thread_limit import one_blas_thread
from .worker_process import do_piece
from .workers import AHEAD, in_order, usable_cores

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")

_IDLE_SECONDS = 300
"""After which a process without work ends; it would outlive a caller that was killed otherwise."""


class LocalProcesses:
    """Processes of this machine, one piece to each.

    Args:
        count: how many; by default one for each core that this process may use.

    Raises:
        InputError: the count is not positive.
    """

    def __init__(self, count: int | None = None) -> None:
        if count is not None and count < 1:
            raise InputError(f"workers: expected a positive number of processes, found {count}")
        self.count = count or usable_cores()
        self._started: Executor | None = None
        self._lock = threading.Lock()

    def map(self, function: Callable[[S, T], R], shared: S, items: Iterable[T]) -> Iterator[R]:
        """See `planish.runtime.workers.Workers.map`.

        Raises:
            WorkerError: a process was lost.
        """
        pool = self._pool()
        with (
            tempfile.TemporaryDirectory(prefix="planish-", ignore_cleanup_errors=True) as folder,
            one_blas_thread(),
        ):
            path = f"{folder}/shared"
            joblib.dump(shared, path)
            yield from in_order(
                items,
                most=self.count + AHEAD,
                submit=lambda item: pool.submit(_run, function, path, item),
                result=self._result,
                cancel=lambda future: future.cancel(),
            )

    def _result(self, future: Future[R]) -> R:
        try:
            return future.result()
        except BrokenProcessPool as error:
            self.close()
            raise WorkerError(
                "workers: a process was lost: it was killed, or crashed",
                hint="with too little memory, ask for fewer processes; results that are kept are found again",
            ) from error

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        with self._lock:
            pool, self._started = self._started, None
        if pool is not None:
            pool.shutdown(wait=True, kill_workers=True)  # type: ignore[call-arg]

    def _pool(self) -> Executor:
        with self._lock:
            if self._started is None:
                from joblib.externals.loky import ProcessPoolExecutor

                self._started = ProcessPoolExecutor(
                    self.count, timeout=_IDLE_SECONDS, initializer=_begin_process
                )
            return self._started


def _begin_process() -> None:
    from joblib.externals.loky import process_executor

    # Ctrl-C reaches all processes of a terminal; the caller ends these.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A process that grows by more than this is replaced, which takes seconds. A shared value, of which ever
    # more pages are mapped, is no leak.
    process_executor._MAX_MEMORY_LEAK_SIZE = sys.maxsize


def _run(function: Callable[[Any, Any], Any], path: str, item: Any) -> Any:
    """Do one piece in a process."""
    return do_piece(function, path, functools.partial(joblib.load, path, mmap_mode="r"), item)
