"""Raise the spelled-out Gaussian error linear unit to one Gelu node.

    erf form    x/2 · (1 + erf(x/√2))                          →  Gelu(x)
    tanh form   x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))   →  Gelu(x, approximate="tanh")

in any operand order and association, with constants folded or not (see `polynomial`).

Preconditions: the constants agree with the formula to the rounding of the data type; nothing else reads the
values in between; opset ≥ 20. The quick form x · sigmoid(1.702 x) is another function and has no standard op.

Source: Hendrycks and Gimpel, Gaussian Error Linear Units, 2016 (arXiv:1606.08415).
"""

from __future__ import annotations

import math

import onnx_ir as ir

from ..infrastructure.rewriter import Replacement, Rule, missed
from .polynomial import Polynomial, find_argument, find_end, only_within

_INNER: dict[str, Polynomial] = {
    "Erf": {(1, 0): 1 / math.sqrt(2)},
    "Tanh": {(1, 0): math.sqrt(2 / math.pi), (3, 0): math.sqrt(2 / math.pi) * 0.044715},
}
_OUTER: Polynomial = {(1, 0): 0.5, (1, 1): 0.5}
_APPROXIMATE = {"Erf": "none", "Tanh": "tanh"}


class FuseGelu(Rule):
    """x/2 · (1 + erf(x/√2)), or its tanh form → Gelu(x)."""

    name = "gelu"
    roots = ("Erf", "Tanh")

    def apply(self, node: ir.Node) -> bool:
        """Start at the erf or tanh, find x below it and the end of the expression above it."""
        tolerance = _rounding(node.outputs[0].dtype)
        x = find_argument(node.inputs[0], _INNER[node.op_type], tolerance)
        end = find_end(node, x, _OUTER, tolerance) if x is not None else None
        if x is None or end is None:
            return False
        if not only_within(end, x):
            return missed(node, "another node reads a value inside the expression")
        replacement = Replacement(end)
        return replacement.finish(
            replacement.op("Gelu", x, like=end.outputs[0], approximate=_APPROXIMATE[node.op_type])
        )


def _rounding(dtype: ir.DataType | None) -> float:
    """How far a constant of the formula may be off: a few roundings of the type that holds it."""
    return 1e-2 if dtype == ir.DataType.BFLOAT16 else 2e-3 if dtype == ir.DataType.FLOAT16 else 1e-5
