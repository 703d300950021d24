"""What a compressed model may take and lose, and which settings a search may try."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ..ir.errors import InputError
from ..runtime.compiled_model import CompiledModel
from ..runtime.provenance import ParetoPoint

Metric = Callable[[CompiledModel], float]
"""How good a compiled model is: more is better."""

PRUNING = (
    "prune{sparsity=0.15,multiple=32}",
    "prune{sparsity=0.3,multiple=32}",
    "prune{sparsity=0.5,multiple=32}",
)
"""Widths that the groups of `ROUNDED` and `SOLVED` divide: other layers would stay in float."""
CACHES = ("kv-cache{bits=8}", "kv-cache{bits=4}")
ROUNDED = (
    "quantize{scheme=W8A8,activations=token,ignore=[]}",
    "quantize{scheme=W4A16,group_size=32}",
)
SOLVED = (
    "quantize{scheme=W8A8,activations=token,ignore=[]}",
    "allocate{bits_per_weight=6.5,group_size=32},quantize{algorithm=gptq}",
    "allocate{bits_per_weight=5.5,group_size=32},quantize{algorithm=gptq}",
    "quantize{scheme=W4A16,group_size=32,algorithm=gptq}",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What the result may take and lose. Shares are of the model with its operations merged and no more.

    Attributes:
        size: bytes of the weights, or a share: ``"50%"``.
        latency_ms: of a call with the example inputs, in milliseconds; for decoders of a token, of 16 behind
            a prompt of 16. Or a share.
        cache: bytes of a decoder's key-value cache for 1,024 tokens, or a share.
        metric: how good a compiled model is, more is better. By default how much its outputs resemble those
            of the uncompressed model on the calibration data (or the example inputs): for logits
            exp(−KL), the factor on the probability of the text, else the mean cosine of rows.
        max_drop: how much less the metric may be than that of the uncompressed model; ``"1%"`` is relative.
        trials: how many models are compiled and measured at most, the uncompressed one aside.
        pruning: settings to choose from, each a text pipeline; nothing is always among them. Without
            calibration data by default none.
        weights: likewise, of the weights. By default 8 and 4 bits, and with calibration data mixed bits in
            between, by measured sensitivities.
        caches: likewise, of a decoder's key-value cache: by default 8 and 4 bits, with calibration data.
        on_trial: called with every model that was measured, and whether it meets the budget.
    """

    size: float | str | None = None
    latency_ms: float | str | None = None
    cache: float | str | None = None
    metric: Metric | None = None
    max_drop: float | str | None = None
    trials: int = 16
    pruning: tuple[str, ...] | None = None
    weights: tuple[str, ...] | None = None
    caches: tuple[str, ...] | None = None
    on_trial: Callable[[ParetoPoint, bool], None] | None = None

    def __post_init__(self) -> None:
        limits = {name: getattr(self, name) for name in ("size", "latency_ms", "cache", "max_drop")}
        given = {name: limit for name, limit in limits.items() if limit is not None}
        if not given:
            raise InputError(
                "budget: expected a limit, found none", hint=f"give one or more of {', '.join(limits)}"
            )
        for name, limit in given.items():
            if name != "max_drop" and not _amount(name, limit, 1.0) > 0:
                raise InputError(f"budget: {name} must be positive, found {limit!r}")
            if name == "max_drop" and not _amount(name, limit, 1.0) >= 0:
                raise InputError(f"budget: max_drop must not be negative, found {limit!r}")
        if self.trials < 1:
            raise InputError(f"budget: trials must be positive, found {self.trials}")

    def limits(self, dense: ParetoPoint) -> Limits:
        """The budget in numbers, given what the uncompressed model takes."""

        def limit(name: str, whole: float | None) -> float | None:
            given = getattr(self, name)
            if given is None:
                return None
            if whole is None:
                raise InputError(
                    f"budget: {name} is limited, and the model has none", hint=f"leave {name} out"
                )
            return _amount(name, given, whole)

        drop = limit("max_drop", abs(dense.metric))
        return Limits(
            size=limit("size", dense.size),
            latency_ms=limit("latency_ms", dense.latency_ms),
            cache=limit("cache", dense.cache),
            metric=None if drop is None else dense.metric - drop,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """A budget in numbers: the most of ``size``, ``latency_ms`` and ``cache``, and the least ``metric``."""

    size: float | None
    latency_ms: float | None
    cache: float | None
    metric: float | None

    def excess(self, point: ParetoPoint) -> float:
        """By which factor the point takes more than it may, in whatever is worst; at most 1 if it may."""
        worst = 0.0
        for name in ("size", "latency_ms", "cache"):
            limit, found = getattr(self, name), getattr(point, name)
            if limit is not None and found is not None:
                worst = max(worst, found / limit)
        return worst

    def shortfall(self, point: ParetoPoint) -> float:
        """By how much its metric is below the least; at most 0 if it is not."""
        return 0.0 if self.metric is None else self.metric - point.metric

    def allow(self, point: ParetoPoint) -> bool:
        """Whether the point is within the budget."""
        return self.excess(point) <= 1.0 and self.shortfall(point) <= 0.0


def _amount(name: str, given: float | str, whole: float) -> float:
    """A number, or a share of ``whole``."""
    try:
        if isinstance(given, str) and given.endswith("%"):
            return float(given.removesuffix("%")) / 100 * whole
        return float(given)
    except ValueError as error:
        raise InputError(
            f"budget: {name}: expected a number or a share, found {given!r}", hint='for example "50%"'
        ) from error
