"""Results of long work on disk, so that a run that was killed goes on where it was.

    <cache folder>/work/<pass>-<key>/     of one pass on one model: what decides its results is in the key
        about.json                        for people: the pass, its pipeline, when
        lock                              held by the process that uses the folder
        <digest>.result                   one layer: SHA-256 of what follows, then arrays as safetensors
        …                                 whatever else the pass keeps, which it checks itself

The key is a hash of the model's graph and weights, the data, the seed, the place in the pipeline, planish's
own code and the versions of the libraries that compute. Options of the pass are in the digests of layers, or
in what the pass checks itself, so that what does not depend on an option is found again after it changed.

Files are written under another name and moved. One that is damaged, or of another key, counts as not there.
A second process that works on the same keeps its results to itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import safetensors.numpy

from ..codegen.machine import cache_directory
from ..ir.content_hash import graph_hash
from ..ir.errors import InputError
from ..ir.files import write_whole
from .calibration.data import Feeds

Array = npt.NDArray[Any]

LIMIT_VARIABLE = "PLANISH_CACHE_LIMIT"
"""Environment variable: bytes that results may take before the oldest are deleted."""
_DEFAULT_LIMIT = 20 << 30
_DIGEST_BYTES = hashlib.sha256().digest_size
_LIBRARIES = ("numpy", "onnx-ir", "onnxruntime", "scipy", "torch")


@dataclasses.dataclass(frozen=True)
class Work:
    """What is kept of one pass on one model.

    Attributes:
        folder: for files that the pass keeps and checks itself.
        keeps: whether results outlive the process.
    """

    folder: Path
    keeps: bool

    def recall(self, subject: str, decided_by: str) -> dict[str, Array] | None:
        """What was kept of a subject, such as a layer; None if there is nothing whole.

        Args:
            subject: its name.
            decided_by: what decides the result besides the key, such as options, in words.
        """
        if not self.keeps:
            return None
        path = self._path(subject, decided_by)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        digest, stored = content[:_DIGEST_BYTES], memoryview(content)[_DIGEST_BYTES:]
        if hashlib.sha256(stored).digest() != digest:
            path.unlink(missing_ok=True)
            return None
        return _unpacked(bytes(stored))

    def keep(self, subject: str, decided_by: str, arrays: Mapping[str, Array]) -> None:
        """Keep a result. A disk that is full or read-only costs time later, so nothing is raised."""
        if self.keeps:
            stored = _packed(arrays)
            with contextlib.suppress(OSError):
                write_whole(self._path(subject, decided_by), hashlib.sha256(stored).digest() + stored)

    def forget(self, subject: str, decided_by: str) -> None:
        """Delete what was kept of a subject, if anything was."""
        with contextlib.suppress(OSError):
            self._path(subject, decided_by).unlink(missing_ok=True)

    def _path(self, subject: str, decided_by: str) -> Path:
        digest = hashlib.sha256(json.dumps([subject, decided_by]).encode()).hexdigest()
        return self.folder / f"{digest[:40]}.result"


def _packed(arrays: Mapping[str, Array]) -> bytes:
    """Types that safetensors does not know are stored as bytes under ``name:type:shape``."""
    plain = {}
    for name, array in arrays.items():
        if array.dtype.name in _PLAIN:
            plain[name] = np.asarray(array, order="C")
        else:
            shape = "x".join(map(str, array.shape))
            plain[f"{name}:{array.dtype.name}:{shape}"] = np.frombuffer(array.tobytes(), np.uint8)
    return safetensors.numpy.save(plain)


def _unpacked(stored: bytes) -> dict[str, Array]:
    arrays = {}
    for label, array in safetensors.numpy.load(stored).items():
        name, *stored_as = label.split(":")
        if stored_as:
            dtype, shape = stored_as
            array = array.view(getattr(ml_dtypes, dtype)).reshape(
                [int(size) for size in shape.split("x") if size]
            )
        arrays[name] = array
    return arrays


_PLAIN = frozenset(
    {"bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"}
    | {"float16", "float32", "float64"}
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One folder of the cache.

    Attributes:
        path: of the folder.
        about: what it says of itself: pass, pipeline.
        bytes: of its files.
        used: when it was used last, in seconds since 1970.
    """

    path: Path
    about: Mapping[str, str]
    bytes: int
    used: float


