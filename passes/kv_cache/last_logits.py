"""Compute logits of the last token alone.

    logits = Linear(h [batch, sequence, hidden])   →   logits = Linear(h[:, −1:])       [batch, 1, vocabulary]

A prompt's other logits are thrown away, and the vocabulary's linear is among the largest of a small decoder.
Drafts, perplexity and training need them: leave this pass out there.

Preconditions: ``logits`` [batch, sequence, vocabulary] come from a linear, with nothing but scaling, a bias
or a soft cap behind it.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...ir.errors import PassError
from ...ir.graph_builder import GraphBuilder
from ...ir.ops import DOMAIN, LINEAR_OPS
from ...ir.views.values import is_constant
from ..infrastructure.base import Coverage, Fact, Pass, PassContext, PassResult, Skipped

_LOGITS = "logits"
_BEHIND = ("Add", "Cast", "Div", "Identity", "Mul", "Tanh")
_LAST = (("start", -1), ("end", np.iinfo(np.int64).max), ("axis", 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LastLogits(Pass):
    """Let a decoder give the logits of the last token only."""

    name: ClassVar[str] = "last-logits"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        """Rewrite ``model`` in place."""
        del ctx
        logits = next((value for value in model.graph.outputs if value.name == _LOGITS), None)
        if logits is None or logits.shape is None or len(logits.shape) != 3:
            raise PassError(
                f"last-logits: expected an output {_LOGITS!r} [batch, sequence, vocabulary], found "
                f"{None if logits is None else logits.shape}"
            )
        if logits.shape[1] == 1:
            skipped = Skipped(_LOGITS, "they are of one token already")
            coverage = Coverage(unit="outputs", covered=0, skipped=(skipped,))
            return PassResult(modified=False, coverage=coverage)
        linear, between = _linear_of(logits)
        hidden = linear.inputs[0]
        assert hidden is not None
        build = GraphBuilder("planish.last_token")
        bounds = [build.constant(np.array([number], np.int64), name) for name, number in _LAST]
        last = build.op("Slice", hidden, *bounds)
        last.type, last.shape = hidden.type, _one_token(hidden)
        for value in build.initializers:
            model.graph.register_initializer(value)
        model.graph.insert_before(linear, build.nodes)
        linear.replace_input_with(0, last)
        for value in between:
            value.shape = _one_token(value)
        return PassResult(
            modified=True,
            coverage=Coverage(unit="outputs", covered=1),
            redefined_outputs=frozenset({_LOGITS}),
        )


def _linear_of(logits: ir.Value) -> tuple[ir.Node, list[ir.Value]]:
    """The linear that logits come from, and the values from it to them."""
    value, between = logits, []
    while (node := value.producer()) is not None:
        between.append(value)
        if node.op_type in ("MatMul", "Gemm") or (node.domain == DOMAIN and node.op_type in LINEAR_OPS):
            return node, between
        operands = [operand for operand in node.inputs if operand is not None and not is_constant(operand)]
        if node.op_type not in _BEHIND or len(operands) != 1:
            break
        value = operands[0]
    raise PassError(
        f"last-logits: {value.name!r} was expected to come from a linear, found "
        f"{'a graph input' if node is None else node.op_type}"
    )


def _one_token(value: ir.Value) -> ir.Shape | None:
    return None if value.shape is None else ir.Shape([value.shape[0], 1, *value.shape[2:]])
