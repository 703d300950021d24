"""Raise the spelled-out HardSwish to one node.

    x · Clip(x + 3, 0, 6) / 6              →  HardSwish(x)
    x · HardSigmoid(x; α = 1/6, β = 1/2)   →  HardSwish(x)

in any operand order and association (see `polynomial`).

Preconditions: the constants agree with the formula; nothing else reads the values in between; float32 or
float16, since onnxruntime has no kernel for others while it runs the arithmetic in float64 too.

Source: Howard et al., Searching for MobileNetV3, 2019 (arXiv:1905.02244).
"""

from __future__ import annotations

import onnx_ir as ir

from ..canonicalize.graph_edits import number, scalar
from ..infrastructure.rewriter import Replacement, Rule, missed
from .polynomial import Polynomial, find_argument, find_end, only_within

_TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})
_TOLERANCE = 1e-6
"""3, 6 and ½ are exact in any float type; 1/6 is rounded to float32 in the attribute."""
_SHIFTED: Polynomial = {(1, 0): 1.0, (0, 0): 3.0}
_SAME: Polynomial = {(1, 0): 1.0}
_SIXTH: Polynomial = {(1, 1): 1 / 6}
_PRODUCT: Polynomial = {(1, 1): 1.0}


class FuseHardSwish(Rule):
    """x · Clip(x + 3, 0, 6) / 6 → HardSwish(x)."""

    name = "hard-swish"
    roots = ("Clip", "HardSigmoid")

    def apply(self, node: ir.Node) -> bool:
        """Start at the bounded part, find x below it and the product above it."""
        if node.outputs[0].dtype not in _TYPES or not _is_hard_sigmoid(node):
            return False
        inner, outer = (_SHIFTED, _SIXTH) if node.op_type == "Clip" else (_SAME, _PRODUCT)
        x = find_argument(node.inputs[0], inner, _TOLERANCE)
        end = find_end(node, x, outer, _TOLERANCE) if x is not None else None
        if x is None or end is None:
            return False
        if not only_within(end, x):
            return missed(node, "another node reads a value inside the expression")
        replacement = Replacement(end)
        return replacement.finish(replacement.op("HardSwish", x, like=end.outputs[0]))


def _is_hard_sigmoid(node: ir.Node) -> bool:
    if node.op_type == "Clip":
        return [scalar(value) for value in node.inputs[1:]] == [0.0, 6.0]
    alpha, beta = number(node, "alpha", 0.2), number(node, "beta", 0.5)
    return abs(alpha - 1 / 6) <= _TOLERANCE and beta == 0.5
