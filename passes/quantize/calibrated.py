"""Quantising layers one group after the other along the residual stream, with statistics of their inputs.

A group is the linears that read one value (q, k and v; gate and up): they share its covariance. The model is
run up to that value with everything before it already quantised (true-sequential), the group's weights are
rewritten, and the run goes on through them. Only one group's statistics exist at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from ...ir import clone
from ...ir.errors import PassError
from ...runtime.calibration import ActivationStream, Covariance, RangeCollector, Tap, can_unfold
from ...runtime.calibration.ranges import Method, asymmetric_grid
from ...runtime.work_cache import Work
from ..infrastructure.base import LayerErrors, PassContext
from .algorithms import Algorithm, LayerStatistics
from .algorithms.rtn import RoundToNearest
from .convolution_layers import ConvolutionPlan, patch_statistics, quantize_convolution
from .grid import Grid
from .kept_results import GroupResult, LayerResult
from .layer_outcome import Rounded, Setting, layer_outcomes
from .layer_plan import LayerPlan
from .linear_layers import current_input, read_linear_weight, replace_linear
from .quantized_weight import Floats, QuantizedWeight
from .streamed import round_weight

Plan = LayerPlan | ConvolutionPlan
_COLUMN_BLOCK = 16
"""Neighbouring columns that may share a second-level grid (SpQR)."""
Say = Callable[[str, str], None]
"""Says something, the second, about a layer."""
Streams = tuple[ActivationStream, ActivationStream | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibratedQuantizer:
    """Quantises layers by an algorithm that may look at their inputs.

    Attributes:
        model: rewritten in place.
        ctx: supplies calibration data, remarks and progress.
        algorithm: chooses the integers.
        compensate_rank: of the low-rank residual beside each layer; 0 for none.
        calibrator: how static ranges are chosen.
        percentile: of the ``percentile`` calibrator.
    """

    model: ir.Model
    ctx: PassContext
    algorithm: Algorithm
    compensate_rank: int = 0
    calibrator: Method = "min-max"
    percentile: float = 99.99

    def _needs_data(self, plans: Iterable[Plan]) -> bool:
        """Whether these layers cannot be quantised without calibration data."""
        return (
            self.algorithm.needs_statistics
            or self.compensate_rank > 0
            or any(
                isinstance(plan, LayerPlan)
                and plan.activations is not None
                and plan.activations.granularity == "static"
                for plan in plans
            )
        )

    def run(self, plans: Sequence[Plan]) -> dict[str, LayerErrors]:
        """Quantise the layers, given in the order of the graph; gives each layer's errors by name."""
        streams = self._streams() if self._needs_data(plans) else None
        work = None if streams is None else self.ctx.work(self.model)
        errors: dict[str, LayerErrors] = {}
        decided_by = hashlib.sha256(repr(self._options()).encode())
        for group in self.ctx.progress(_groups(plans), "quantize layers"):
            # What a layer reads depends on how those before it were quantised, and on which of them were.
            decided_by.update(repr(_decisions(group)).encode())
            if isinstance(group, ConvolutionPlan):
                errors[group.convolution.name] = self._quantize_convolution(group, streams)
            elif streams is None or work is None:
                for plan, result in self._results(group, None, self.ctx.remark):
                    errors |= self._apply([plan], [result])
            else:
                errors |= self._quantize_on_data(group, streams, work, decided_by.hexdigest())
        return errors

    def _options(self) -> tuple[object, ...]:
        return (self.algorithm, self.compensate_rank, self.calibrator, self.percentile)

    def _quantize_on_data(
        self, group: list[LayerPlan], streams: Streams, work: Work, decided_by: str
    ) -> dict[str, LayerErrors]:
        """Quantise layers that share their input, or take what an earlier run found for them.

        The data moves on alike in both cases, so that what follows is the same to the last bit.
        """
        subject = ", ".join(plan.linear.name for plan in group)
        kept = work.recall(subject, decided_by)
        if kept is None:
            observed, statistics = self._observe(group, *streams)
            remarks: list[tuple[str, str]] = []
            pairs = self._results(observed, statistics, lambda *said: remarks.append(said))
            results = {plan.linear.name: result for plan, result in pairs}
            found = GroupResult([results[plan.linear.name] for plan in group], remarks)
            work.keep(subject, decided_by, found.arrays())
        else:
            found = GroupResult.of(kept)
            for _ in _together(*streams, str(current_input(group[0].linear).name)):
                pass
        for named, text in found.remarks:
            self.ctx.remark(named, text)
        return self._apply(group, found.layers)

    def _apply(self, group: Sequence[LayerPlan], results: Sequence[LayerResult]) -> dict[str, LayerErrors]:
        """Replace layers by what was found for them."""
        for plan, result in zip(group, results, strict=True):
            plan = dataclasses.replace(plan, activations=result.activations)
            replace_linear(self.model, plan, result.weight, result.errors.weight, result.low_rank)
        return {plan.linear.name: result.errors for plan, result in zip(group, results, strict=True)}

    def _streams(self) -> Streams:
        """The model as it is rewritten and, for algorithms that compare with it, the dense one."""
        stream = self.ctx.activation_stream(self.model)
        if not self.algorithm.needs_prefix_error:
            return stream, None
        return stream, self.ctx.activation_stream(clone(self.model), releases_weights=True)

    def _quantize_convolution(self, plan: ConvolutionPlan, streams: Streams | None) -> LayerErrors:
        remark = self._remark(plan.convolution.name)
        algorithm, statistics = self.algorithm, None
        if algorithm.needs_statistics and not can_unfold(plan.convolution):
            remark("rounded to nearest: statistics are taken of signals and images only")
            algorithm = RoundToNearest()
        elif algorithm.needs_statistics and streams is not None:
            statistics = patch_statistics(plan, _together(*streams, plan.input_name))
        return LayerErrors(
            quantize_convolution(self.model, plan, algorithm, statistics, remark, self.ctx.workers)
        )

    def _observe(
        self, group: list[LayerPlan], stream: ActivationStream, dense: ActivationStream | None
    ) -> tuple[list[LayerPlan], LayerStatistics | None]:
        """Statistics of what the group will read, and its plans with their static grids."""
        first = group[0]
        x = str(current_input(first.linear).name)
        activations = first.activations
        features = first.linear.in_features
        wants_statistics = self.algorithm.needs_statistics or self.compensate_rank > 0
        covariance = Covariance(features) if wants_statistics else None
        prefix_error = Covariance(features) if dense is not None else None
        is_static = activations is not None and activations.granularity == "static"
        ranges = RangeCollector(self.calibrator, percentile=self.percentile, name=x) if is_static else None
        for tap, dense_tap in _together(stream, dense, x):
            rows = tap.rows(x)
            if ranges is not None:
                ranges.update(rows)
            quantized = rows if activations is None else activations.apply(rows)
            if covariance is not None:
                covariance.update(quantized)
            if prefix_error is not None and dense_tap is not None:
                prefix_error.update(dense_tap.rows(x) - quantized, quantized)
        if ranges is not None and activations is not None:
            lowest, highest = ranges.range()
            scale, zero_point = asymmetric_grid(lowest, highest, activations.bits)
            static = dataclasses.replace(activations, scale=scale, zero_point=zero_point)
            group = [dataclasses.replace(plan, activations=static) for plan in group]
        if covariance is None:
            return group, None
        mean = covariance.mean
        if not np.isfinite(mean).all():
            raise PassError(
                f"quantize: tensor {x!r}, the input of {first.linear.name!r}, is not finite on the "
                "calibration data, or its squares are not",
                hint="look at the data and at the model's weights, or leave the layer out with ignore=",
            )
        return group, LayerStatistics(
            mean, None if prefix_error is None else prefix_error.mean, covariance.tokens
        )

    def _results(
        self,
        group: Sequence[LayerPlan],
        statistics: LayerStatistics | None,
        remark: Say,
    ) -> Iterator[tuple[LayerPlan, LayerResult]]:
        """Choose the integers of layers that share their input."""
        for alike in _with_equal_grids(group):
            grid, rounds = alike[0].grid, isinstance(self.algorithm, RoundToNearest)
            if rounds and statistics is None and isinstance(grid, Grid):
                yield from ((plan, _rounded(plan, grid)) for plan in alike)
                continue
            weights = [read_linear_weight(plan.linear) for plan in alike]
            names = ", ".join(plan.linear.name for plan in alike)
            together = self.algorithm(
                weights[0] if len(weights) == 1 else np.concatenate(weights, axis=1),
                grid,
                statistics,
                functools.partial(remark, names),
                self.ctx.workers,
            )
            setting = Setting(self.algorithm, statistics, self.compensate_rank)
            layers = list(_apart(alike, weights, together))
            yield from zip(alike, layer_outcomes(setting, layers, self.ctx.workers), strict=True)

    def _remark(self, names: str) -> Callable[[str], None]:
        return lambda reason: self.ctx.remark(names, reason)


