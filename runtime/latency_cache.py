"""Times of pieces on disk: one JSON file each, written whole or not at all.

A file is named after the hash of its key, all that the time depends on. Entries that cannot be read count as
not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

from ..codegen.machine import cache_directory
from ..ir.files import write_whole


def read_seconds(key: Mapping[str, object]) -> float | None:
    """What was measured under ``key``; None if that is not known."""
    try:
        entry = json.loads(_path(key).read_text())
        seconds = float(entry["seconds"])
        return seconds if entry["key"] == key and math.isfinite(seconds) and seconds >= 0 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_seconds(key: Mapping[str, object], seconds: float) -> None:
    """Store an entry; a cache that cannot be written only costs time, so nothing is raised."""
    with contextlib.suppress(OSError):
        _path(key).parent.mkdir(parents=True, exist_ok=True)
        write_whole(_path(key), json.dumps({"key": key, "seconds": seconds}, indent=1))


def _path(key: Mapping[str, object]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_directory() / "latency" / f"{digest[:32]}.json"
