"""Timing a piece of a model at all its levels, each as the target runs it; cached on disk.

Levels run in turns, so that a slow moment of the machine hits all alike, and in a turn several times, so that
weights are in the cache and worker threads awake, as they are within a model. What a call costs in itself is
timed in the same turns, on a model with the same inputs and outputs and nothing in between, and taken off.

What is in the cache is not timed again, and times of a busy machine do not get there. A key holds the graph
that is run, with its shapes and the kernels that it was bound to, so batch, sequence, level and the passes
that came before are in it through the graph that they lead to; and onnxruntime's version, the target with its
options and threads, and the machine.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import onnx_ir as ir
import onnxruntime

from ..codegen.machine import fingerprint
from ..codegen.target import Target
from ..ir.structure import ChannelGroup
from .end_to_end import threads_of
from .latency_cache import read_seconds, write_seconds
from .latency_pieces import Piece, signature
from .measure import Latency, interleaved_latency
from .session import Session

Timer = Callable[[Mapping[str, Callable[[], None]]], Mapping[str, Latency]]
"""Times calls against each other, by name."""

FORMAT = 2
"""Part of every key: raise it when the meaning of a measurement changes."""
RUNTIME = f"onnxruntime {onnxruntime.__version__}"
_OVERHEAD = "overhead"
_SECONDS_PER_RUN = 0.1
_FEWEST_REPEATS, _MOST_REPEATS = 8, 64
_TURNS = 8
_DISTURBED = 1.5
"""A median so many times the quickest run says that the machine had other work: it is not kept on disk."""
_MOST_WEIGHT_BYTES = 1 << 30
"""Of the levels that are open at a time; onnxruntime may keep a second, prepacked copy of them."""


def target_text(target: Target) -> str:
    """The target with its options, for people and as part of keys."""
    return repr(target)


def interleaved(runs: Mapping[str, Callable[[], None]]) -> dict[str, Latency]:
    """Time calls in shuffled turns; more of them where calls are short."""
    start = time.perf_counter()
    for run in runs.values():
        run()
    once = (time.perf_counter() - start) / len(runs)
    repeats = min(max(int(_SECONDS_PER_RUN / once), _FEWEST_REPEATS), _MOST_REPEATS)
    return interleaved_latency(runs, repeats=repeats, burst=math.ceil(repeats / _TURNS), warmup=1)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Times pieces as a target runs them after some passes.

    Attributes:
        target: what levels are bound to; supplies execution providers and threads.
        prepare: the passes, in place.
        timer: times sessions against each other.
    """

    target: Target
    prepare: Callable[[ir.Model], None]
    timer: Timer = interleaved

    def seconds(self, piece: Piece, group: ChannelGroup, counts: Sequence[int]) -> dict[int, float]:
        """Seconds of a piece's own work with so many structures of the group kept; none is negative.

        Raises:
            TargetError: the target cannot bind an op, or onnxruntime rejects the piece.
        """
        found: dict[int, float] = {}
        for levels in self._batches(piece, group, counts, found):
            found |= self._timed(levels, _Level(self.target, piece.without_work()))
        return found

    def _timed(self, levels: Mapping[int, _Level], overhead: _Level) -> dict[int, float]:
        runs = {str(count): level.open() for count, level in levels.items()}
        times = self.timer({**runs, _OVERHEAD: overhead.open()})
        seconds: dict[int, float] = {}
        for count, level in levels.items():
            latency = times[str(count)]
            seconds[count] = max(latency.steady_ms - times[_OVERHEAD].steady_ms, 0.0) / 1e3
            if latency.median_ms <= _DISTURBED * latency.fastest_ms:
                write_seconds(level.key, seconds[count])
        return seconds

    def _batches(
        self, piece: Piece, group: ChannelGroup, counts: Sequence[int], found: dict[int, float]
    ) -> Iterator[dict[int, _Level]]:
        """Levels to be timed together, as many as memory allows; those that are cached go into ``found``."""
        batch: dict[int, _Level] = {}
        size = 0
        for count in counts:
            reduced = piece.at_level(group, count)
            self.prepare(reduced.model)
            level = _Level(self.target, reduced)
            known = read_seconds(level.key)
            if known is not None:
                found[count] = known
                continue
            if batch and size + level.weight_bytes > _MOST_WEIGHT_BYTES:
                yield batch
                batch.clear()  # the caller holds it, too: its weights must go before more come
                size = 0
            batch[count] = level
            size += level.weight_bytes
        if batch:
            yield batch


class _Level:
    """A piece as the target runs it, and its place in the cache."""

    def __init__(self, target: Target, piece: Piece) -> None:
        self._target, self._bound, self._feeds = target, target.bind(piece.model), piece.feeds
        self.key: dict[str, object] = {
            "format": FORMAT,
            "runtime": RUNTIME,
            "machine": fingerprint(),
            "target": target_text(target),
            "graph": signature(self._bound.model, piece.feeds),
            "session_options": dict(self._bound.session_options),
            "disabled_optimizers": list(self._bound.disabled_optimizers),
        }

    @property
    def weight_bytes(self) -> int:
        """Of all constants."""
        constants = (value.const_value for value in self._bound.model.graph.initializers.values())
        return sum(tensor.nbytes for tensor in constants if tensor is not None)

    def open(self) -> Callable[[], None]:
        """A call that runs it once."""
        session = Session(self._bound, target=self._target, threads=threads_of(self._target))
        return session.repeatable(self._feeds)
