"""The knobs of a search, and the pipelines that their settings make."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

from ..runtime.provenance import ParetoPoint


@dataclasses.dataclass(frozen=True)
class Setting:
    """One position of every knob, each a text pipeline; empty where nothing is done.

    Attributes:
        pruning: before operations are merged.
        cache: what becomes of a decoder's cache.
        weights: how they are stored.
    """

    pruning: str = ""
    cache: str = ""
    weights: str = ""

    @property
    def passes(self) -> str:
        """The whole pipeline."""
        return ",".join(
            part for part in ("canonicalize", self.pruning, "fuse", self.cache, self.weights) if part
        )

    @property
    def label(self) -> str:
        """What is done beyond merging operations."""
        return " ".join(part for part in (self.pruning, self.cache, self.weights) if part) or "uncompressed"

    @property
    def knobs(self) -> int:
        """How many are not at rest."""
        return sum(1 for part in dataclasses.astuple(self) if part)

    def alone(self) -> list[Setting]:
        """The settings that each turn one of these knobs."""
        fields = dataclasses.asdict(self)
        return [Setting(**{name: part}) for name, part in fields.items() if part]


def singles(pruning: Sequence[str], caches: Sequence[str], weights: Sequence[str]) -> list[Setting]:
    """Every position of every knob by itself."""
    return [
        *(Setting(weights=each) for each in weights),
        *(Setting(pruning=each) for each in pruning),
        *(Setting(cache=each) for each in caches),
    ]


def combinations(pruning: Sequence[str], caches: Sequence[str], weights: Sequence[str]) -> Iterator[Setting]:
    """Several knobs at once."""
    for parts in itertools.product(("", *pruning), ("", *caches), ("", *weights)):
        setting = Setting(*parts)
        if setting.knobs > 1:
            yield setting


def predicted(
    setting: Setting, measured: Mapping[Setting, ParetoPoint], dense: ParetoPoint
) -> ParetoPoint | None:
    """What a setting will measure if its knobs act independently; None if one of them does not work.

    Factors on size, time and cache multiply, and losses of the metric add up.
    """
    size, latency, cache, metric = dense.size, dense.latency_ms, dense.cache, dense.metric
    for single in setting.alone():
        point = measured.get(single)
        if point is None:
            return None
        size *= point.size / dense.size
        metric += point.metric - dense.metric
        if latency is not None and point.latency_ms is not None and dense.latency_ms:
            latency *= point.latency_ms / dense.latency_ms
        if cache is not None and point.cache is not None and dense.cache:
            cache *= point.cache / dense.cache
    return ParetoPoint(
        label=setting.label, passes=setting.passes, size=size, latency_ms=latency, cache=cache, metric=metric
    )
