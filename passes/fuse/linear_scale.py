"""Fold a constant factor behind a linear into its weight and bias.

    (x W + b) · c  →  x (W c) + b c        also ÷ c

Such factors are the 1/√d of attention where the model scales the query itself. The product is computed in
float64 and rounded once, when the weight is read.

Preconditions: the weight, and the bias if there is one, belong to this linear alone; c is a finite constant,
one number or one per output, not 0 where it divides; nothing else reads what is scaled.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...ir.derived import DerivedTensor
from ..canonicalize.graph_edits import constant, constant_tensor, only_use, producer, rank
from ..infrastructure.rewriter import Replacement, Rule, missed
from .merge_linears import Branch, find_branch
from .weights import Array


class FoldLinearScale(Rule):
    """(x W + b) · c → x (W c) + b c."""

    name = "fold-linear-scale"
    roots = ("Mul", "Div")

    def apply(self, node: ir.Node) -> bool:
        """Fold one multiplication or division by a constant."""
        scaled, other = node.inputs[:2]
        if node.op_type == "Mul" and _linear(scaled) is None:
            scaled, other = other, scaled
        linear = _linear(scaled)
        if linear is None or other is None:
            return False
        if constant_tensor(other) is None:
            return False
        factor = _factor(other, linear)
        if factor is None:
            return missed(node, "the factor is not a constant per output")
        if node.op_type == "Div":
            if not factor.all():
                return missed(node, "division by zero")
            factor = 1 / factor
        for value in (linear.weight, linear.bias):
            if value is not None and value.const_value is not None:
                value.const_value = _scaled(value.const_value, factor)
        return Replacement(node).finish(linear.output)


def _linear(value: ir.Value | None) -> Branch | None:
    """The linear whose result is ``value``, if one node reads it."""
    node = producer(value, "MatMul", "Add")
    if node is None or value is None or not only_use(value):
        return None
    product = node if node.op_type == "MatMul" else producer(node.inputs[0], "MatMul")
    branch = find_branch(product) if product is not None else None
    if branch is None or branch.output is not value or branch.weight.dtype is None:
        return None
    return branch if branch.weight.dtype.is_floating_point() else None


def _factor(value: ir.Value, linear: Branch) -> Array | None:
    array = constant(value, limit=1 << 20)
    own_rank = rank(linear.output)
    if array is None or array.size not in (1, linear.width):
        return None
    if array.ndim > 1 and (own_rank is None or array.ndim > own_rank or array.shape[-1] != array.size):
        return None
    factor = array.astype(np.float64).reshape(-1)
    return factor if bool(np.isfinite(factor).all()) else None


def _scaled(tensor: ir.TensorProtocol, factor: Array) -> ir.TensorProtocol:
    """The tensor times ``factor`` along its last axis, computed each time it is read."""
    dtype = tensor.dtype

    def read() -> ir.TensorProtocol:
        product = tensor.numpy().astype(np.float64) * factor
        return ir.Tensor(product.astype(dtype.numpy()), dtype=dtype)

    return DerivedTensor(read, [tensor], dtype=dtype, shape=[int(size) for size in tensor.shape.numpy()])
