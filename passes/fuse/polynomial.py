"""Recognise an arithmetic expression by its value, not by its spelling.

An expression over +, −, ×, ÷ by constants, negation and small integer powers of two values x and g is a
polynomial Σ cᵢⱼ xⁱ gʲ. Two graphs spell the same function, in whatever operand order, association or
constant folding, exactly when their coefficients agree.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ..canonicalize.graph_edits import is_op, scalar

Polynomial = dict[tuple[int, int], float]
"""Coefficient by (degree of x, degree of g)."""

ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Neg", "Pow", "Identity")
_LARGEST_DEGREE = 4
_DEEPEST = 8
_STEPS_IN = 5
"""How far below the argument of the function x is looked for."""
_STEPS_OUT = 4
"""How many arithmetic nodes may lie between the function and the result."""


def expand(value: ir.Value, x: ir.Value, g: ir.Value | None, depth: int = 0) -> Polynomial | None:
    """The polynomial that ``value`` is in ``x`` and ``g``; None if it is anything else."""
    if value is x:
        return {(1, 0): 1.0}
    if value is g:
        return {(0, 1): 1.0}
    constant = scalar(value)
    if constant is not None:
        return {(0, 0): constant}
    node = value.producer()
    if node is None or depth == _DEEPEST or not is_op(node, *ARITHMETIC):
        return None
    operands = [expand(operand, x, g, depth + 1) for operand in node.inputs if operand is not None]
    known = [operand for operand in operands if operand is not None]
    return _combine(node.op_type, known) if len(known) == len(operands) else None


def _combine(op_type: str, operands: list[Polynomial]) -> Polynomial | None:
    left, right = operands[0], operands[-1]
    if op_type == "Add":
        return _sum(left, right, 1.0)
    if op_type == "Sub":
        return _sum(left, right, -1.0)
    if op_type == "Mul":
        return _product(left, right)
    if op_type == "Neg":
        return _sum({}, left, -1.0)
    if op_type == "Identity":
        return left
    if set(right) != {(0, 0)}:
        return None
    constant = right[0, 0]
    if op_type == "Div":
        return {degree: factor / constant for degree, factor in left.items()} if constant else None
    if op_type == "Pow":
        return _power(left, constant)
    return None


def _sum(left: Polynomial, right: Polynomial, sign: float) -> Polynomial:
    total = dict(left)
    for degree, factor in right.items():
        total[degree] = total.get(degree, 0.0) + sign * factor
    return total


def _product(left: Polynomial, right: Polynomial) -> Polynomial | None:
    total: Polynomial = {}
    for (i, j), a in left.items():
        for (k, m), b in right.items():
            if i + j + k + m > _LARGEST_DEGREE:
                return None
            total[i + k, j + m] = total.get((i + k, j + m), 0.0) + a * b
    return total


def _power(base: Polynomial, exponent: float) -> Polynomial | None:
    if exponent != int(exponent) or not 1 <= exponent <= _LARGEST_DEGREE:
        return None
    result: Polynomial | None = base
    for _ in range(int(exponent) - 1):
        result = _product(result, base) if result is not None else None
    return result


def equals(found: Polynomial | None, expected: Mapping[tuple[int, int], float], tolerance: float) -> bool:
    """Whether all coefficients agree, each to ``tolerance`` relative; absent ones count as zero."""
    if found is None:
        return False
    return all(
        abs(found.get(degree, 0.0) - expected.get(degree, 0.0)) <= tolerance * abs(expected.get(degree, 0.0))
        for degree in found.keys() | expected.keys()
    )


def find_argument(
    value: ir.Value | None, expected: Mapping[tuple[int, int], float], tolerance: float
) -> ir.Value | None:
    """The x of which ``value`` is the polynomial ``expected``, the nearest if there are several."""
    if value is None:
        return None
    level, seen = [value], {value}
    for _ in range(_STEPS_IN):
        following = []
        for candidate in level:
            if equals(expand(value, candidate, None), expected, tolerance):
                return candidate
            producer = candidate.producer()
            if producer is not None and is_op(producer, *ARITHMETIC):
                following += [v for v in producer.inputs if v is not None and v not in seen]
        seen.update(following)
        level = following
    return None


def find_end(
    node: ir.Node, x: ir.Value, expected: Mapping[tuple[int, int], float], tolerance: float
) -> ir.Node | None:
    """The node above ``node`` that computes the polynomial ``expected`` in x and g, the value of ``node``."""
    g = node.outputs[0]
    current = g
    for _ in range(_STEPS_OUT):
        users = [use.node for use in current.uses()]
        if len(users) != 1 or not is_op(users[0], *ARITHMETIC):
            return None
        current = users[0].outputs[0]
        if equals(expand(current, x, g), expected, tolerance):
            return users[0]
    return None


def only_within(end: ir.Node, x: ir.Value) -> bool:
    """Whether nothing outside the expression from ``x`` to ``end`` reads a value inside it."""
    inside = _nodes_between(end.outputs[0], x)
    return not any(
        value.is_graph_output() or any(use.node not in inside for use in value.uses())
        for node in inside - {end}
        for value in node.outputs
    )


def _nodes_between(value: ir.Value, x: ir.Value) -> set[ir.Node]:
    found: set[ir.Node] = set()
    pending = [value]
    while pending:
        current = pending.pop()
        node = current.producer()
        if current is x or node is None or node in found or scalar(current) is not None:
            continue
        found.add(node)
        pending.extend(operand for operand in node.inputs if operand is not None)
    return found
