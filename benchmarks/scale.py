"""Models larger than memory should be: time and resident memory of compiling decoders of real shapes.

Each decoder has random float16 weights and is written to a folder first (see `large_decoder`). Compilation is
a process of its own, whose resident memory is sampled; anonymous memory is what the system cannot drop, the
rest are pages of mapped files. Beside it, in the same run: a copy of the model's files by the system, written
through to the disk. Both read the model from the disk, and not from the system's cache. A model's lines in
the table are of one run; those of others stay as they were.

    python benchmarks/scale.py --only 0.1B                  # in minutes
    python benchmarks/scale.py --folder FOLDER              # 40 GB of disk; writes results/scale.md
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_RESULTS = _HERE / "results" / "scale.md"
_SAMPLES = 20
"""Of the memory, per second."""
_ROUND = "canonicalize,fuse,quantize{scheme=W4A16,clip=false,ignore=[]}"
_GPTQ = "canonicalize,fuse,fold-norms,rotate,quantize{scheme=W4A16,algorithm=gptq,sweeps=0}"
_UNDISTURBED = 0.1
"""The part of all cores that others may have; the sampling of memory has some of it."""
CASES = {
    "0.1B": [_ROUND, _GPTQ],
    "1.3B": [_GPTQ],
    "7B": [_ROUND],
}
_WRITER = """
import sys
from pathlib import Path
import large_decoder
large_decoder.write(sys.argv[1], Path(sys.argv[2]))
"""
_WORKER = """
import sys
import numpy as np
import planish
ids = np.random.default_rng(0).integers(1, 32000, (8, 1, 256))
compiled = planish.compile(sys.argv[1], sys.argv[2], calibration=[{"input_ids": each} for each in ids])
compiled.save(sys.argv[3], external_data=True)
"""


@dataclasses.dataclass(frozen=True)
class Measured:
    """One compilation.

    Attributes:
        seconds: from start to end, the interpreter's own included.
        resident, anonymous: the largest of the process, in bytes.
        written: bytes of what it wrote.
        others: the part of all cores that other processes, or other machines of the host, had meanwhile.
    """

    seconds: float
    resident: int
    anonymous: int
    written: int
    others: float


def compile_apart(model: Path, passes: str, output: Path) -> Measured:
    """Compile in a process of its own.

    Raises:
        SystemExit: it fails.
    """
    began, busy, own = time.perf_counter(), _busy_seconds(), _seconds_of_children()
    process = subprocess.Popen([sys.executable, "-c", _WORKER, str(model), passes, str(output)])
    resident = anonymous = 0
    while process.poll() is None:
        found = _memory(process.pid)
        resident, anonymous = max(resident, found.get("VmRSS", 0)), max(anonymous, found.get("RssAnon", 0))
        time.sleep(1 / _SAMPLES)
    if process.returncode:
        sys.exit(f"{model}: {passes} failed")
    seconds = time.perf_counter() - began
    others = _busy_seconds() - busy - (_seconds_of_children() - own)
    return Measured(seconds, resident, anonymous, _bytes(output), others / seconds / (os.cpu_count() or 1))


def _busy_seconds() -> float:
    """That cores were not idle since the machine started, all of them together."""
    user, nice, system, _, _, *more = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9])
    return (user + nice + system + sum(more)) / os.sysconf("SC_CLK_TCK")


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _memory(process: int) -> dict[str, int]:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return {}
    return {name: 1024 * int(count) for name, count in re.findall(r"(\w+):\s+(\d+) kB", status)}


def _bytes(model: Path) -> int:
    data = model.with_name(f"{model.name}.data")
    return sum(path.stat().st_size for path in (model, data) if path.exists())


def _forget(model: Path) -> None:
    """Drop the model's files from the system's cache, so that they are read from the disk."""
    for path in (model, model.with_name(f"{model.name}.data")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(model: Path, folder: Path) -> float:
    """What copying the model's files takes, from the disk and written through to it."""
    _forget(model)
    began = time.perf_counter()
    for path in (model, model.with_name(f"{model.name}.data")):
        copied = folder / f"copy-{path.name}"
        shutil.copyfile(path, copied)
        with copied.open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    for path in folder.glob("copy-*"):
        path.unlink()
    return seconds


def rows(name: str, folder: Path) -> list[str]:
    """The lines of one model."""
    model = folder / name / "model.onnx"
    if not model.exists():
        # By a process of its own: what it keeps of its memory is missing to the cache of files.
        subprocess.run([sys.executable, "-c", _WRITER, name, str(model.parent)], check=True, cwd=_HERE)
    size, copied = _bytes(model), copy_seconds(model, folder)
    lines = []
    for passes in CASES[name]:
        output = folder / "out.onnx"
        _forget(model)
        found = compile_apart(model, passes, output)
        seconds = f"{found.seconds:.0f}{' *' if found.others > _UNDISTURBED else ''}"
        lines.append(
            f"| {name} | {size / 1e9:.2f} | `{passes}` | {found.written / 1e9:.2f} | {seconds} "
            f"| {copied:.0f} | {size / found.seconds / 1e9:.3f} | {found.seconds / copied:.1f} "
            f"| {found.resident / 1e9:.2f} | {found.anonymous / 1e9:.2f} |"
        )
        print(lines[-1], flush=True)
        for path in (output, output.with_name(f"{output.name}.data")):
            path.unlink(missing_ok=True)
    return lines


def _rows_before() -> dict[str, list[str]]:
    """The lines of the table for each model: what is not measured now stays."""
    found: dict[str, list[str]] = {}
    for line in _RESULTS.read_text().splitlines() if _RESULTS.exists() else []:
        name = line.strip("| ").split(" ")[0]
        if name in CASES:
            found.setdefault(name, []).append(line)
    return found


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where models are written, and found again; else deleted")
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES), help="these models")
    given = parser.parse_args()
    found = _rows_before()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        for name in given.only:
            found[name] = rows(name, folder)
    lines = [
        "# Models larger than memory should be",
        "",
        f"`python benchmarks/scale.py`; {os.cpu_count()} cores. Decoders of Llama's shapes in float16; "
        "target onnxruntime-cpu. A copy is that of the input, written through to the disk. "
        "Both read it from there. The lines of a shape are of one run. \\* Other work ran beside it.",
        "",
        "| shape | GB | passes | GB after | s | copy, s | GB/s | × copy | resident | anonymous |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(line for name in CASES for line in found.get(name, [])),
        "",
    ]
    _RESULTS.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
