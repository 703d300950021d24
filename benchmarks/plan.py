"""How near plans come to what then happens: time, peak memory, size, coverage and kernels, side by side.

Every subject is planned, and then compiled and saved in a process of its own that does nothing else. Times of
both are without the start of the interpreter. Large decoders have random weights (see `large_decoder`).

    python benchmarks/plan.py                       # in half an hour; writes results/plan.md
    python benchmarks/plan.py --only encoder        # subjects with this in their name
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import large_decoder
import numpy as np
import planish
import sentence_model
import torch
import transformers

_RESULTS = Path(__file__).parent / "results" / "plan.md"
_GOAL = 0.25
_SHORT = 10.0
"""Seconds below which a compilation is done twice, as plans do: the faster one was disturbed less."""
_ACTUAL = r"""
import json, pickle, re, sys, time
from pathlib import Path
import planish
import planish.compiler
from planish.passes import Pipeline
from planish.runtime.provenance import Provenance
model, passes, data, output = sys.argv[1:]
calibration = pickle.loads(Path(data).read_bytes())
pipeline = Pipeline.of(passes)  # imports the passes, as nothing else does
began = time.perf_counter()
compiled = planish.compile(model, pipeline, calibration=calibration)
compiled.save(output)
seconds = time.perf_counter() - began
# Not ru_maxrss, which begins with the memory of the process that started this one.
peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024
report = Provenance.read(compiled.bound.model.metadata_props)
print(json.dumps({"seconds": seconds, "peak": peak, "passes": report.report["passes"],
                  "kernels": list(report.kernels.values())}))
"""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model and what is done to it."""

    name: str
    write: Callable[[Path], Path]
    passes: str
    data: Callable[[], list[Mapping[str, np.ndarray[Any, Any]]] | None] = lambda: None


def _encoder(folder: Path) -> Path:
    path = folder / "encoder.onnx"
    example = sentence_model.example()
    planish.save(planish.trace(sentence_model.load_module(), example), path)
    return path


def _decoder(name: str) -> Callable[[Path], Path]:
    return lambda folder: large_decoder.write(name, folder, dtype=torch.float16)


def _resnet(folder: Path) -> Path:
    module = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000)).eval()
    path = folder / "resnet.onnx"
    planish.save(planish.trace(module, {"pixel_values": torch.zeros(2, 3, 224, 224)}), path)
    return path


def _sentences() -> list[Mapping[str, np.ndarray[Any, Any]]]:
    return list(sentence_model.sentence_feeds())


