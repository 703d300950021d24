"""A ``HadamardTransform`` as kernels see it: taken from a node or made up for timing, and taken apart."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..ir.errors import TargetError
from .linear_op import constant_of
from .microbenchmark import Feeds

Matrix = npt.NDArray[Any]

_UNITS_OF_ROUNDING = 8
"""How far, in units in the last place, an entry may be from the product of the parts' entries."""


@dataclasses.dataclass(frozen=True)
class HadamardSpec:
    """What the time of a kernel depends on, besides the number of rows.

    Attributes:
        features: n.
        factors: for each factor the orders of the parts that it is a Kronecker product of.
        trailing: d of I ⊗ A ⊗ I_d.
        heads: rows for each token: the first known dimension between the first and the last of four or more.
        rank: of the activations.
        dtype: their float type.
    """

    features: int
    factors: tuple[tuple[int, ...], ...]
    trailing: int
    heads: int
    rank: int
    dtype: str

    @property
    def block(self) -> int:
        """Features that are transformed together."""
        return math.prod(itertools.chain(*self.factors)) * self.trailing


@dataclasses.dataclass(frozen=True)
class HadamardOp:
    """A ``HadamardTransform``: its operands and what is known of them."""

    spec: HadamardSpec
    x: ir.Value
    factors: tuple[ir.Value, ...]

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        """The activations."""
        return (self.x,)

    def label(self) -> str:
        """The op's name."""
        return "HadamardTransform"

    def subject(self) -> dict[str, object]:
        """The spec."""
        return dataclasses.asdict(self.spec)

    def feeds(self, rows: int) -> Feeds:
        """Normally distributed activations."""
        spec = self.spec
        shape = (*[1] * (spec.rank - 3), spec.heads, rows, spec.features)[-spec.rank :]
        values = np.random.default_rng(rows).standard_normal(shape)
        return {"x": values.astype(ir.DataType[spec.dtype].numpy())}


def hadamard_op(node: ir.Node) -> HadamardOp:
    """Read a planish transform.

    Raises:
        TargetError: a factor is not constant, or the shape of the activations is not known.
    """
    x, *factors = node.inputs
    if x is None or x.shape is None or not isinstance(x.shape[-1], int) or None in factors:
        raise TargetError(f"node {node.name!r}: {node.op_type} lacks its factors, or the shape of its input")
    found = tuple(factor for factor in factors if factor is not None)
    spec = HadamardSpec(
        features=x.shape[-1],
        factors=tuple(tuple(len(part) for part in parts_of(constant_of(f).numpy())) for f in found),
        trailing=node.attributes["dims"].as_ints()[-1] if node.overload == "leading" else 1,
        heads=next((dim for dim in x.shape[1:-1] if isinstance(dim, int) and len(x.shape) > 3), 1),
        rank=len(x.shape),
        dtype=(found[0].dtype or ir.DataType.FLOAT).name,
    )
    return HadamardOp(spec, x, found)


def made_up_hadamard(spec: HadamardSpec) -> HadamardOp:
    """An op of this spec with random orthogonal matrices for parts."""
    rng = np.random.default_rng(0)
    dtype = ir.DataType[spec.dtype]
    factors = []
    for index, orders in enumerate(spec.factors):
        parts = [np.linalg.qr(rng.standard_normal((order, order)))[0] for order in orders]
        tensor = ir.tensor(functools.reduce(np.kron, parts).astype(dtype.numpy()), name=f"factor_{index}")
        order = math.prod(orders)
        factors.append(ir.val(f"factor_{index}", shape=[order, order], dtype=dtype, const_value=tensor))
    leading = [f"dim_{axis}" for axis in range(spec.rank - 1)]
    return HadamardOp(spec, ir.val("x", shape=[*leading, spec.features], dtype=dtype), tuple(factors))


def parts_of(matrix: Matrix) -> list[npt.NDArray[np.float64]]:
    """Matrices, as many as there are, whose Kronecker product is ``matrix`` [n, n] up to rounding."""
    epsilon = float(ml_dtypes.finfo(matrix.dtype).eps)  # type: ignore[no-untyped-call]
    rest, parts = np.asarray(matrix, np.float64), []
    tolerance = _UNITS_OF_ROUNDING * epsilon
    while (split := _split(rest, tolerance)) is not None:
        first, rest = split
        parts.append(first)
    return [*parts, rest]


def _split(matrix: Matrix, tolerance: float) -> tuple[Matrix, Matrix] | None:
    """``matrix`` as first ⊗ second with the smallest first of order above 1, whose rows have length 1."""
    order = len(matrix)
    row, column = np.unravel_index(np.abs(matrix).argmax(), matrix.shape)
    largest = matrix[row, column]
    for size in range(2, order // 2 + 1):
        inner, remainder = divmod(order, size)
        if remainder or not largest:
            continue
        first = matrix[row % inner :: inner, column % inner :: inner] / largest
        top, left = row // inner * inner, column // inner * inner
        second = matrix[top : top + inner, left : left + inner]
        if np.abs(np.kron(first, second) - matrix).max() <= tolerance * abs(largest):
            length = np.linalg.norm(first[0])
            return first / length, second * length
    return None
