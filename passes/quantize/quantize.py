"""Quantise the weights of linears and embedding tables.

    MatMul(x, W) + b           →  planish::QuantizedLinear(x, Q, scale, zero_point, b)          A16 schemes
                               →  planish::DynamicQuantizedLinear(x, Q, scale, b)               W8A8
    Gather(table, ids)         →  planish::QuantizedGather(ids, Q, scale)

W ≈ (Q − zero_point) · scale on the grid that `grid` defines; the integers are chosen by `algorithm` (``rtn``:
each weight to the nearest point). Preconditions of a layer: its weight is a constant that nothing else uses,
with K divisible by the group size. Anything else is skipped with its reason.

One layer is in memory at a time; its float weight is released before the next one is read.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import onnx_ir as ir

from ...ir.errors import PipelineError
from ...ir.views import linears
from ..infrastructure.base import Contract, Coverage, Fact, Pass, PassContext, PassResult, Skipped
from .algorithms import ALGORITHMS
from .embedding_tables import embedding_tables, quantize_table, reason_to_skip_table
from .linear_layers import quantize_linear, reason_to_skip_linear
from .scheme import parse_scheme
from .selection import matches
from .weights import float_dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize(Pass):
    """Store weights as integers: W8A16, W4A16, W4A16_ASYM, W8A8 and the like.

    Attributes:
        scheme: W<bits>A16, W<bits>A16_ASYM (bits 2 to 8), or W8A8 (activations quantised at run time).
        group_size: rows of [K, N] that share a scale, a power of two from 16; −1 for one scale per output
            channel. By default 128 below 5 bits, else −1.
        symmetric: without zero points; by default what the scheme says.
        targets: names or ``re:`` patterns of the layers to quantise; empty means all.
        ignore: names or ``re:`` patterns of the layers to leave alone.
        embeddings: quantise embedding tables too, int8 with one scale per row.
        algorithm: how the integers are chosen: ``rtn``.
        clip: search for the scale with the least squared error instead of covering the largest weight; by
            default below 5 bits.
        activations: W8A8: one grid for the whole ``tensor``, or one per ``token``.
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
    embeddings: bool = True
    algorithm: str = "rtn"
    clip: bool | None = None
    activations: Literal["tensor", "token"] = "tensor"
    reduce_range: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        parse_scheme(self.scheme, self.group_size, self.symmetric)
        if self.algorithm not in ALGORITHMS:
            raise PipelineError(
                f"quantize: algorithm {self.algorithm!r} is not known",
                hint=f"expected one of {sorted(ALGORITHMS)}",
            )

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        """Quantise the linears, then the embedding tables, one at a time."""
        skipped: list[Skipped] = []
        errors = self._quantize_linears(model, ctx, skipped)
        unit = "linears"
        if self.embeddings:
            errors |= self._quantize_tables(model, ctx, skipped)
            unit = "linears and embeddings"
        for skip in skipped:
            ctx.remark(skip.name, f"not quantised: {skip.reason}")
        if errors:
            worst = max(errors, key=errors.__getitem__)
            mean = sum(errors.values()) / len(errors)
            ctx.remark(worst, f"largest relative weight error, {errors[worst]:.2g}; the mean is {mean:.2g}")
        return PassResult(
            modified=bool(errors),
            coverage=Coverage(unit=unit, covered=len(errors), skipped=tuple(skipped)),
            statistics={self.scheme: len(errors)},
        )

    def _quantize_linears(
        self, model: ir.Model, ctx: PassContext, skipped: list[Skipped]
    ) -> dict[str, float]:
        scheme = parse_scheme(self.scheme, self.group_size, self.symmetric)
        limit_pairs = scheme.dynamic and (
            ctx.target.adds_products_in_16_bits() if self.reduce_range == "auto" else self.reduce_range
        )
        algorithm = ALGORITHMS[self.algorithm]()
        errors = {}
        for linear in ctx.progress(linears(model), "quantize linears"):
            reason = self._not_asked_for(linear.name) or reason_to_skip_linear(linear, scheme)
            if reason is not None:
                skipped.append(Skipped(linear.name, reason))
                continue
            grid = scheme.grid(
                float_dtype(linear.weight),
                clip=scheme.bits < 5 if self.clip is None else self.clip,
                limit_pairs=limit_pairs,
            )
            errors[linear.name] = quantize_linear(
                model, linear, algorithm, grid, self.activations if scheme.dynamic else None
            )
        return errors

    def _quantize_tables(self, model: ir.Model, ctx: PassContext, skipped: list[Skipped]) -> dict[str, float]:
        errors = {}
        for table in ctx.progress(embedding_tables(model), "quantize embeddings"):
            reason = self._not_asked_for(table.name) or reason_to_skip_table(table)
            if reason is not None:
                skipped.append(Skipped(table.name, reason))
                continue
            errors[table.name] = quantize_table(model, table)
        return errors

    def _not_asked_for(self, name: str) -> str | None:
        if matches(name, self.ignore):
            return "ignored"
        return "not a target" if self.targets and not matches(name, self.targets) else None
