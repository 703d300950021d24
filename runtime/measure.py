"""How far two sets of outputs are apart, and how long models take."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..ir.errors import InputError

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """How far one output is from its reference.

    Attributes:
        cosine_mean: mean cosine similarity of the rows (last axis), 1.0 for equal directions.
        cosine_min: the lowest of them.
        max_absolute: ‖a − b‖∞.
        max_relative: ‖a − b‖∞ / ‖b‖∞, b the reference; 0 when both are zero.
        kl_divergence: mean KL(softmax(b) ‖ softmax(a)) over rows, in nats; for logits.
    """

    cosine_mean: float
    cosine_min: float
    max_absolute: float
    max_relative: float
    kl_divergence: float | None = None


def difference(value: Array, reference: Array, *, logits: bool = False) -> Difference:
    """Compare an output with its reference in float64. Shapes must agree.

    Args:
        value: array of any shape; the last axis is the feature axis.
        reference: what it should have been, of the same shape.
        logits: also compute the KL divergence of the softmax over the last axis.
    """
    a, b = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"expected shape {list(b.shape)}, found {list(a.shape)}")
    if a.size == 0:
        return Difference(cosine_mean=1.0, cosine_min=1.0, max_absolute=0.0, max_relative=0.0)
    rows_a, rows_b = (x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1) for x in (a, b))
    cosine = _row_cosine(rows_a, rows_b)
    max_absolute = float(np.abs(a - b).max())
    scale = float(np.abs(b).max())
    return Difference(
        cosine_mean=float(cosine.mean()),
        cosine_min=float(cosine.min()),
        max_absolute=max_absolute,
        max_relative=max_absolute / scale if scale else (float("inf") if max_absolute else 0.0),
        kl_divergence=_kl_divergence(rows_a, rows_b) if logits else None,
    )


def compare_outputs(outputs: Mapping[str, Array], reference: Mapping[str, Array]) -> dict[str, Difference]:
    """The `difference` of every output that two models have in common, by name; KL too where it is logits.

    Raises:
        InputError: no output is common, or one has another shape than its reference.
    """
    common = [name for name in reference if name in outputs]
    if not common:
        raise InputError(f"the models have no output in common: {list(outputs)} and {list(reference)}")
    for name in common:
        found, expected = np.shape(outputs[name]), np.shape(reference[name])
        if found != expected:
            raise InputError(f"output {name!r}: expected shape {list(expected)}, found {list(found)}")
    return {name: difference(outputs[name], reference[name], logits="logits" in name) for name in common}


def _row_cosine(a: Array, b: Array) -> Array:
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    # Two zero rows point the same way; one zero row against a nonzero one does not.
    both_zero = ~a.any(axis=-1) & ~b.any(axis=-1)
    return np.where(both_zero, 1.0, (a * b).sum(-1) / np.where(norms > 0, norms, 1.0))


def _kl_divergence(a: Array, b: Array) -> float:
    log_a, log_b = _log_softmax(a), _log_softmax(b)
    return float((np.exp(log_b) * (log_b - log_a)).sum(-1).mean())


def _log_softmax(x: Array) -> Array:
    shifted = x - x.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latency:
    """Timings of one callable, in milliseconds.

    Attributes:
        median_ms: of all counted calls.
        fastest_ms: of all counted calls.
        steady_ms: the median over bursts of each burst's fastest call: single calls that other work on the
            machine slowed down do not count, nor does a single moment in which it was fast.
        samples: how many calls were counted.
        rounds_ms: the median of each burst's calls, in the order of the rounds.
    """

    median_ms: float
    fastest_ms: float
    steady_ms: float
    samples: int
    rounds_ms: tuple[float, ...]

    def speedup_over(self, reference: Latency) -> float:
        """How many times faster than a callable that was timed in the same rounds: the median over these.

        The two calls of a round are neighbours, so what slows the machine down for longer than a round
        cancels: of short bursts, this varies two to three times less than the ratio of medians.
        """
        ratios = np.array(reference.rounds_ms) / np.array(self.rounds_ms)
        return float(np.median(ratios))


def interleaved_latency(
    runs: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 20,
    warmup: int = 3,
    burst: int = 8,
    seed: int = 0,
) -> dict[str, Latency]:
    """Time several callables against each other, in rounds of short bursts in a shuffled order.

    Interleaving makes drifts of the machine (frequency, other load) hit all alike, so that *ratios* of the
    medians hold even where the milliseconds do not. Each burst begins after a pause and with one call that
    is not counted: the worker threads of the session before spin for a while after its last call, and the
    caches hold its weights. For ratios of models, `Latency.speedup_over` with bursts of one call is best.

    Args:
        runs: what to time, by name.
        repeats: counted calls of each (rounded up to whole bursts).
        warmup: uncounted calls of each before the first round.
        burst: counted calls of one callable in a row.
        seed: of the shuffled order.
    """
    burst = min(burst, repeats)
    order = list(runs)
    shuffle = np.random.default_rng(seed).shuffle
    times: dict[str, list[list[float]]] = {name: [] for name in order}
    for name in order:
        for _ in range(warmup):
            runs[name]()
    for _ in range(-(-repeats // burst)):
        shuffle(order)
        for name in order:
            time.sleep(_SPIN_DOWN_SECONDS)
            runs[name]()
            times[name].append([_seconds(runs[name]) for _ in range(burst)])
    return {name: _latency(times[name]) for name in runs}


# onnxruntime's workers go on spinning for tens of milliseconds: after a pause of 5 ms, medians of two-thread
# sessions on two cores were up to 1.6 times those of a session that is alone.
_SPIN_DOWN_SECONDS = 0.05


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _latency(bursts: Sequence[Sequence[float]]) -> Latency:
    seconds = np.array(bursts)
    return Latency(
        median_ms=float(np.median(seconds)) * 1e3,
        fastest_ms=float(np.min(seconds)) * 1e3,
        steady_ms=float(np.median(seconds.min(axis=1))) * 1e3,
        samples=seconds.size,
        rounds_ms=tuple((np.median(seconds, axis=1) * 1e3).tolist()),
    )
