"""Sparse weights by training: an exact share of zeros in linears and convolutions, the rest retrained.

    W  →  W ∘ M,   M ∈ {0, 1},   share of zeros in M as asked,   W trained to do as the original model does

Shapes stay; zeros pay on kernels that skip them, such as 2:4 ones, and in compressed files. The losses, data
and trainer are those of `distill`. How M is chosen over the course of training: `gradual_magnitude` and
`ac_dc`; which weights, at any time: `masks`.

Preconditions of a layer: float weights that are no embedding table; for 2:4, a summed axis (inputs of a
linear, input channels of a convolution's group) that is a multiple of four.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import onnx_ir as ir

from ...ir.errors import PipelineError
from ...ir.views.values import static_dim
from ...runtime.training import Weight, float_weights, write_back
from ..distill.training_pass import TrainingPass, reason_not_asked_for, report
from ..infrastructure.base import Coverage, PassContext, PassResult, Skipped
from .ac_dc import AlternatingCompression
from .gradual_magnitude import GradualMagnitude
from .masks import GROUP, KEPT, Method, Pattern, Pruner, Scope, zeros


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparsify(TrainingPass):
    """Prune single weights while training: W → W ∘ M with an exact share of zeros.

    All weights are trained, biases and norms included, and embedding tables if ``embeddings`` says so.

    Attributes:
        method: ``gradual-magnitude`` lets the share of zeros rise; ``ac-dc`` alternates between pruned and
            dense training.
        sparsity: the share of the covered weights that is zero afterwards.
        pattern: ``2:4`` keeps two of every four weights that are summed; its sparsity is 0.5.
        scope: weights compete for their place over the whole model (``global``) or in each ``layer``.
        frequency: gradual-magnitude: steps between two masks, by default a hundredth of all steps; ac-dc:
            steps of a phase, by default a twentieth.
        initial_sparsity: gradual-magnitude: the share that is pruned before the first step.
        rise: gradual-magnitude: share of the steps over which the sparsity rises; afterwards it stays.
        dense: ac-dc: share of the steps before the first pruned phase.
        final: ac-dc: share of the steps of the last, pruned phase.
        targets: names or ``re:`` patterns of the modules to prune; empty means all.
        ignore: names or ``re:`` patterns of the modules that stay dense.
    """

    name: ClassVar[str] = "sparsify"

    method: Literal["gradual-magnitude", "ac-dc"] = "gradual-magnitude"
    sparsity: float = 0.5
    pattern: Pattern = "unstructured"
    scope: Scope = "global"
    frequency: int | None = None
    initial_sparsity: float = 0.0
    rise: float = 0.7
    dense: float = 0.1
    final: float = 0.15
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ("lm_head",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sparsity < 1:
            raise self._refused("sparsity", "more than 0 and less than 1")
        if self.pattern == "2:4" and self.sparsity != KEPT / GROUP:
            raise PipelineError(f"sparsify: sparsity: pattern 2:4 is 0.5 by itself, found {self.sparsity}")
        if not 0 <= self.initial_sparsity <= self.sparsity:
            raise self._refused("initial_sparsity", f"0 to the final {self.sparsity}")
        for name in ("rise", "final"):
            if not 0 < getattr(self, name) <= 1:
                raise self._refused(name, "more than 0, and 1 at most")
        if not 0 <= self.dense <= 1 - self.final:
            raise self._refused("dense", f"0 to {1 - self.final:g}: the rest is the final phase")
        if self.frequency is not None and self.frequency < 1:
            raise self._refused("frequency", "1 or more")

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        """Train with masks, and write the sparse weights back."""
        covered, skipped = self._covered(model)
        for skip in skipped:
            ctx.remark(skip.name, f"not pruned: {skip.reason}")
        if not covered:
            return PassResult(modified=False, coverage=_coverage(0, skipped))
        trainable = [
            weight for weight in float_weights(model) if weight.role != "embedding" or self.embeddings
        ]
        method = self._method({weight.name: _summed_axis(weight) for weight in covered})
        trained = self._train(model, ctx, trainable, method)
        pruned = {weight.name for weight in covered} & trained.parameters.keys()
        skipped += [
            Skipped(weight.name, "no loss depends on it") for weight in covered if weight.name not in pruned
        ]
        zero, size = zeros([trained.parameters[name].detach() for name in sorted(pruned)])
        if pruned:
            ctx.remark("sparsity", f"{zero} of {size} weights are zero: {zero / size:.4f}, {self.pattern}")
        ctx.remark("training", report(trained))
        write_back(model, trained.parameters)
        return PassResult(modified=True, coverage=_coverage(len(pruned), skipped), statistics={"zeros": zero})

    def _covered(self, model: ir.Model) -> tuple[list[Weight], list[Skipped]]:
        covered, skipped = [], []
        for weight in float_weights(model):
            if weight.role not in ("linear", "convolution"):
                continue
            reason = reason_not_asked_for(weight, self.targets, self.ignore)
            size = static_dim(model.graph.initializers[weight.name], _summed_axis(weight))
            if reason is None and self.pattern == "2:4" and (size is None or size % GROUP):
                reason = f"{size} summed inputs are no multiple of {GROUP}"
            if reason is None:
                covered.append(weight)
            else:
                skipped.append(Skipped(weight.name, reason))
        return covered, skipped

    def _method(self, axes: dict[str, int]) -> Method:
        pruner = Pruner(axes=axes, pattern=self.pattern, scope=self.scope)
        if self.method == "ac-dc":
            return AlternatingCompression(
                pruner=pruner,
                sparsity=self.sparsity,
                steps=self.steps,
                dense=round(self.dense * self.steps),
                phase=self.frequency or max(1, self.steps // 20),
                final=max(1, round(self.final * self.steps)),
            )
        return GradualMagnitude(
            pruner=pruner,
            sparsity=self.sparsity,
            steps=self.steps,
            initial_sparsity=self.initial_sparsity,
            rising=max(1, round(self.rise * self.steps)),
            frequency=self.frequency or max(1, self.steps // 100),
        )


def _summed_axis(weight: Weight) -> int:
    assert weight.axis is not None  # of a linear or convolution
    return weight.axis


def _coverage(covered: int, skipped: list[Skipped]) -> Coverage:
    return Coverage(unit="weights sparsified", covered=covered, skipped=tuple(skipped))
