"""``planish::HadamardTransform``: activations times an orthogonal matrix given by its Kronecker factors.

    Y[..., n] = X[..., n] · (I ⊗ A ⊗ B ⊗ C)

Read as a matrix [a, b], a row of X becomes Aᵀ · X · B: two small products instead of one with [n, n], and
n·(a + b) multiplications instead of n². The factors are operands, with their share of 1/√n in them, so the op
serves any orthogonal matrix that factors. Their orders may multiply to a divisor of n: blocks of n are then
transformed alike, which is the identity in front. The inverse is the same op with every factor transposed.

The overload says how many factors there are:

- plain: A of order n itself;
- ``blocks``: A of an order that divides n;
- ``two``, ``three``: A, B (, C), in blocks where their orders' product is smaller than n;
- ``leading``: I ⊗ A ⊗ I_d, for a transform across heads of d features.

X, the factors and Y share one float type. Names: A [a, a], B [b, b], C [c, c].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..errors import ModelError
from .definition import DOMAIN, OpDefinition

OP_TYPE = "HadamardTransform"

_GROUP = """
  shape = Shape (X)
  dims = Constant <value_ints: ints = @dims> ()
  grouped = Reshape (X, dims)
"""
_LEFT = "  left = Transpose <perm: ints = [1, 0]> (A)\n"
_UNGROUP = "  Y = Reshape (transformed, shape)\n"
_BODIES = {
    "": ("(X, A) => (Y)", "  Y = MatMul (X, A)\n"),
    "blocks": ("<dims> (X, A) => (Y)", _GROUP + "  transformed = MatMul (grouped, A)\n" + _UNGROUP),
    "leading": (
        "<dims> (X, A) => (Y)",
        _GROUP + _LEFT + "  transformed = MatMul (left, grouped)\n" + _UNGROUP,
    ),
    "two": (
        "<dims> (X, A, B) => (Y)",
        _GROUP
        + "  by_b = MatMul (grouped, B)\n"
        + _LEFT
        + "  transformed = MatMul (left, by_b)\n"
        + _UNGROUP,
    ),
    "three": (
        "<dims, outer_dims> (X, A, B, C) => (Y)",
        _GROUP
        + """
  by_c = MatMul (grouped, C)
  middle = Transpose <perm: ints = [1, 0]> (B)
  by_b = MatMul (middle, by_c)
  outer_dims = Constant <value_ints: ints = @outer_dims> ()
  outer = Reshape (by_b, outer_dims)
"""
        + _LEFT
        + "  transformed = MatMul (left, outer)\n"
        + _UNGROUP,
    ),
}
DEFINITIONS = {
    overload: OpDefinition(OP_TYPE, overload, signature, body)
    for overload, (signature, body) in _BODIES.items()
}
_OVERLOAD_OF_COUNT = {1: "blocks", 2: "two", 3: "three"}


def hadamard_transform(
    x: ir.Value, factors: Sequence[ir.Value], *, trailing: int = 1, name: str | None = None
) -> tuple[ir.Node, OpDefinition]:
    """A node of the op and the definition that its model must hold (see `define`).

    Args:
        x: [..., n] float, n known.
        factors: one to three square matrices, A first; the product of their orders divides n. See
            `factor_values`.
        trailing: d > 1 for I ⊗ A ⊗ I_d: one factor, across n / (a·d) groups of a heads of d features.
        name: the node's name.

    Raises:
        ModelError: shapes that do not fit, or a combination that has no overload.
    """
    features = x.shape[-1] if x.shape is not None and len(x.shape) else None
    if not isinstance(features, int):
        raise ModelError(f"{OP_TYPE} {name!r}: the last dimension of {x.name!r} must be known")
    orders = [_order(factor, name) for factor in factors]
    if not 1 <= len(orders) <= 3 or (trailing > 1 and len(orders) > 1):
        raise ModelError(
            f"{OP_TYPE} {name!r}: expected one to three factors, or one before trailing features; "
            f"found {len(orders)} and trailing={trailing}"
        )
    size = math.prod(orders) * trailing
    if size == 0 or features % size:
        raise ModelError(
            f"{OP_TYPE} {name!r}: factors {orders} × {trailing} do not divide {features} features"
        )
    if trailing > 1:
        overload, dims = "leading", [-1, *orders, trailing]
    elif orders == [features]:
        overload, dims = "", []
    else:
        overload, dims = _OVERLOAD_OF_COUNT[len(orders)], [-1, *orders]
    attributes = {"dims": dims} if dims else {}
    if overload == "three":
        attributes["outer_dims"] = [-1, orders[0], orders[1] * orders[2]]
    definition = DEFINITIONS[overload]
    node = ir.node(OP_TYPE, [x, *factors], attributes, domain=DOMAIN, overload=overload, name=name)
    node.outputs[0].type, node.outputs[0].shape = x.type, ir.Shape(list(x.shape or ()))
    return node, definition


def factor_values(matrices: Sequence[npt.NDArray[Any]], name: str, dtype: ir.DataType) -> list[ir.Value]:
    """The constants ``<name>.a``, ``<name>.b``, … for `hadamard_transform`, yet to be registered in a graph.

    Args:
        matrices: Hadamard matrices of ±1, or orthogonal matrices; rows of either are brought to length 1.
        name: of the transform.
        dtype: the float type of the activations.
    """
    values = []
    for letter, matrix in zip("abc", matrices, strict=False):
        orthonormal = np.asarray(matrix, np.float64)
        orthonormal = orthonormal / np.linalg.norm(orthonormal[0])
        tensor = ir.tensor(orthonormal.astype(dtype.numpy()), name=f"{name}.{letter}")
        values.append(ir.val(f"{name}.{letter}", shape=matrix.shape, dtype=dtype, const_value=tensor))
    return values


def _order(factor: ir.Value, name: str | None) -> int:
    shape = None if factor.shape is None else tuple(factor.shape)
    if shape is None or len(shape) != 2 or shape[0] != shape[1] or not isinstance(shape[0], int):
        raise ModelError(f"{OP_TYPE} {name!r}: factor {factor.name!r} must be a square matrix, found {shape}")
    return shape[0]