def _decisions(group: list[LayerPlan] | ConvolutionPlan) -> list[tuple[object, ...]]:
    """What was decided about layers before their weights are looked at."""
    if isinstance(group, ConvolutionPlan):
        return [(group.convolution.name, group.scheme, group.grid)]
    return [(plan.linear.name, plan.scheme, plan.grid, plan.activations) for plan in group]


def _rounded(plan: LayerPlan, grid: Grid) -> LayerResult:
    """Rounded to nearest, without having the whole weight in float32."""
    linear = plan.linear
    weight, error = round_weight(linear.weight, grid, transposed=linear.transposed)
    return LayerResult(weight, None, LayerErrors(error), plan.activations)


def _apart(
    plans: Sequence[LayerPlan], weights: Sequence[Floats], together: QuantizedWeight
) -> Iterator[Rounded]:
    """Layers that were quantised as one matrix."""
    start = 0
    for plan, weight in zip(plans, weights, strict=True):
        stop = start + weight.shape[1]
        yield Rounded(weight, together.columns(start, stop), plan.activations)
        start = stop


def _groups(plans: Sequence[Plan]) -> list[list[LayerPlan] | ConvolutionPlan]:
    """Linears that read the same value in the same way, and convolutions, in the order of the graph."""
    groups: dict[object, list[LayerPlan] | ConvolutionPlan] = {}
    for plan in plans:
        if isinstance(plan, ConvolutionPlan):
            groups[plan.convolution.node] = plan
            continue
        alike = groups.setdefault((plan.linear.input, plan.activations), [])
        if isinstance(alike, list):
            alike.append(plan)
    return list(groups.values())


def _with_equal_grids(group: Sequence[LayerPlan]) -> Iterator[list[LayerPlan]]:
    """Layers that can be quantised as one matrix, and come apart again between blocks of columns."""
    alike: dict[object, list[LayerPlan]] = {}
    for plan in group:
        can_join = plan.linear.out_features % _COLUMN_BLOCK == 0
        alike.setdefault((plan.grid, None if can_join else plan.linear.node), []).append(plan)
    yield from alike.values()


def _together(
    stream: ActivationStream, dense: ActivationStream | None, x: str
) -> Iterator[tuple[Tap, Tap | None]]:
    """The same samples in the quantised and in the dense model."""
    if dense is None:
        yield from ((tap, None) for tap in stream.advance([x]))
    else:
        yield from zip(stream.advance([x]), dense.advance([x]), strict=True)
