"""Which weights are pruned by magnitude: an exact share of them, over all layers or in each, freely or 2:4.

unstructured   the k weights of least |w|
2:4            of every four along the summed axis the two of least |w| may go; of these the k least do
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from ...runtime.training import Masked, Parameters

Pattern = Literal["unstructured", "2:4"]
Scope = Literal["global", "layer"]

GROUP, KEPT = 4, 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruner:
    """Chooses weights to prune.

    Attributes:
        axes: the weights' names, and the axis of each that its layer sums over.
        pattern: how pruned weights may lie.
        scope: whether the share holds over all weights together or in each.
    """

    axes: Mapping[str, int]
    pattern: Pattern
    scope: Scope

    def choose(self, parameters: Parameters, sparsity: float) -> dict[str, torch.Tensor]:
        """True where a weight is pruned, by name: the round(sparsity · weights) of least magnitude."""
        names = [name for name in self.axes if name in parameters]
        scores = {name: self._scores(name, parameters[name].detach()) for name in names}
        groups = [names] if self.scope == "global" else [[name] for name in names]
        masks: dict[str, torch.Tensor] = {}
        for group in groups:
            masks |= _least({name: scores.pop(name) for name in group}, sparsity)
        return masks

    def _scores(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The magnitudes, infinite where the pattern keeps a weight."""
        magnitudes = weight.abs()
        if self.pattern == "unstructured":
            return magnitudes
        return magnitudes.masked_fill(~two_of_four(magnitudes, self.axes[name]), torch.inf)


def two_of_four(magnitudes: torch.Tensor, axis: int) -> torch.Tensor:
    """True for the two least of every four neighbours along ``axis``, whose length is a multiple of four."""
    moved = magnitudes.movedim(axis, -1)
    fours = moved.reshape(-1, GROUP)
    least = fours.argsort(dim=-1, stable=True)[:, : GROUP - KEPT]
    found = torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, least, True)
    return found.reshape(moved.shape).movedim(-1, axis)


def _least(scores: Mapping[str, torch.Tensor], sparsity: float) -> dict[str, torch.Tensor]:
    """True for the round(sparsity · size) least of all scores; of equal ones the first."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    count = round(sparsity * flat.numel())
    pruned = torch.zeros_like(flat, dtype=torch.bool)
    if count:
        largest = flat.kthvalue(count).values
        pruned = flat < largest
        pruned[(flat == largest).nonzero()[: count - int(pruned.sum())]] = True
    parts = torch.split(pruned, [score.numel() for score in scores.values()])
    return {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


@dataclasses.dataclass(kw_only=True)
class Method(Masked):
    """Base of the methods: when which weights are pruned in the course of training.

    Attributes:
        pruner: chooses the weights.
        sparsity: the share that is pruned in the end.
        steps: updates of the whole training.
    """

    pruner: Pruner
    sparsity: float
    steps: int


def zeros(tensors: Sequence[torch.Tensor]) -> tuple[int, int]:
    """How many elements are zero, and how many there are."""
    counts = [(int((tensor == 0).sum()), tensor.numel()) for tensor in tensors]
    return sum(zero for zero, _ in counts), sum(size for _, size in counts)
