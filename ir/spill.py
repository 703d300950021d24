"""New weights of a large model: in a temporary file that is mapped into memory, and not in memory itself.

    with spilling(folder):
        tensor = ir.Tensor(kept(array))   # the array's numbers, which memory can let go of

The file has no name: the system deletes it when the last tensor in it is gone, and when the process is
killed. Outside of such a block `kept` gives the array itself.
"""

from __future__ import annotations

import contextlib
import contextvars
import mmap
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

_SMALLEST = 1 << 20
"""Bytes of an array from which on it is written."""
_active: contextvars.ContextVar[_File | None] = contextvars.ContextVar("spill", default=None)


class _File:
    """A file that grows."""

    def __init__(self, folder: Path) -> None:
        self._file: BinaryIO = tempfile.TemporaryFile(dir=folder, prefix="planish-")  # noqa: SIM115
        self._end, self._lock = 0, threading.Lock()

    def append(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Write an array; gives a view of it in the file."""
        data = array.reshape(-1).view(np.uint8).data
        with self._lock:
            start = self._end
            self._end += -(-data.nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        written = 0
        while written < data.nbytes:
            written += os.pwrite(self._file.fileno(), data[written:], start + written)
        mapping = mmap.mmap(self._file.fileno(), data.nbytes, access=mmap.ACCESS_READ, offset=start)
        return np.frombuffer(mapping, array.dtype).reshape(array.shape)


@contextlib.contextmanager
def spilling(folder: Path | None) -> Iterator[None]:
    """Keep large new weights in a file of that folder; None: in memory, as outside of the block."""
    token = _active.set(None if folder is None else _File(folder))
    try:
        yield
    finally:
        _active.reset(token)


def kept(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array, or its numbers in the file."""
    file = _active.get()
    if file is None or array.nbytes < _SMALLEST:
        return array
    return file.append(np.ascontiguousarray(array))
