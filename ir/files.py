"""Writing files that appear whole or not at all, whatever interrupts it.

Content is written under temporary names in the folder where it is to be, and moved when it is complete. A
failure or Ctrl-C at any moment leaves either what was there before or what was to be written, and nothing
else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .errors import ModelError


@contextlib.contextmanager
def making(*targets: Path) -> Iterator[tuple[Path, ...]]:
    """Paths to write in place of ``targets``: on success all take their place, on failure none does."""
    label = uuid.uuid4().hex[:12]
    temporary = tuple(target.with_name(f".{target.name}.{label}.tmp") for target in targets)
    with contextlib.ExitStack() as stack:
        for path in temporary:
            stack.callback(_surely, path.unlink, missing_ok=True)
        yield temporary
        for path, target in zip(temporary, targets, strict=True):
            if target.exists():
                shutil.copymode(target, path)
        move_all(temporary, targets)


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A new folder on the same file system as ``path``, gone afterwards with all that is in it."""
    made = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        made.mkdir()
        yield made
    finally:
        _surely(_remove, made)


@contextlib.contextmanager
def replacing(*targets: Path) -> Iterator[tuple[BinaryIO, ...]]:
    """The same with open files."""
    with making(*targets) as paths, contextlib.ExitStack() as stack:
        files = tuple(stack.enter_context(path.open("xb")) for path in paths)
        yield files
        for file in files:
            file.flush()
            os.fsync(file.fileno())


def write_whole(path: Path, content: bytes | str) -> None:
    """Write one file; text as UTF-8.

    Raises:
        OSError: the folder is missing or cannot be written.
    """
    with replacing(path) as (file,):
        file.write(content if isinstance(content, bytes) else content.encode())


def write_text(path: Path, text: str) -> None:
    """Write a file that the user asked for.

    Raises:
        ModelError: it cannot be written.
    """
    try:
        write_whole(path, text)
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> ModelError:
    """What to raise for a file or folder; numpy gives no reason for a write that ended early: a full disk."""
    reason = error.strerror or f"No space left on device ({error})"
    return ModelError(f"{path} cannot be written: {reason}", hint="check the disk space and permissions")


def move_all(sources: Sequence[Path], targets: Sequence[Path], *, removed: Sequence[Path] = ()) -> None:
    """Rename every source to its target and remove some files, or leave all of them as they were.

    Args:
        sources: on the same file system as the targets; the last one is renamed last, which makes it final.
        targets: what is there already is replaced.
        removed: further files that go, if they are there.
    """
    label = uuid.uuid4().hex[:12]
    backups = {path: path.with_name(f".{path.name}.{label}.old") for path in (*targets[:-1], *removed)}
    first = list(zip(sources[:-1], targets[:-1], strict=True))
    try:
        for path in removed:
            _rename_if_there(path, backups[path])
        for source, target in first:
            _rename_if_there(target, backups[target])
            os.replace(source, target)
        os.replace(sources[-1], targets[-1])
    finally:
        # A stack goes on with what is left to do if it is interrupted, too.
        with contextlib.ExitStack() as stack:
            if sources[-1].exists():
                for path, backup in backups.items():
                    stack.callback(_surely, _rename_if_there, backup, path)
                for source, target in first:
                    stack.callback(_surely, _take_back, source, target)
            else:
                for backup in backups.values():
                    stack.callback(_surely, _remove, backup)


def _take_back(source: Path, target: Path) -> None:
    if not source.exists():
        os.replace(target, source)


def _rename_if_there(path: Path, to: Path) -> None:
    if path.exists():
        os.replace(path, to)


def _remove(path: Path) -> None:
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for inner in path.iterdir():
        _remove(inner)
    path.rmdir()


def _surely(action: Callable[..., object], *arguments: Any, **options: Any) -> None:
    """Do something that may be done twice; again, if Ctrl-C came in between."""
    try:
        action(*arguments, **options)
    except BaseException:
        action(*arguments, **options)
        raise
