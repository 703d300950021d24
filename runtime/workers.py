"""Work that falls into independent pieces, such as layers, done by several workers behind one interface.

    for result in workers.map(function, shared, items): …

``function(shared, item)`` is a top-level function of arrays and options: no session, no graph, and nothing is
changed in place, so that it may run in a thread here or in a process on another machine. Results are the same
to the last bit whatever the workers: pieces are cut by what the work is and not by who does it, each is
computed on one thread, and random draws are seeded by the piece's name.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from ..ir.errors import InputError
from .thread_limit import one_blas_thread

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")
H = TypeVar("H")

AHEAD = 1
"""Pieces that wait for a worker, so that none is idle while the next piece is made."""


class Workers(Protocol):
    """Who does the work."""

    @property
    def count(self) -> int:
        """How many pieces are worked on at a time."""

    def map(self, function: Callable[[S, T], R], shared: S, items: Iterable[T]) -> Iterator[R]:
        """``function(shared, item)`` for each item; results in the order of the items.

        Items are taken when there is room: `count` + `AHEAD` are on their way at a time, results that wait
        for an earlier one included. While this lasts, the calling thread's BLAS has one thread, too.

        Args:
            function: at the top level of a module.
            shared: what all pieces need, such as a covariance; sent to a process once.
            items: one for each piece.

        Raises:
            Exception: what ``function`` raised, as it was, where its result would come; what has not begun
                is not begun then. What making an item raised, after the results of the items before it.
        """

    def close(self) -> None:
        """End what was started; it is started again when there is more work."""


class Serial:
    """The calling thread is the only worker."""

    count = 1

    def map(self, function: Callable[[S, T], R], shared: S, items: Iterable[T]) -> Iterator[R]:
        """See `Workers.map`; one piece after the other."""
        with one_blas_thread():
            for item in items:
                yield function(shared, item)

    def close(self) -> None:
        """Nothing was started."""


SERIAL = Serial()
"""Stateless, so one serves all."""


class LocalWorkers:
    """Threads of this process.

    Most work is array operations, which release the interpreter's lock, and threads read the weights where
    they are. Work in many small operations gains little by threads: see `process_workers`.

    Args:
        count: how many; by default one for each core that this process may use.

    Raises:
        InputError: the count is not positive.
    """

    def __init__(self, count: int | None = None) -> None:
        if count is not None and count < 1:
            raise InputError(f"workers: expected a positive number, found {count}")
        self.count = count or usable_cores()
        self._started: concurrent.futures.ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def map(self, function: Callable[[S, T], R], shared: S, items: Iterable[T]) -> Iterator[R]:
        """See `Workers.map`."""
        pool = self._pool()
        with one_blas_thread():
            yield from in_order(
                items,
                most=self.count + AHEAD,
                submit=lambda item: pool.submit(function, shared, item),
                result=lambda future: future.result(),
                cancel=lambda future: future.cancel(),
            )

    def close(self) -> None:
        """End the threads; pieces that are being worked on are finished first."""
        with self._lock:
            pool, self._started = self._started, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)

    def _pool(self) -> concurrent.futures.ThreadPoolExecutor:
        with self._lock:
            if self._started is None:
                self._started = _threads(self.count)
            return self._started


def _threads(count: int) -> concurrent.futures.ThreadPoolExecutor:
    """Threads in which torch uses no others.

    torch keeps the number for each thread, which takes the one that was set last when it first asks: ours ask
    before the calling thread sets its own again.
    """
    import torch

    all_began = threading.Barrier(count + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()
        all_began.wait()

    before = torch.get_num_threads()
    pool = concurrent.futures.ThreadPoolExecutor(count, "planish-worker", initializer=begin)
    for _ in range(count):
        pool.submit(int)
    all_began.wait()
    torch.set_num_threads(before)
    return pool


def in_order(
    items: Iterable[T],
    *,
    most: int,
    submit: Callable[[T], H],
    result: Callable[[H], R],
    cancel: Callable[[H], Any],
) -> Iterator[R]:
    """Results in the order of the items, with ``most`` pieces on their way at a time.

    Args:
        items: taken when there is room.
        most: pieces that were begun and whose results were not given yet.
        submit: begins a piece and gives a handle on it.
        result: waits for a piece.
        cancel: is called for pieces whose results nobody wants any more.
    """
    pending: collections.deque[H] = collections.deque()
    source = _Source(items)
    try:
        while True:
            while len(pending) < most and not source.is_over:
                # Taken and passed on in one go: an item is held by who works on it, and not here.
                pending.extend(submit(item) for item in source.next())
            if not pending:
                break
            yield result(pending.popleft())
    finally:
        for handle in pending:
            cancel(handle)
    if source.error is not None:
        raise source.error


class _Source(Generic[T]):
    """Items until there are no more, or until making one fails."""

    def __init__(self, items: Iterable[T]) -> None:
        self._items = iter(items)
        self.is_over = False
        self.error: Exception | None = None

    def next(self) -> Iterator[T]:
        """The next item, or nothing."""
        try:
            yield next(self._items)
        except StopIteration:
            self.is_over = True
        except Exception as error:  # noqa: BLE001 — raised when what was begun is finished
            self.is_over, self.error = True, error


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def opened_workers(asked: Workers | int | str | None) -> Iterator[Workers]:
    """Workers for as long as the block lasts; those that were given are not closed.

    Args:
        asked: None for one thread per core; how many threads; ``"processes"`` for one per core, or
            ``"processes:4"`` (see `process_workers`); ``"ray"``, or ``"ray://address"`` of a cluster (see
            `ray_workers`); or workers.

    Raises:
        InputError: it is another text, or Ray is not installed or not reached.
    """
    if asked is None or isinstance(asked, str | int):
        found = _workers_of(asked)
        try:
            yield found
        finally:
            found.close()
    else:
        yield asked


def _workers_of(asked: int | str | None) -> Workers:
    if isinstance(asked, bool):
        raise _unknown(asked)
    if asked is None or isinstance(asked, int):
        return LocalWorkers(asked)
    if asked.isdecimal():
        return LocalWorkers(int(asked))
    if asked == "processes" or re.fullmatch(r"processes:\d+", asked):
        from .process_workers import LocalProcesses

        _, _, count = asked.partition(":")
        return LocalProcesses(int(count) if count else None)
    if asked == "ray" or asked.startswith("ray://"):
        from .ray_workers import RayWorkers

        return RayWorkers(None if asked == "ray" else asked)
    raise _unknown(asked)


def _unknown(asked: object) -> InputError:
    return InputError(
        f"workers: expected a number of threads, 'processes', 'processes:4', 'ray', 'ray://address' or "
        f"workers, found {asked!r}"
    )
