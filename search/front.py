"""Which of several models nothing beats in every respect, and which of those a budget means."""

from __future__ import annotations

from collections.abc import Sequence

from ..runtime.provenance import ParetoPoint
from .budget import Limits


def front(points: Sequence[ParetoPoint]) -> list[ParetoPoint]:
    """Those that no other one dominates, by size."""
    found = [point for point in points if not any(dominates(other, point) for other in points)]
    return sorted(found, key=lambda point: (point.size, point.latency_ms or 0.0, -point.metric))


def dominates(point: ParetoPoint, other: ParetoPoint) -> bool:
    """Whether it is at least as good in every respect, and better in one."""
    ours, theirs = _costs(point), _costs(other)
    return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))


def best(points: Sequence[ParetoPoint], limits: Limits, dense: ParetoPoint) -> ParetoPoint | None:
    """The one that a budget means among those within it; None if there is none.

    Where size, time or cache are limited, the best metric; where only the metric is, the least size and time,
    as the product of their shares.
    """
    allowed = [point for point in points if limits.allow(point)]
    if any(limit is not None for limit in (limits.size, limits.latency_ms, limits.cache)):
        return max(allowed, key=lambda point: (point.metric, -_takes(point, dense)), default=None)
    return min(allowed, key=lambda point: (_takes(point, dense), -point.metric), default=None)


def _takes(point: ParetoPoint, dense: ParetoPoint) -> float:
    """The product of the shares of what the uncompressed model takes."""
    pairs = [(point.size, dense.size), (point.latency_ms, dense.latency_ms), (point.cache, dense.cache)]
    product = 1.0
    for found, whole in pairs:
        if found is not None and whole:
            product *= found / whole
    return product


def _costs(point: ParetoPoint) -> tuple[float, ...]:
    return (point.size, point.latency_ms or 0.0, point.cache or 0.0, -point.metric)
