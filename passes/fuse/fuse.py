"""The pass that merges neighbouring ops into fewer and wider ones; each rewrite has its own module."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from ..infrastructure.base import Fact, Pass, PassContext, PassResult
from ..infrastructure.rewriter import Rule, apply_rules
from .attention_layout import FlattenAttentionHeads
from .attention_mask import MASK_RULES
from .borrowed import borrowed_rules
from .convolution import FoldBatchNormalization, FoldConvolutionScale
from .gelu import FuseGelu
from .hard_swish import FuseHardSwish
from .head_slices import HEAD_SLICE_RULES
from .linear_scale import FoldLinearScale
from .merge_linears import MergeLinears
from .reshapes import CollapseReshapes
from .splits import SPLIT_RULES


@dataclass(frozen=True, kw_only=True)
class Fuse(Pass):
    """Merge neighbouring ops: activations, layouts, folded constants, linears that read the same input.

    Attributes:
        merge_linears: merge linears of one module that read the same input (query, key and value; gate, up).
        attention_layout: let Attention and RotaryEmbedding split the heads instead of a Transpose.
        ignore: linears to leave unmerged, by name or ``re:`` pattern; a name covers what is inside it.
    """

    name: ClassVar[str] = "fuse"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.FUSED})

    merge_linears: bool = True
    attention_layout: bool = True
    ignore: tuple[str, ...] = ()

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        """Rewrite ``model`` in place; the statistics count the rewrites by rule."""
        del ctx
        hits: dict[str, int] = {}
        for rules in self.stages():
            hits |= apply_rules(model, rules)
        return PassResult(
            modified=any(hits.values()), statistics={name: count for name, count in hits.items() if count}
        )

    def stages(self) -> Sequence[Sequence[Rule]]:
        """The rewrites in groups: what is folded into a linear must be there before linears are merged."""
        folds: list[Rule] = [
            FuseGelu(),
            FuseHardSwish(),
            FoldBatchNormalization(),
            FoldConvolutionScale(),
            FoldLinearScale(),
            *MASK_RULES,
            *SPLIT_RULES,
            *HEAD_SLICE_RULES,
            *borrowed_rules(),
        ]
        merges: list[Rule] = []
        if self.merge_linears:
            merges.append(MergeLinears(self._ignores))
        if self.attention_layout:
            merges += [FlattenAttentionHeads(), CollapseReshapes()]
        return folds, merges

    def _ignores(self, name: str) -> bool:
        return any(
            re.fullmatch(pattern[3:], name) is not None
            if pattern.startswith("re:")
            else name == pattern or name.startswith(f"{pattern}.")
            for pattern in self.ignore
        )
