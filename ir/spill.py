"""New weights of a large model: in a temporary file that is mapped into memory, and not in memory itself.

    with spilling(folder):
        tensor = ir.Tensor(kept(array))   # the array's numbers, which memory can let go of

Files have no names: the system deletes one when the last tensor in it is gone, and when the process is
killed. Outside of such a block `kept` gives the array itself.
"""

from __future__ import annotations

import contextlib
import contextvars
import mmap
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from .errors import ModelError

_SMALLEST = 1 << 20
"""Bytes of an array from which on it is written."""
_EXTENT = 1 << 30
"""Bytes of a file. What is not written takes no room on the disk."""
_active: contextvars.ContextVar[_Spill | None] = contextvars.ContextVar("spill", default=None)


class _Extent:
    """A file of a fixed size, mapped once: a map of its own for every array would take a descriptor each."""

    def __init__(self, folder: Path, size: int) -> None:
        self._file: BinaryIO = tempfile.TemporaryFile(dir=folder, prefix="planish-")  # noqa: SIM115
        self._file.truncate(size)
        self._mapping = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_READ)
        self._size, self._end = size, 0

    def has_room(self, count: int) -> bool:
        """Whether so many bytes can be appended."""
        return self._end + count <= self._size

    def append(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Write an array; gives a view of it in the file."""
        start = self._end
        self._file.seek(start)
        self._file.write(array.reshape(-1).view(np.uint8).data)
        self._file.flush()
        self._end = start + -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        data = np.frombuffer(self._mapping, np.uint8, array.nbytes, start)
        return data.view(array.dtype).reshape(array.shape)


class _Spill:
    """Extents of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._extent: _Extent | None = None

    def append(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Write an array; gives a view of it in a file.

        Raises:
            ModelError: the folder cannot be written, or the disk is full.
        """
        try:
            with self._lock:
                if self._extent is None or not self._extent.has_room(array.nbytes):
                    self._extent = _Extent(self._folder, max(_EXTENT, array.nbytes))
                return self._extent.append(array)
        except OSError as error:
            raise ModelError(
                f"new weights cannot be kept in {self._folder}: {error.strerror or error}",
                hint="free disk space, or name another folder in PLANISH_CACHE_DIR",
            ) from error


@contextlib.contextmanager
def spilling(folder: Path | None) -> Iterator[None]:
    """Keep large new weights in files of that folder; None: in memory, as outside of the block."""
    token = _active.set(None if folder is None else _Spill(folder))
    try:
        yield
    finally:
        _active.reset(token)


def kept(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array, or its numbers in the file."""
    spill = _active.get()
    if spill is None or array.nbytes < _SMALLEST:
        return array
    return spill.append(np.ascontiguousarray(array))
