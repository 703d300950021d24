"""Fold the weights of norms into the linears that read them, and make LayerNorms RMSNorms by centring.

    RMSNorm(x; γ) · W           →  RMSNorm(x; 1) · diag(γ) W
    LayerNorm(x; γ, β) · W + b  →  LayerNorm(x; 1) · diag(γ) W + (b + βᵀW)
    LayerNorm(x; 1)             →  RMSNorm(x; 1)                with everything that writes x made mean-free

A norm without weights commutes with rotations of its input, which `rotate` relies on (QuaRot, Ashkboos et
al., 2024; SliceGPT, Ashkboos et al., 2024, for the centring). LayerNorm subtracts the mean m(x) first; since
it does that to its whole input, x − m(x) may as well be what is written: embeddings, output projections and
their biases lose the mean over their channels.

Preconditions of folding a norm: its weight is constant and only linears read its output, each with a weight
of its own. The norms that Gemma 2 puts behind a branch, and Qwen 3's norms of queries and keys, feed other
ops and keep their weights. Preconditions of centring a stream: nothing but LayerNorms reads it, and what
writes it is constant. A projection that is tied to the embedding is untied first.

A norm that stores 1 + w is read as the sum, which `canonicalize` has computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...ir.ops import drop_unused_initializer
from ...ir.views.values import input_at, is_constant, static_dim
from ..infrastructure.base import Coverage, Fact, Pass, PassContext, PassResult, Skipped
from .biases import set_constant, shift_output, tensor_like
from .carried import carried
from .center import center_streams
from .streams import is_norm, is_weightless, norm_name, read_vector
from .untie import untie
from .vectors import Vector, change, projections, read_array, reason_not_to_change

_SCALINGS = frozenset({"Mul", "Div", "ReduceSum"})
"""Ops that pass vectors on but change how large a shift of them is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldNorms(Pass):
    """Move the weights of norms into the linears behind them; make LayerNorms RMSNorms.

    Attributes:
        center: make mean-free what writes the input of LayerNorms, where that is possible, so that they
            become RMSNorms.
    """

    name: ClassVar[str] = "fold-norms"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED})

    center: bool = True

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        """Untie, fold norm by norm, then centre stream by stream."""
        statistics = {"weights-untied": untie(model, ctx), "norms-folded": 0}
        norms = [node for node in model.graph if is_norm(node)]
        skipped = []
        for norm in ctx.progress(norms, "fold norms"):
            if is_weightless(norm):
                continue
            readers = _linears_behind(norm)
            if isinstance(readers, str):
                skipped.append(Skipped(norm_name(norm), readers))
                ctx.remark(norm_name(norm), f"not folded: {readers}")
                continue
            _fold(norm, readers, model.graph)
            statistics["norms-folded"] += 1
        if self.center:
            statistics |= center_streams(norms, ctx)
        return PassResult(
            modified=any(statistics.values()),
            coverage=Coverage(unit="norms", covered=len(norms) - len(skipped), skipped=tuple(skipped)),
            statistics={name: count for name, count in statistics.items() if count},
        )


def _linears_behind(norm: ir.Node) -> list[Vector] | str:
    """The weights, along their inputs, of the linears that read the norm; else why it cannot be folded."""
    width = static_dim(norm.outputs[0], -1)
    for index in (1, 2):
        operand = input_at(norm, index)
        if operand is not None and not (is_constant(operand) and static_dim(operand, -1) == width):
            return "its scale or bias is computed, or is not one number per channel"
    readers: list[Vector] = []
    waiting = [norm.outputs[0]]
    while waiting:
        value = waiting.pop()
        if value.is_graph_output():
            return "the graph returns its output"
        for node in dict.fromkeys(value.consumers()):
            reader = read_vector(node)
            if reader is not None and node.inputs[0] is value:
                readers.append(reader)
            elif width is not None and _passes_on(node, width, shifted=input_at(norm, 2) is not None):
                waiting.extend(node.outputs)
            else:
                return f"{node.op_type} reads its output"
    if not readers:
        return "nothing reads its output"
    return reason_not_to_change(set(readers)) or readers


def _passes_on(node: ir.Node, width: int, *, shifted: bool) -> bool:
    """Whether the node only moves or scales its vectors; scaling is no good where they are shifted."""
    operands = carried(node, width)
    if operands is None or len(operands.activations) != 1 or operands.constants:
        return False
    return not (shifted and node.op_type in _SCALINGS)


def _fold(norm: ir.Node, readers: Sequence[Vector], graph: ir.Graph) -> None:
    """W ← diag(γ) W and b ← b + βᵀW for every reader; the norm keeps a scale of ones."""
    scale, bias = norm.inputs[1], input_at(norm, 2)
    assert scale is not None
    gamma = read_array(scale)
    beta = None if bias is None else read_array(bias)
    for reader in readers:
        if beta is not None and beta.any():
            shift_output(reader.node, projections(reader, beta), graph)
    change(readers, lambda vectors: vectors * gamma)
    set_constant(norm, 1, tensor_like(np.ones(gamma.shape), scale, scale.name), graph)
    if bias is not None:
        norm.resize_inputs(2)
        drop_unused_initializer(bias)
