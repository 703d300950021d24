"""Workers on Ray: processes of this machine, or of all machines of a cluster.

Workers import planish and its libraries where they are, so these must be the same everywhere; that is
checked. Bits are the same too where the CPUs are of one kind: a BLAS has other kernels for others.

A piece whose worker is lost (killed, out of memory, its machine gone) is begun again by another one, some
times. What all pieces share is put into the cluster's memory once, and read there by the workers of a machine
together; a process keeps it until other work comes.

Source: Moritz et al., Ray: a distributed framework for emerging AI applications, OSDI 2018; https://docs.ray.io.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from ..ir.errors import InputError, WorkerError
from .thread_limit import one_blas_thread
from .work_cache import code_version
from .worker_process import do_piece
from .workers import AHEAD, in_order

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")


class RayWorkers:
    """Processes of a Ray cluster, one piece to a core.

    Args:
        address: ``"ray://host:10001"`` or ``"host:6379"``. None takes the cluster that this process is
            connected to, the one that the environment variable ``RAY_ADDRESS`` names, or one that runs on
            this machine, and starts one for as long as it is needed where there is none.
        count: processes of a cluster that is started here; by default one for each core.
        retries: how often a piece is begun again when its worker is lost.

    Raises:
        InputError: Ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, address: str | None = None, *, count: int | None = None, retries: int = 3) -> None:
        self._ray = _import_ray()
        self._retries = retries
        self._is_ours = not self._ray.is_initialized()
        if self._is_ours:
            self._connect(address, count)
        self.count = max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def _connect(self, address: str | None, count: int | None) -> None:
        options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if address is not None:
            options["address"] = address
        elif count is not None:
            options |= {"address": "local", "num_cpus": count, "include_dashboard": False}
        try:
            self._ray.init(**options)
        except (ConnectionError, ImportError, RuntimeError, ValueError, OSError) as error:
            where = "on this machine" if address is None else f"at {address}"
            raise InputError(
                f"workers: no Ray cluster was reached {where}: {' '.join(str(error).split())}",
                hint="begin one with `ray start --head`, or leave the address out",
            ) from error

    def map(self, function: Callable[[S, T], R], shared: S, items: Iterable[T]) -> Iterator[R]:
        """See `Workers.map`.

        Raises:
            WorkerError: a piece lost its worker more often than it is begun again.
        """
        ray = self._ray
        task = ray.remote(num_cpus=1, max_retries=self._retries)(_run)
        # In a list a reference travels as it is: a process fetches once what it stands for.
        boxed = [ray.put(shared)]
        version = code_version()
        with one_blas_thread():
            yield from in_order(
                items,
                most=self.count + AHEAD,
                submit=lambda item: task.remote(function, boxed, item, version),
                result=self._result,
                cancel=ray.cancel,
            )

    def _result(self, reference: Any) -> Any:
        try:
            outcome = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise WorkerError(
                f"workers: a worker cannot do what it is given: {_last_line(error)}",
                hint="install what this process imports on all machines of the cluster",
            ) from error
        except self._ray.exceptions.RayError as error:
            raise WorkerError(
                f"workers: {self._retries + 1} workers were lost with the same piece of work: "
                f"{type(error).__name__}",
                hint="a worker that is lost again and again has too little memory as a rule",
            ) from error
        if isinstance(outcome, _Raised):
            raise outcome.error
        return outcome

    def close(self) -> None:
        """Leave the cluster, or end it, unless it was there before."""
        if self._is_ours:
            self._ray.shutdown()


class _Raised:
    """What a function raised: Ray would wrap it."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def _import_ray() -> Any:
    # Workers have nothing to tell anyone else about what is compiled.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "workers: Ray is not installed", hint="pip install 'planish[ray]', or leave --workers out"
        ) from error
    return ray


def _run(function: Callable[[Any, Any], Any], boxed: list[Any], item: Any, version: str) -> Any:
    """Do one piece in a worker."""
    import ray

    if version != code_version():
        return _Raised(
            WorkerError(
                "workers: a worker has another planish, or other versions of its libraries",
                hint="install the same on all machines of the cluster",
            )
        )
    try:
        return do_piece(function, boxed[0].hex(), lambda: ray.get(boxed[0]), item)
    except Exception as error:  # noqa: BLE001 — raised again where the work was asked for
        return _Raised(error)
