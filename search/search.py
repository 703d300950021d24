"""Finding the pipeline that a budget means, by measuring.

1. The model without compression, and every position of every knob by itself (pruning, weights, cache), are
   compiled and measured: size, time, cache, metric.
2. What combinations will measure is predicted as if knobs acted independently.
3. The combination that is predicted to be the best within the budget is compiled and measured; so is the next
   one, until there are as many trials as the budget allows, or nothing promising is left.

What is returned was measured itself; predictions only say what to try.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..ir.errors import BudgetError, PlanishError
from ..runtime.compiled_model import CompiledModel
from ..runtime.provenance import ParetoPoint
from .budget import CACHES, PRUNING, ROUNDED, SOLVED, Budget, Limits
from .front import best, dominates, front
from .measuring import Measuring
from .settings import Setting, combinations, predicted, singles

Feeds = Mapping[str, np.ndarray[Any, Any]]

_MISPREDICTED = 1.15
"""Factor by which a prediction may be over a limit and still be worth a trial."""
_DROP_MISPREDICTED = 1.5
"""Likewise, of the loss of the metric: losses are predicted less well than sizes and times."""


def search(
    compile_one: Callable[[str], CompiledModel],
    budget: Budget,
    *,
    feeds: Feeds,
    samples: Sequence[Feeds],
    has_data: bool,
) -> tuple[CompiledModel, tuple[ParetoPoint, ...]]:
    """The compiled model that a budget means, and what there was to choose from.

    Args:
        compile_one: compiles the model by a text pipeline.
        budget: limits, metric and settings to try.
        feeds: inputs of a call, which is timed.
        samples: inputs whose outputs are compared where the budget has no metric.
        has_data: there are calibration data, which pruning and sensitivities need.

    Returns:
        The model, and the front: what no other measured model beats in every respect, by size.

    Raises:
        BudgetError: nothing that was tried is within the budget; the message says what came nearest.
        PlanishError: the model cannot be compiled at all.
    """
    return _Search(compile_one, budget, feeds, samples, has_data).result()


class _Search:
    def __init__(
        self,
        compile_one: Callable[[str], CompiledModel],
        budget: Budget,
        feeds: Feeds,
        samples: Sequence[Feeds],
        has_data: bool,
    ) -> None:
        self._compile, self._budget = compile_one, budget
        at_rest = Setting()
        self._best = dense = compile_one(at_rest.passes)
        self._measuring = Measuring(
            dense,
            label=at_rest.label,
            passes=at_rest.passes,
            metric=budget.metric,
            feeds=feeds,
            samples=samples,
        )
        self._limits: Limits = budget.limits(self._measuring.dense)
        self._measured: dict[Setting, ParetoPoint] = {at_rest: self._measuring.dense}
        self._chosen: ParetoPoint | None = None
        self._failed: dict[Setting, str] = {}
        self._note(dense, self._measuring.dense)
        has_cache = self._measuring.dense.cache is not None
        self._knobs: tuple[Sequence[str], Sequence[str], Sequence[str]] = (
            _given(budget.pruning, PRUNING if has_data else ()),
            _given(budget.caches, CACHES if has_cache and has_data else ()),
            _given(budget.weights, SOLVED if has_data else ROUNDED),
        )

    def result(self) -> tuple[CompiledModel, tuple[ParetoPoint, ...]]:
        """Try what is worth it, and choose."""
        for setting in self._worth_trying():
            self._try(setting)
            if len(self._measured) + len(self._failed) > self._budget.trials:
                break
        if self._chosen is None:
            raise self._nothing_found()
        points = [
            dataclasses.replace(point, chosen=point == self._chosen)
            for point in front(list(self._measured.values()))
        ]
        if not any(point.chosen for point in points):  # what beats it in a respect that is not limited
            points.append(dataclasses.replace(self._chosen, chosen=True))
        return self._best, tuple(points)

    def _worth_trying(self) -> Iterator[Setting]:
        """Every knob by itself, then combinations by what is predicted of them after each trial."""
        yield from singles(*self._knobs)
        left = set(combinations(*self._knobs))
        while left:
            promising = {point: setting for setting in left if (point := self._promise(setting)) is not None}
            relaxed = self._relaxed()
            chosen = best(list(promising), relaxed, self._measuring.dense)
            if chosen is None:
                return
            left.discard(promising[chosen])
            yield promising[chosen]

    def _promise(self, setting: Setting) -> ParetoPoint | None:
        """What is predicted, unless something measured within the budget is better in every respect."""
        point = predicted(setting, self._measured, self._measuring.dense)
        if point is None:
            return None
        allowed = (other for other in self._measured.values() if self._limits.allow(other))
        return None if any(dominates(other, point) for other in allowed) else point

    def _relaxed(self) -> Limits:
        """The limits for predictions, which may be wrong."""
        factor, dense = _MISPREDICTED, self._measuring.dense.metric
        size, latency, cache, metric = dataclasses.astuple(self._limits)
        return Limits(
            size=None if size is None else size * factor,
            latency_ms=None if latency is None else latency * factor,
            cache=None if cache is None else cache * factor,
            metric=None if metric is None else dense - (dense - metric) * _DROP_MISPREDICTED,
        )

    def _try(self, setting: Setting) -> None:
        try:
            compiled = self._compile(setting.passes)
            point = self._measuring.point(compiled, setting.label, setting.passes)
        except PlanishError as error:
            self._failed[setting] = str(error)
        else:
            self._measured[setting] = point
            self._note(compiled, point)

    def _note(self, compiled: CompiledModel, point: ParetoPoint) -> None:
        """Keep the model if it is the best so far: only one is held, beside the uncompressed one."""
        chosen = best(list(self._measured.values()), self._limits, self._measuring.dense)
        if chosen is point:
            self._chosen, self._best = point, compiled
        if self._budget.on_trial is not None:
            self._budget.on_trial(point, self._limits.allow(point))

    def _nothing_found(self) -> BudgetError:
        dense, limits = self._measuring.dense, self._limits
        nearest = min(
            self._measured.values(),
            key=lambda point: (max(limits.excess(point), 1.0), max(limits.shortfall(point), 0.0)),
        )
        text = f"size {nearest.size / dense.size:.0%}, metric {nearest.metric:.4g} of {dense.metric:.4g}"
        if nearest.latency_ms is not None:
            text += f", {nearest.latency_ms:.3g} ms"
        failed = "".join(f"; {setting.label} failed: {why}" for setting, why in self._failed.items())
        return BudgetError(
            f"budget: none of {len(self._measured)} models that were measured is within it; "
            f"the nearest in what it takes is {nearest.label}: {text}{failed}",
            hint="allow more, give calibration data, or give settings of your own",
        )


def _given(own: Sequence[str] | None, default: Sequence[str]) -> Sequence[str]:
    return default if own is None else own