class WorkCache:
    """All results that are kept.

    Args:
        folder: where; by default that of the user.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = (cache_directory() / "work") if folder is None else folder

    @contextlib.contextmanager
    def opened(self, name: str, key: str, about: Mapping[str, str]) -> Iterator[Work]:
        """What is kept under a key, for as long as the block lasts.

        A folder that another process holds, or that cannot be written, is replaced by a temporary one.
        """
        folder = self.folder / f"{name}-{key[:32]}"
        with contextlib.ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(filelock.FileLock(folder / "lock", timeout=0))
                write_whole(folder / "about.json", json.dumps(dict(about)).encode())
            except (OSError, filelock.Timeout):
                yield stack.enter_context(without_cache())
                return
            yield Work(folder, keeps=True)

    def entries(self) -> list[Entry]:
        """All folders, the one that was used last first."""
        found = [_entry(path) for path in self.folder.glob("*") if path.is_dir()]
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    def clear(self) -> int:
        """Delete everything that no process is using; gives the bytes that are free now."""
        return sum(_delete(entry) for entry in self.entries())

    def trim(self, limit: int | None = None) -> int:
        """Delete the oldest results beyond so many bytes, by default those of `LIMIT_VARIABLE` or 20 GB."""
        limit = _limit() if limit is None else limit
        total, freed = 0, 0
        for entry in self.entries():
            total += entry.bytes
            if total > limit:
                freed += _delete(entry)
        return freed


def _limit() -> int:
    given = os.environ.get(LIMIT_VARIABLE, str(_DEFAULT_LIMIT))
    if not given.isdecimal():
        raise InputError(f"{LIMIT_VARIABLE}: expected a number of bytes, found {given!r}")
    return int(given)


def _entry(path: Path) -> Entry:
    about: Mapping[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((path / "about.json").read_text())
        about = {str(name): str(text) for name, text in found.items()} if isinstance(found, dict) else {}
    sizes, times = [0], [0.0]
    for file in path.rglob("*"):
        with contextlib.suppress(OSError):  # another process may be at work
            status = file.stat()
            sizes.append(status.st_size if file.is_file() else 0)
            times.append(status.st_mtime)
    return Entry(path, about, sum(sizes), max(times))


def _delete(entry: Entry) -> int:
    try:
        with filelock.FileLock(entry.path / "lock", timeout=0):
            shutil.rmtree(entry.path)
    except (OSError, filelock.Timeout):
        return 0
    return entry.bytes


@contextlib.contextmanager
def without_cache() -> Iterator[Work]:
    """A folder that is gone afterwards; results of layers are not kept."""
    with tempfile.TemporaryDirectory(prefix="planish-") as folder:
        yield Work(Path(folder), keeps=False)


def work_key(model: ir.Model, data: Sequence[Sequence[Feeds]], *others: object) -> str:
    """A hash of all that decides what passes compute, but for their options.

    Args:
        model: as the pass finds it.
        data: what it may run the model on.
        others: seed, place in the pipeline, ….
    """
    digest = hashlib.sha256(code_version().encode())
    digest.update(graph_hash(model).encode())
    for feeds in data:
        digest.update(f"{len(feeds)} batches;".encode())
        for batch in feeds:
            for name, array in sorted(batch.items()):
                digest.update(f"{name}:{array.dtype}:{array.shape};".encode())
                digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    digest.update(repr(others).encode())
    return digest.hexdigest()


@functools.cache
def code_version() -> str:
    """A hash of planish's own code, with the versions of the libraries that compute."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for room in ("codegen", "ir", "passes", "runtime"):
        for path in sorted((root / room).rglob("*.py")):
            digest.update(path.read_bytes())
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES)
    return f"{digest.hexdigest()} {versions}"


OpenWork = Callable[[ir.Model], contextlib.AbstractContextManager[Work]]
"""Opens what is kept of a pass on a model."""


def age(entry: Entry) -> float:
    """Seconds since an entry was used."""
    return max(0.0, time.time() - entry.used)