def _images() -> list[Mapping[str, np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(0)
    return [{"pixel_values": rng.standard_normal((1, 3, 224, 224), np.float32)} for _ in range(32)]


def _tokens(count: int, length: int) -> Callable[[], list[Mapping[str, np.ndarray[Any, Any]]]]:
    rng = np.random.default_rng(0)
    return lambda: [{"input_ids": rng.integers(1, 32000, (1, length))} for _ in range(count)]


_GPTQ = "quantize{scheme=W4A16,algorithm=gptq}"
SUBJECTS = (
    Subject("encoder, 8 bits", _encoder, "canonicalize,fuse,quantize{scheme=W8A8,activations=token}"),
    Subject("encoder, GPTQ", _encoder, f"canonicalize,fuse,{_GPTQ}", _sentences),
    Subject(
        "encoder, rotated values, GPTQ",
        _encoder,
        f"canonicalize,rotate{{rotations=[R2]}},fuse,{_GPTQ}",
        _sentences,
    ),
    Subject("ResNet-50, 8 bits", _resnet, "canonicalize,fuse,quantize{scheme=W8A8}", _images),
    Subject("0.1B decoder, rounded", _decoder("0.1B"), "canonicalize,fuse,quantize{scheme=W4A16}"),
    Subject(
        "0.1B decoder, 8-bit cache, GPTQ",
        _decoder("0.1B"),
        f"canonicalize,fuse,{_GPTQ},kv-cache{{bits=8}}",
        _tokens(32, 256),
    ),
    Subject(
        "0.1B decoder, rotated, GPTQ",
        _decoder("0.1B"),
        f"canonicalize,fold-norms,rotate,fuse,{_GPTQ}",
        _tokens(32, 256),
    ),
    Subject("1.3B decoder, rounded", _decoder("1.3B"), "canonicalize,fuse,quantize{scheme=W4A16}"),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """Planned and actual figures of one subject."""

    name: str
    seconds: tuple[float, float]
    peak: tuple[float, float]
    size: tuple[float, float]
    same_coverage: bool
    same_kernels: bool
    layers: tuple[int, int]
    probe: float

    def cells(self) -> list[str]:
        """Of the table."""

        def pair(values: tuple[float, float], unit: float, digits: int) -> list[str]:
            planned, actual = values
            return [
                f"{planned / unit:.{digits}f} / {actual / unit:.{digits}f}",
                f"{planned / actual - 1:+.0%}",
            ]

        return [
            self.name,
            *pair(self.seconds, 1, 1),
            *pair(self.peak, 1e6, 0),
            *pair(self.size, 1e6, 1),
            "yes" if self.same_coverage else "**no**",
            "yes" if self.same_kernels else "**no**",
            f"{self.layers[0]} of {self.layers[1]}",
            f"{self.probe:.0f}",
        ]


def measured(subject: Subject) -> Row:
    """Plan, then compile."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, data = subject.write(folder), subject.data()
        plan = planish.plan(model, subject.passes, calibration=data)
        if plan.error:
            raise SystemExit(f"{subject.name}: {plan.error}")
        (folder / "data.pickle").write_bytes(pickle.dumps(data))
        output = folder / "result.onnx"
        command = [
            sys.executable,
            "-c",
            _ACTUAL,
            str(model),
            subject.passes,
            str(folder / "data.pickle"),
            str(output),
        ]
        actual = _run(command)
        if actual["seconds"] < _SHORT:
            actual["seconds"] = min(actual["seconds"], _run(command)["seconds"])
        size = sum(path.stat().st_size for path in folder.iterdir() if path.name.startswith("result.onnx"))
    assert plan.peak_memory is not None
    return Row(
        name=subject.name,
        seconds=(plan.seconds, actual["seconds"]),
        peak=(plan.peak_memory, actual["peak"]),
        size=(plan.file_bytes, size),
        same_coverage=list(_planned_coverage(plan)) == list(_actual_coverage(actual["passes"])),
        same_kernels=dict(plan.kernels) == dict(collections.Counter(actual["kernels"])),
        layers=plan.layers,
        probe=plan.probe_seconds,
    )


def _run(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _planned_coverage(plan: planish.Plan) -> Iterator[tuple[str, int, int, dict[str, int]]]:
    for planned in plan.passes:
        reasons: dict[str, int] = collections.Counter()
        for _, reason, count in planned.skipped:
            reasons[reason] += count
        yield planned.name, planned.covered, planned.total, dict(reasons)


def _actual_coverage(passes: list[dict[str, Any]]) -> Iterator[tuple[str, int, int, dict[str, int]]]:
    for report in passes:
        coverage = report["coverage"] or {"covered": 0, "total": 0, "skipped": []}
        reasons = collections.Counter(skip["reason"] for skip in coverage["skipped"])
        yield report["name"], coverage["covered"], coverage["total"], dict(reasons)


_HEADINGS = (
    "subject", "seconds: plan / actual", "", "peak MB: plan / actual", "", "file MB: plan / actual", "",
    "same coverage", "same kernels", "layers rehearsed", "plan took s",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="subjects with this in their name; nothing is written")
    options = parser.parse_args()
    rows = []
    for subject in SUBJECTS:
        if options.only in subject.name:
            rows.append(measured(subject))
            print(" | ".join(rows[-1].cells()), flush=True)
    if options.only:
        return
    pairs = [pair for row in rows for pair in (row.seconds, row.peak, row.size)]
    within = sum(abs(planned / actual - 1) <= _GOAL for planned, actual in pairs)
    lines = [
        "# Plans against what then happens",
        "",
        f"{within} of {len(pairs)} planned figures are within {_GOAL:.0%} of the actual ones.",
        "",
        "| " + " | ".join(_HEADINGS) + " |",
        "|" + "---|" * len(_HEADINGS),
        *("| " + " | ".join(row.cells()) + " |" for row in rows),
        "",
        "Seconds are of compiling and saving, without starting and importing; below",
        f"{_SHORT:.0f} s the faster of two, as plans take them. The peak is resident",
        "memory, pages of mapped files included. Coverage is the same if every pass covers and skips as many",
        "layers for the same reasons; kernels, if every one is bound to as many nodes.",
        "",
        "Made by `python benchmarks/plan.py`.",
    ]
    _RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
