"""Recovery training: the compressed model learns to do as the model before compression does.

    minimise over W:   λ₁ · D(outputs, teacher's outputs) + λ₂ · D(hidden states, teacher's) + λ₃ · task

The teacher is the model as it was before the first pass of the pipeline that changed its function. Both are
lowered to torch.fx; gradients come from autograd, updates from AdamW. Hidden states are the residual stream
after each block that both models have, so no map of layers is needed: pruning inside of blocks leaves their
outputs' width, and a dropped block has no state of its own. Zeros in weights stay only where that is asked
for. BatchNormalization keeps its statistics.

Where training did not lower the loss on data that was kept from it, the weights are left as they were.

Preconditions: a canonical graph without quantised weights; a basis of the hidden states that is the
teacher's, so it belongs before `rotate`. ZipLM and SquareHead: Kurtic et al., 2023; logits: Hinton et al.,
2015.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...runtime.training import KeepZeros, Weight, float_weights, write_back
from ..infrastructure.base import Coverage, PassContext, PassResult, Skipped
from .training_pass import TrainingPass, reason_not_asked_for, report

_SPARSE = 0.05
"""A larger share of zeros was made on purpose."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill(TrainingPass):
    """Train a compressed model to do as the original does: W ← argmin distance(model(W), original).

    Trained are the float weights of linears, convolutions and norms, and their biases.

    Attributes:
        targets: names or ``re:`` patterns of the modules to train; empty means all.
        ignore: names or ``re:`` patterns of the modules that keep their weights.
        keep_zeros: zeros in the weights of linears and convolutions stay zero, as after `sparsify`.
    """

    name: ClassVar[str] = "distill"

    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    keep_zeros: bool = False

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        """Train the weights, and keep them if that helped."""
        weights, skipped = self._weights(model)
        for skip in skipped:
            ctx.remark(skip.name, f"not trained: {skip.reason}")
        if not weights:
            return PassResult(modified=False, coverage=_coverage(0, skipped))
        products = tuple(weight.name for weight in weights if weight.axis is not None)
        trained = self._train(model, ctx, weights, KeepZeros(names=products) if self.keep_zeros else None)
        unread = [weight.name for weight in weights if weight.name not in trained.parameters]
        skipped += [Skipped(name, "no loss depends on it") for name in unread]
        ctx.remark("training", report(trained))
        coverage = _coverage(len(trained.parameters), skipped)
        if not trained.is_better:
            ctx.remark(
                "training",
                "the weights before training were kept: it made the held-out loss worse; lower "
                "the learning rate, or give more data",
            )
            return PassResult(modified=False, coverage=coverage)
        share = _share_of_zeros(model, products)
        if share > _SPARSE and not self.keep_zeros:
            ctx.remark(
                "zeros", f"{share:.1%} of the weights were zero and are not now; keep_zeros keeps them"
            )
        write_back(model, trained.parameters)
        return PassResult(modified=True, coverage=coverage)

    def _weights(self, model: ir.Model) -> tuple[list[Weight], list[Skipped]]:
        chosen, skipped = [], []
        for weight in float_weights(model):
            reason = reason_not_asked_for(weight, self.targets, self.ignore)
            if reason is None and weight.role == "embedding" and not self.embeddings:
                reason = "embedding"
            if reason is None:
                chosen.append(weight)
            else:
                skipped.append(Skipped(weight.name, reason))
        return chosen, skipped


def _share_of_zeros(model: ir.Model, names: Sequence[str]) -> float:
    zeros = size = 0
    for name in names:
        tensor = model.graph.initializers[name].const_value
        if tensor is not None:
            zeros += tensor.size - int(np.count_nonzero(tensor.numpy()))
            size += tensor.size
    return zeros / max(size, 1)


def _coverage(covered: int, skipped: list[Skipped]) -> Coverage:
    return Coverage(unit="weights trained", covered=covered, skipped=tuple(skipped))
