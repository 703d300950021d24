"""Measurements that an interrupted run finds again: a JSON file of numbers by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ...ir.files import write_whole

_WRITTEN_EVERY = 16
"""New entries; `write` at the end writes the rest."""


class Memory:
    """What was measured before under the same key; other files, and damaged ones, count as empty.

    Args:
        path: the file; its folder exists.
        key: everything that the measurements depend on besides their names.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        self._known = self._read()
        self._unwritten = 0

    def get(self, name: str, measure: Callable[[], list[float]]) -> list[float]:
        """The measurement of that name, measured if it is not known."""
        if name not in self._known:
            self._known[name] = measure()
            self._unwritten += 1
            if self._unwritten >= _WRITTEN_EVERY:
                self.write()
        return self._known[name]

    def write(self) -> None:
        """Write everything."""
        write_whole(self._path, json.dumps({"key": self._key, "measured": self._known}))
        self._unwritten = 0

    def _read(self) -> dict[str, list[float]]:
        try:
            entry = json.loads(self._path.read_text())
            return dict(entry["measured"]) if entry["key"] == self._key else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}
