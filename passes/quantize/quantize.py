"""Quantise the weights of linears, convolutions and embedding tables, and inputs where the scheme says so.

    MatMul(x, W) + b           →  planish::QuantizedLinear(x, Q, scale, zero_point, b)          A16 schemes
                               →  planish::DynamicQuantizedLinear(x, Q, scale, b)               W8A8, W4A4, …
                               →  planish::StaticQuantizedLinear(x, Q, scale, …, b)             static W8A8
    Conv(x, W) + b             →  planish::QuantizedConv(x, Q, scale, zero_point, b)            A16 schemes
    Gather(table, ids)         →  planish::QuantizedGather(ids, Q, scale)

W ≈ (Q − zero_point) · scale on the grid that `grid` defines; the integers are chosen by `algorithms`
(``rtn``: each weight to the nearest point; ``gptq`` and the others look at calibration data). Preconditions
of a layer: its weight is a constant that nothing else uses, with K divisible by the group size. Anything else
is skipped with its reason.

One layer, or the layers that share one input, are in memory at a time; float weights are released before the
next ones are read.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import ClassVar, Literal

import onnx_ir as ir

from ...codegen.target import Target
from ...ir.errors import PipelineError, TargetError
from ...ir.views import Convolution, Linear, convolutions, linears
from ...runtime.calibration.ranges import Method
from ..infrastructure.base import (
    Contract,
    Coverage,
    Fact,
    LayerErrors,
    Pass,
    PassContext,
    PassResult,
    Skipped,
)
from ..infrastructure.patterns import matches
from .algorithms import ALGORITHMS, algorithm
from .calibrated import CalibratedQuantizer, Plan
from .convolution_layers import ConvolutionPlan
from .embedding_tables import embedding_tables, quantize_table, reason_to_skip_table
from .layer_plan import LayerPlan, Planner
from .scheme import Scheme, parse_scheme
from .selection import DENSE, ConfigGroup, parse_groups, scheme_from_metadata


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize(Pass):
    """Store weights as integers: W8A16, W4A16, W4A16_ASYM, W8A8, W4A4 and the like.

    Attributes:
        scheme: W<bits>A16 or W<bits>A<bits>, with or without _ASYM (bits 2 to 8; activations below 16 are
            quantised at run time).
        group_size: rows of [K, N] that share a scale, a power of two from 16; −1 for one scale per output
            channel. By default 128 below 5 bits with float activations, else −1.
        symmetric: without zero points; by default what the scheme says.
        targets: names or ``re:`` patterns of the layers to quantise; empty means all.
        ignore: names or ``re:`` patterns of the layers to leave alone.
        config_groups: other schemes for some layers: names of groups, each with ``targets``, ``scheme``
            and, if wanted, ``group_size`` and ``symmetric``. The first group that matches counts; layers in
            no group are left alone.
        embeddings: quantise embedding tables too, int8 with one scale per row.
        algorithm: how the integers are chosen: ``rtn`` rounds to nearest; the others need calibration data:
            ``gptq`` lets later weights make up for the error of earlier ones, ``gptaq`` also for that of
            earlier layers, ``awq-clip`` rounds on the grid that is best for the output, ``spqr`` keeps
            outliers.
        act_order: ``gptq`` and its family: the inputs of largest energy first.
        damp: ``gptq`` and its family: share of the covariance's mean diagonal that is added to it.
        sweeps: ``gptq`` and its family: how often all weights are improved again after the first round, given
            the others; 0 is the algorithm as it was published.
        outlier_share: ``spqr``: the largest part of a layer's weights that are kept as outliers.
        clip: search for the scale with the least squared error instead of covering the largest weight; by
            default below 5 bits.
        compensate_rank: add a residual of this rank beside each layer that makes up for its error (EoRA).
        activations: quantised activations have one grid for the ``tensor`` or for each ``token``, found at
            run time, or a ``static`` one from calibration data. By default ``tensor`` for W8A8, else
            ``token``.
        activation_clip: the part of a token's largest magnitude that its grid covers; by default 1 for 8
            bits and 0.9 below.
        calibrator: static activations: how their range is chosen.
        percentile: static activations: what the ``percentile`` calibrator keeps, in per cent.
        reduce_range: W8A8: keep weights where int8 kernels that add products in 16 bits are exact;
            ``auto`` asks the target whether its kernel does that.
    """

    name: ClassVar[str] = "quantize"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED})

    scheme: str = "W4A16"
    group_size: int | None = None
    symmetric: bool | None = None
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ("lm_head",)
    config_groups: Mapping[str, ConfigGroup] = dataclasses.field(default_factory=dict)
    embeddings: bool = True
    algorithm: str = "rtn"
    act_order: bool = True
    damp: float = 0.01
    sweeps: int = 3
    outlier_share: float = 0.01
    clip: bool | None = None
    compensate_rank: int = 0
    activations: Literal["tensor", "token", "static"] | None = None
    activation_clip: float | None = None
    calibrator: Method = "min-max"
    percentile: float = 99.99
    reduce_range: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        schemes = [parse_scheme(self.scheme, self.group_size, self.symmetric)]
        schemes += [scheme for _, scheme in parse_groups(self.config_groups)]
        if self.algorithm not in ALGORITHMS:
            raise PipelineError(
                f"quantize: algorithm {self.algorithm!r} is not known",
                hint=f"expected one of {sorted(ALGORITHMS)}",
            )
        for scheme in schemes:
            self._check_scheme(scheme)
        for option in ("compensate_rank", "damp", "sweeps", "outlier_share"):
            if getattr(self, option) < 0:
                raise PipelineError(f"quantize: {option} must not be negative, found {getattr(self, option)}")

    def _check_scheme(self, scheme: Scheme) -> None:
        if self.algorithm == "spqr" and (scheme.format is not None or scheme.activation_bits is not None):
            raise PipelineError(
                "quantize: algorithm 'spqr' needs integer weights and float activations, "
                f"found {scheme.name!r}",
                hint="the other algorithms take all schemes",
            )
        narrow = scheme.bits < 8 or scheme.activation_bits != 8
        if self.activations in ("tensor", "static") and scheme.activation_bits is not None and narrow:
            raise PipelineError(
                f"quantize: {scheme.name!r} quantises activations per token, found "
                f"activations={self.activations}",
                hint="tensor and static grids are for W8A8",
            )
        if self.activation_clip is not None and not 0 < self.activation_clip <= 1:
            raise PipelineError(
                f"quantize: activation_clip must be above 0 and at most 1, found {self.activation_clip}"
            )

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        """Quantise the linears and convolutions in the order of the graph, then the embedding tables."""
        skipped: list[Skipped] = []
        errors = self._quantize_layers(model, ctx, skipped)
        unit = "linears" + (", convolutions" if convolutions(model) else "")
        if self.embeddings:
            errors |= self._quantize_tables(model, ctx, skipped)
            unit += " and embeddings"
        for skip in skipped:
            ctx.remark(skip.name, f"not quantised: {skip.reason}")
        _report_errors(ctx, errors)
        return PassResult(
            modified=bool(errors),
            coverage=Coverage(unit=unit, covered=len(errors), skipped=tuple(skipped)),
            statistics={self.scheme: len(errors)},
            layers=errors,
        )

    def _quantize_layers(
        self, model: ir.Model, ctx: PassContext, skipped: list[Skipped]
    ) -> dict[str, LayerErrors]:
        plans = self._plans(model, ctx, skipped)
        quantizer = CalibratedQuantizer(
            model=model,
            ctx=ctx,
            algorithm=algorithm(
                self.algorithm,
                act_order=self.act_order,
                damp=self.damp,
                sweeps=self.sweeps,
                outlier_share=self.outlier_share,
            ),
            compensate_rank=self.compensate_rank,
            calibrator=self.calibrator,
            percentile=self.percentile,
        )
        return quantizer.run(plans)

    def _plans(self, model: ir.Model, ctx: PassContext, skipped: list[Skipped]) -> list[Plan]:
        def limit_pairs() -> bool:
            if self.reduce_range == "auto":
                return ctx.target.adds_products_in_16_bits()
            return self.reduce_range

        planner = Planner(self.clip, self.activations, self.activation_clip, functools.cache(limit_pairs))
        groups = parse_groups(self.config_groups)
        position = {node: index for index, node in enumerate(model.graph)}
        layers: list[Linear | Convolution] = [*linears(model), *convolutions(model)]
        plans: list[Plan] = []
        for layer in sorted(layers, key=lambda layer: position[layer.node]):
            scheme = self._scheme_of(layer.name, layer.node, groups)
            plan = scheme if isinstance(scheme, str) else planner.plan(layer, scheme)
            if self.algorithm == "spqr" and isinstance(plan, ConvolutionPlan):
                plan = "spqr is for linears"
            if isinstance(plan, str):
                skipped.append(Skipped(layer.name, plan))
            else:
                plans.append(plan)
        _check_target(ctx.target, plans)
        return plans

    def _scheme_of(
        self, name: str, node: ir.Node, groups: list[tuple[tuple[str, ...], Scheme]]
    ) -> Scheme | str:
        """The scheme of a layer, or why it gets none; see `selection` for what goes before what."""
        if matches(name, self.ignore):
            return "ignored"
        chosen = scheme_from_metadata(node)
        if chosen == DENSE:
            return "left dense by allocate"
        if isinstance(chosen, Scheme):
            self._check_scheme(chosen)
            return chosen
        if groups:
            return next(
                (scheme for targets, scheme in groups if matches(name, targets)), "in no config group"
            )
        if self.targets and not matches(name, self.targets):
            return "not a target"
        return parse_scheme(self.scheme, self.group_size, self.symmetric)

    def _quantize_tables(
        self, model: ir.Model, ctx: PassContext, skipped: list[Skipped]
    ) -> dict[str, LayerErrors]:
        errors = {}
        for table in ctx.progress(embedding_tables(model), "quantize embeddings"):
            reason = self._not_asked_for(table.name) or reason_to_skip_table(table)
            if reason is not None:
                skipped.append(Skipped(table.name, reason))
                continue
            errors[table.name] = LayerErrors(quantize_table(model, table))
        return errors

    def _not_asked_for(self, name: str) -> str | None:
        if matches(name, self.ignore):
            return "ignored"
        return "not a target" if self.targets and not matches(name, self.targets) else None


def _check_target(target: Target, plans: list[Plan]) -> None:
    """Refuse what the target cannot run before any work is done."""
    for plan in plans:
        reason = target.unsupported_reason(plan.format) if isinstance(plan, LayerPlan) else None
        if reason is not None and isinstance(plan, LayerPlan):
            raise TargetError(
                f"target {target.name!r} cannot run {plan.linear.name!r} as {plan.scheme}: {reason}",
                hint="it runs " + "; ".join(target.formats()),
            )


def _report_errors(ctx: PassContext, errors: Mapping[str, LayerErrors]) -> None:
    """Say where the error is largest, in weights and, where it was measured, in outputs."""
    if not errors:
        return
    by_weight = {name: error.weight for name, error in errors.items()}
    by_output = {name: error.output for name, error in errors.items() if error.output is not None}
    for kind, found in (("weight", by_weight), ("output", by_output)):
        if found:
            worst = max(found, key=found.__getitem__)
            mean = sum(found.values()) / len(found)
            ctx.remark(worst, f"largest relative {kind} error, {found[worst]:.2g}; the mean is {mean:.2g}")
