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

from ..canonicalize.graph_edits import is_op
from ..infrastructure.rewriter import Replacement, Rule, missed
from .polynomial import ARITHMETIC, Polynomial, equals, expand, inner_nodes

_INNER: dict[str, Polynomial] = {
    "Erf": {(1, 0): 1 / math.sqrt(2)},
    "Tanh": {(1, 0): math.sqrt(2 / math.pi), (3, 0): math.sqrt(2 / math.pi) * 0.044715},
}
_OUTER: Polynomial = {(1, 0): 0.5, (1, 1): 0.5}
_APPROXIMATE = {"Erf": "none", "Tanh": "tanh"}

_STEPS_OUT = 4
"""At most this many arithmetic nodes lie between the erf and the result."""
_STEPS_IN = 5


class FuseGelu(Rule):
    """x/2 · (1 + erf(x/√2)), or its tanh form → Gelu(x)."""

    name = "gelu"
    roots = ("Erf", "Tanh")

    def apply(self, node: ir.Node) -> bool:
        """Start at the erf or tanh, find x below it and the end of the expression above it."""
        tolerance = _rounding(node.outputs[0].dtype)
        x = _find_argument(node, tolerance)
        end = _find_end(node, x, tolerance) if x is not None else None
        if x is None or end is None:
            return False
        inside = inner_nodes(end.outputs[0], {x})
        if any(
            value.is_graph_output() or any(use.node not in inside for use in value.uses())
            for inner in inside - {end}
            for value in inner.outputs
        ):
            return missed(node, "another node reads a value inside the expression")
        replacement = Replacement(end)
        return replacement.finish(
            replacement.op("Gelu", x, like=end.outputs[0], approximate=_APPROXIMATE[node.op_type])
        )


def _rounding(dtype: ir.DataType | None) -> float:
    """How far a constant of the formula may be off: a few roundings of the type that holds it."""
    return 1e-2 if dtype == ir.DataType.BFLOAT16 else 2e-3 if dtype == ir.DataType.FLOAT16 else 1e-5


def _find_argument(node: ir.Node, tolerance: float) -> ir.Value | None:
    """The x for which the argument of erf or tanh is the formula's polynomial."""
    argument = node.inputs[0]
    if argument is None:
        return None
    level, seen = [argument], {argument}
    for _ in range(_STEPS_IN):
        following = []
        for value in level:
            if equals(expand(argument, value, None), _INNER[node.op_type], tolerance):
                return value
            producer = value.producer()
            if producer is not None and is_op(producer, *ARITHMETIC):
                following += [v for v in producer.inputs if v is not None and v not in seen]
        seen.update(following)
        level = following
    return None


def _find_end(node: ir.Node, x: ir.Value, tolerance: float) -> ir.Node | None:
    """The node above ``node`` whose value is x/2 · (1 + g), with g the value of ``node``."""
    g = node.outputs[0]
    current = g
    for _ in range(_STEPS_OUT):
        users = [use.node for use in current.uses()]
        if len(users) != 1 or not is_op(users[0], *ARITHMETIC):
            return None
        current = users[0].outputs[0]
        if equals(expand(current, x, g), _OUTER, tolerance):
            return users[0]
    return None
