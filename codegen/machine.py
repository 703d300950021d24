"""Which machine this is, as far as kernel timings depend on it, and where and how its cache is kept."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import sys
from pathlib import Path

CACHE_VARIABLE = "PLANISH_CACHE_DIR"


@functools.cache
def fingerprint() -> str:
    """The CPU's model, its number of cores, and a hash of the instruction sets it offers."""
    model, flags = platform.processor() or platform.machine(), ""
    description = Path("/proc/cpuinfo")
    if description.exists():
        fields = dict(
            line.split(":", 1)
            for line in description.read_text().split("\n\n")[0].splitlines()
            if ":" in line
        )
        known = {name.strip(): value.strip() for name, value in fields.items()}
        model = known.get("model name", model)
        flags = known.get("flags", known.get("Features", ""))
    instruction_sets = hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:12]
    return f"{platform.system()} {platform.machine()} {model} x{os.cpu_count()} {instruction_sets}"


def cache_directory() -> Path:
    """``PLANISH_CACHE_DIR``, or planish's folder where this platform keeps its users' caches."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "planish"
    if sys.platform == "win32":
        return (
            Path(os.environ.get("LOCALAPPDATA", str(Path.home() / "AppData" / "Local"))) / "planish" / "Cache"
        )
    return Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))) / "planish"
