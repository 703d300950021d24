"""Timing candidates for one op on this machine, and how far each is from the op's body; cached on disk.

Every candidate is a small model over the same inputs. They are timed in turn, round by round, so that a slow
moment of the machine hits all of them alike; the quickest run counts, because whatever else the machine
does only ever adds time. The error is measured in the same go against the body as the onnx reference
evaluator computes it: a kernel that saturates on this CPU is seen.

A cache entry is one JSON file, named after the hash of everything that the result depends on: onnxruntime's
version, the CPU, the threads, the op, its shape and the candidates. Entries that cannot be read are measured
again. Files are written under another name and moved into place, so that concurrent writers do no harm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi import onnxruntime_pybind11_state as state

from ..ir.files import write_whole
from .machine import cache_directory, fingerprint

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

FORMAT = 1
"""Part of every key: raise it when the meaning of a measurement changes."""
_REFUSALS = (
    state.Fail,
    state.InvalidArgument,
    state.InvalidGraph,
    state.NotImplemented,
    state.RuntimeException,
)
_WARM_UP_ROUNDS = 2
_FEWEST_ROUNDS, _MOST_ROUNDS = 7, 50
_SECONDS_PER_CANDIDATE = 0.1


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run an op: a model of it, and the session options that it relies on."""

    model: ir.Model
    session_options: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one candidate takes and how far it is off; both infinite where onnxruntime refuses it.

    Attributes:
        seconds: the quickest of many runs.
        error: ‖candidate − body‖ / ‖body‖ (Frobenius).
        refusal: what onnxruntime said.
    """

    seconds: float
    error: float
    refusal: str = ""


@dataclasses.dataclass(frozen=True)
class Microbenchmark:
    """Measures with a given number of threads (None: onnxruntime's own choice)."""

    threads: int | None = None

    def measure(
        self,
        subject: Mapping[str, object],
        candidates: Mapping[str, Callable[[], Candidate]],
        body: Callable[[], ir.Model],
        feeds: Callable[[], Feeds],
        check_feeds: Callable[[], Feeds],
    ) -> dict[str, Measurement]:
        """Time every candidate on ``feeds`` and compare it with ``body`` on ``check_feeds``.

        Args:
            subject: what is measured, all that the result depends on besides the machine; JSON.
            candidates: how to build each, by name; called only if the cache does not know the answer.
            body: builds the model that defines what is right, in standard ops.
            feeds: inputs of the size to be timed.
            check_feeds: inputs for the comparison; few rows, because the reference evaluator is slow.

        """
        key = {
            "format": FORMAT,
            "onnxruntime": onnxruntime.__version__,
            "machine": fingerprint(),
            "threads": self.threads,
            "subject": dict(subject),
            "candidates": sorted(candidates),
        }
        known = _read(key)
        if known is not None:
            return known
        sessions: dict[str, onnxruntime.InferenceSession] = {}
        result: dict[str, Measurement] = {}
        for name, build in candidates.items():
            try:
                sessions[name] = self._session(build())
            except _REFUSALS as refusal:
                result[name] = Measurement(math.inf, math.inf, str(refusal).splitlines()[0])
        errors = _errors(sessions, body(), check_feeds())
        seconds = _seconds(sessions, feeds())
        result |= {name: Measurement(seconds[name], errors[name]) for name in sessions}
        _write(key, result)
        return result

    def _session(self, candidate: Candidate) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = self.threads or 0
        # Or the threads of candidates that are not running would spin, and take the cores of the one that is.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        for key, value in candidate.session_options.items():
            options.add_session_config_entry(key, value)
        serialized = ir.to_proto(candidate.model).SerializeToString()
        return onnxruntime.InferenceSession(serialized, options, ["CPUExecutionProvider"])


def _errors(
    sessions: Mapping[str, onnxruntime.InferenceSession], body: ir.Model, feeds: Feeds
) -> dict[str, float]:
    (expected,) = ReferenceEvaluator(ir.to_proto(body)).run(None, dict(feeds))
    expected = np.asarray(expected, np.float64)
    scale = float(np.linalg.norm(expected)) or 1.0
    return {
        name: float(np.linalg.norm(np.asarray(session.run(None, feeds)[0], np.float64) - expected)) / scale
        for name, session in sessions.items()
    }


def _seconds(sessions: Mapping[str, onnxruntime.InferenceSession], feeds: Feeds) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(_WARM_UP_ROUNDS):
        for session in sessions.values():
            session.run(None, feeds)
    stop = time.perf_counter() + _SECONDS_PER_CANDIDATE * len(sessions)
    for done in range(_MOST_ROUNDS):
        if done >= _FEWEST_ROUNDS and time.perf_counter() > stop:
            break
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(None, feeds)
            times[name].append(time.perf_counter() - start)
    return {name: min(samples) for name, samples in times.items()}


def _path(key: Mapping[str, object]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_directory() / "microbenchmarks" / f"{digest[:32]}.json"


def _read(key: Mapping[str, object]) -> dict[str, Measurement] | None:
    try:
        entry = json.loads(_path(key).read_text())
        if entry["key"] != json.loads(json.dumps(key)):
            return None
        return {
            str(name): Measurement(float(row["seconds"]), float(row["error"]), str(row["refusal"]))
            for name, row in entry["measurements"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(key: Mapping[str, object], measurements: Mapping[str, Measurement]) -> None:
    """Store an entry; a cache that cannot be written only costs time, so nothing is raised."""
    path = _path(key)
    entry = {
        "key": key,
        "measurements": {name: dataclasses.asdict(row) for name, row in measurements.items()},
    }
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(entry, indent=1))
