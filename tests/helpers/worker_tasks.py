"""Functions that tests give to workers: processes import them by name."""

import os
import pathlib
import signal
import threading
import time

import numpy as np
from planish.ir.errors import PassError

_seen = None
_kept = []


def scaled(factor, number):
    return factor * number


def slow_first(_, number):
    time.sleep(0.3 if number == 0 else 0)
    return number


def failing_at(which, number):
    if number == which:
        raise PassError(f"layer {number} is broken", hint="repair it")
    return number


def process_and_thread(_, item):
    time.sleep(0.05)
    return os.getpid(), threading.get_ident()


def product(matrix, column):
    """Its last bits depend on how many threads a BLAS has."""
    import torch

    return (matrix @ column).sum(), float(torch.from_numpy(column).double().flatten().sum())


def threads(*_):
    """Of every BLAS, and of torch."""
    import torch
    from threadpoolctl import threadpool_info

    blas = {found["num_threads"] for found in threadpool_info() if found["user_api"] == "blas"}
    return sorted(blas), torch.get_num_threads()


def identity_of_shared(shared, _):
    """Whether this process got the shared value once: the second time it is the same object."""
    global _seen
    again = _seen is shared
    _seen = shared
    return os.getpid(), again


def killed(folder, number):
    """Kills its own process the first time that number 2 comes; always if the folder is called hopeless."""
    marker = pathlib.Path(folder) / "killed"
    if number == 2 and (not marker.exists() or marker.parent.name == "hopeless"):
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * np.ones(1000)


def with_another_version(*_):
    return 0


def changes_shared(shared, number):
    shared[0] = number


def type_of_shared(shared, _):
    return shared.dtype.name


def growing(_, count):
    """Keep so many bytes for good; which process."""
    _kept.append(np.ones(count, np.uint8))
    time.sleep(1.1)
    return os.getpid()
