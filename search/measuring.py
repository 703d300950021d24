"""What a search measures of a compiled model: size, time, cache and how good it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..ir.errors import InputError
from ..passes.infrastructure.driver import size_of
from ..runtime.calibration.data import fitted
from ..runtime.compiled_model import CompiledModel
from ..runtime.measure import compare_outputs, interleaved_latency
from ..runtime.provenance import ParetoPoint
from .budget import Metric

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]

_REPEATS = 24
_SAMPLES = 8
"""Batches that outputs are compared on."""
_PROMPT, _NEW, _CACHED = 16, 16, 1024
"""Tokens of a decoder's prompt, of its answer, and that its cache is measured for."""


class Measuring:
    """Measures models against the uncompressed one.

    Args:
        dense: the uncompressed model.
        label: of it.
        passes: that it was compiled by.
        metric: as of `Budget`; None for resemblance.
        feeds: inputs of a call, to time.
        samples: inputs whose outputs are compared.
    """

    def __init__(
        self,
        dense: CompiledModel,
        *,
        label: str,
        passes: str,
        metric: Metric | None,
        feeds: Feeds,
        samples: Sequence[Feeds],
    ) -> None:
        self._feeds, self._is_decoder = feeds, any("past_key_values" in name for name in dense.input_names)
        self._dense_call = self._call(dense)
        if metric is None:
            samples = samples[:_SAMPLES]
            metric = _Resemblance(samples, [_outputs(dense, each) for each in samples])
        self._metric = metric
        milliseconds = interleaved_latency({"dense": self._dense_call}, repeats=_REPEATS)["dense"].median_ms
        self._dense_ms = milliseconds / self._per_call
        self.dense = ParetoPoint(
            label=label,
            passes=passes,
            size=size_of(dense.bound.model)[1],
            latency_ms=self._dense_ms,
            cache=self._cache(dense),
            metric=self._measured_metric(dense, label),
        )

    def point(self, compiled: CompiledModel, label: str, passes: str) -> ParetoPoint:
        """Measure a model; its time is relative to that of the uncompressed one, called in turns with it.

        Raises:
            InputError: the metric is not a number.
        """
        runs = {"dense": self._dense_call, "this": self._call(compiled)}
        times = interleaved_latency(runs, repeats=_REPEATS, burst=1)
        return ParetoPoint(
            label=label,
            passes=passes,
            size=size_of(compiled.bound.model)[1],
            latency_ms=self._dense_ms / times["this"].speedup_over(times["dense"]),
            cache=self._cache(compiled),
            metric=self._measured_metric(compiled, label),
        )

    @property
    def _per_call(self) -> int:
        return _NEW if self._is_decoder else 1

    def _call(self, compiled: CompiledModel) -> Callable[[], object]:
        if not self._is_decoder:
            feeds = fitted(self._feeds, compiled.model)
            return lambda: compiled.run(feeds)
        decoder = compiled.decoder(capacity=_PROMPT + _NEW)
        prompt = np.ones((1, _PROMPT), np.int64)

        def generate() -> object:
            decoder.truncate(0)
            return compiled.generate(prompt, _NEW, decoder=decoder)

        return generate

    def _cache(self, compiled: CompiledModel) -> float | None:
        return float(compiled.memory(length=_CACHED).cache) if self._is_decoder else None

    def _measured_metric(self, compiled: CompiledModel, label: str) -> float:
        found = float(self._metric(compiled))
        if not math.isfinite(found):
            raise InputError(
                f"budget: the metric of {label} is {found}", hint="a metric gives a finite number"
            )
        return found


class _Resemblance:
    """How much the outputs of a model are like those of another: 1 if they are the same."""

    def __init__(self, samples: Sequence[Feeds], references: Sequence[Mapping[str, Array]]) -> None:
        self._samples, self._references = samples, references

    def __call__(self, compiled: CompiledModel) -> float:
        """The mean over the samples."""
        found = []
        for feeds, reference in zip(self._samples, self._references, strict=True):
            for difference in compare_outputs(_outputs(compiled, feeds), reference).values():
                kl = difference.kl_divergence
                found.append(difference.cosine_mean if kl is None else math.exp(-kl))
        return float(np.mean(found))


def _outputs(compiled: CompiledModel, feeds: Feeds) -> dict[str, Array]:
    """All floats but those of the cache, which compressed caches give in another form."""
    outputs = compiled.run(fitted(feeds, compiled.model))
    return {
        name: array
        for name, array in outputs.items()
        if not name.startswith("present") and np.issubdtype(array.dtype, np.floating)
    }
