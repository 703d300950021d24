"""Ops that treat the vectors along the last axis as wholes, so that a matrix on their channels passes by.

Each is linear in the vectors with the same coefficient for every channel: f(x₁ M, x₂ M, …) = f(x₁, x₂, …) M.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from ...ir.views.values import input_at, integer, is_constant, static_dim

_KEEP_ORDER = frozenset({"Cast", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
"""Elements stay in their order, so vectors stay whole where the last dimension keeps its size."""
_SUMS = frozenset({"Add", "Sub", "Sum"})
_SCALINGS = frozenset({"Mul", "Div"})
_REDUCTIONS = frozenset({"ReduceMean", "ReduceSum"})


@dataclasses.dataclass(frozen=True)
class Carried:
    """The operands of a node that hold vectors of the same basis as its outputs."""

    activations: tuple[int, ...]
    constants: tuple[int, ...] = ()


def carried(node: ir.Node, width: int) -> Carried | None:
    """The operands of ``node`` whose vectors of length ``width`` pass through whole; None if none do."""
    if node.domain != "" or any(static_dim(output, -1) != width for output in node.outputs):
        return None
    if node.op_type in _SUMS or (node.op_type == "Concat" and _is_another_axis(node)):
        return _all_operands(node, width)
    if node.op_type in _SCALINGS:
        return _scaled_operand(node, width)
    keeps_vectors = (
        node.op_type in _KEEP_ORDER
        or (node.op_type == "Transpose" and _keeps_last_axis(node))
        or (node.op_type in ("Gather", "Split") and _is_another_axis(node))
        or (node.op_type == "Slice" and _are_other_axes(node, 3))
        or (node.op_type in _REDUCTIONS and _are_other_axes(node, 1))
    )
    first = input_at(node, 0)
    if not keeps_vectors or static_dim(first, -1) != width:
        return None
    return Carried((), (0,)) if is_constant(first) else Carried((0,))


def _all_operands(node: ir.Node, width: int) -> Carried | None:
    """Every operand is a vector: a number that is added to all channels is not."""
    if any(static_dim(operand, -1) != width for operand in node.inputs):
        return None
    constants = tuple(index for index, operand in enumerate(node.inputs) if is_constant(operand))
    return Carried(tuple(index for index in range(len(node.inputs)) if index not in constants), constants)


def _scaled_operand(node: ir.Node, width: int) -> Carried | None:
    """One operand is a vector; the other has one number for all channels of it."""
    vector, factor = node.inputs
    index = 0
    if node.op_type == "Mul" and static_dim(vector, -1) != width:
        vector, factor, index = factor, vector, 1
    if vector is None or factor is None or factor.shape is None or static_dim(vector, -1) != width:
        return None
    if len(factor.shape) > 0 and static_dim(factor, -1) != 1:
        return None
    return Carried((), (index,)) if is_constant(vector) else Carried((index,))


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _is_another_axis(node: ir.Node) -> bool:
    rank = _rank(input_at(node, 0))
    return rank is not None and ((integer(node, "axis") or 0) + rank) % rank != rank - 1


def _keeps_last_axis(node: ir.Node) -> bool:
    permutation = node.attributes.get("perm")
    return permutation is not None and permutation.as_ints()[-1] == len(permutation.as_ints()) - 1


def _are_other_axes(node: ir.Node, index: int) -> bool:
    """The axes in input ``index`` are constant and the last is not among them."""
    rank, axes = _rank(input_at(node, 0)), input_at(node, index)
    if rank is None or axes is None or not is_constant(axes) or axes.const_value is None:
        return False
    return bool(np.all(axes.const_value.numpy() % rank != rank - 1))
