"""The pass that establishes the canonical form: an ordered list of steps, each in its own module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import onnx_ir as ir

from ..infrastructure.base import Fact, Pass, PassContext, PassResult
from .constant_folding import fold_constants
from .dead_code import merge_common_subexpressions, remove_dead_code
from .graph_edits import merge
from .no_ops import remove_no_ops
from .shape_arithmetic import forget_shape_contents, infer_shapes, simplify_shapes

Step = Callable[[ir.Model], dict[str, int]]


@dataclass(frozen=True, kw_only=True)
class Canonicalize(Pass):
    """Bring a model into the canonical form that the other passes rely on.

    Attributes:
        folding_limit: elements of the largest constant that is computed at compile time.
    """

    name: ClassVar[str] = "canonicalize"
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})

    folding_limit: int = 1 << 20

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        """Rewrite ``model`` in place; the statistics count the rewrites of each step."""
        del ctx
        statistics: dict[str, int] = {}
        for step in self.steps():
            statistics = merge(statistics, step(model))
        forget_shape_contents(model)
        return PassResult(
            modified=any(statistics.values()),
            statistics={name: count for name, count in statistics.items() if count},
        )

    def steps(self) -> tuple[Step, ...]:
        """The rewrites in order. Folding comes twice: symbolic shapes make further arithmetic constant."""
        fold = partial(fold_constants, limit=self.folding_limit)
        return (
            fold,
            remove_no_ops,
            remove_dead_code,
            _infer,
            remove_no_ops,
            simplify_shapes,
            fold,
            remove_dead_code,
            merge_common_subexpressions,
        )


def _infer(model: ir.Model) -> dict[str, int]:
    infer_shapes(model)
    return {}
