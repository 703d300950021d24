"""The pass that establishes the canonical form: an ordered list of steps, each in its own module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import onnx_ir as ir

from ...ir.shapes import forget_shape_contents, infer_shapes
from ..infrastructure.base import Fact, Pass, PassContext, PassResult
from ..infrastructure.rewriter import apply_rules
from . import attention, attention_inputs, batched_transpose, linears, normalizations, rotary
from .constant_folding import fold_constants
from .dead_code import merge_common_subexpressions, remove_dead_code
from .functions import inline_functions
from .graph_edits import merge, opset
from .no_ops import remove_no_ops
from .shape_arithmetic import SELECTIONS, forget_anonymous_symbols, simplify_shapes
from .weight_names import name_weights
from .weight_ownership import separate_weights
from .weight_transposes import fold_weight_transposes

Step = Callable[[ir.Model], dict[str, int]]

_SHAPE_ROUNDS = 4
"""Shapes that take more rounds of inference than this to settle stay computed at run time."""


@dataclass(frozen=True, kw_only=True)
class Canonicalize(Pass):
    """Bring a model into the canonical form that the other passes rely on.

    - A linear layer is ``MatMul(x, W[in, out])`` and, with a bias, ``Add(·, b)``; Gemm and Conv stay where
      the source is more than that. ``W`` and ``b`` are initializers named after their module, one per module.
      A weight that the model ties is shared and says so in metadata (``planish.tied``, ``planish.tied_to``).
    - A norm, a rotary embedding and an attention are one node each where the opset has it; a decoder's
      attention takes ``past_key`` and ``past_value``, returns the present ones, and has its key/value heads
      unexpanded.
    - What can be known at compile time is a constant; there are no no-ops, dead nodes or equal computations.

    Exact: nothing is rewritten whose precondition is not known to hold. Models below opset 23 keep what that
    opset has no op for. Functions other than planish's own are inlined.

    Attributes:
        folding_limit: elements of the largest constant that is computed at compile time.
        untie: give an output projection that is tied to the token embedding a weight of its own, so that it
            can be quantised or pruned alone. The file then holds both.
    """

    name: ClassVar[str] = "canonicalize"
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})

    folding_limit: int = 1 << 20
    untie: bool = False

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
            inline_functions,
            fold,
            remove_no_ops,
            remove_dead_code,
            partial(fold_weight_transposes, untie=self.untie),
            partial(_settle_shapes, fold=fold),
            remove_dead_code,
            merge_common_subexpressions,
            _raise_ops,
            name_weights,
            separate_weights,
            remove_dead_code,
            merge_common_subexpressions,
        )


def _settle_shapes(model: ir.Model, *, fold: Step) -> dict[str, int]:
    """Infer shapes and use them, again as long as what was simplified lets inference see further."""
    statistics: dict[str, int] = {}
    for _ in range(_SHAPE_ROUNDS):
        forget_anonymous_symbols(model)
        infer_shapes(model, for_rewriting=True)
        statistics = merge(statistics, fold(model), remove_no_ops(model))
        simplified, folded = simplify_shapes(model), fold(model)
        statistics = merge(statistics, simplified, folded)
        if not simplified[SELECTIONS] and not folded["constants-folded"]:
            break
    return statistics


def _raise_ops(model: ir.Model) -> dict[str, int]:
    """Linears, norms, rotary embeddings and attention, each as the one op of this opset that says it."""
    families = (linears, normalizations, rotary, batched_transpose, attention, attention_inputs)
    return apply_rules(model, [rule for family in families for rule in family.rules(opset(model))])
