"""Kernels of ``HadamardTransform``: one, two or three matrix products, whichever is fastest here.

A factor that is itself a Kronecker product, as most Hadamard matrices are, is taken apart and put together
again in other groups: the matrix as a whole stays the same. Fewer groups are fewer nodes, more groups are
fewer multiplications. Bound graphs have no Shape nodes and no Transposes: constants are stored as they are
read, and leading dimensions are passed through Reshape.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...ir import ops
from ...ir.graph_builder import GraphBuilder
from ..hadamard_op import HadamardOp, HadamardSpec, Matrix, parts_of
from ..linear_op import constant_of
from .kernel import Kernel

_WIDEST_GROUP = 1024
"""Order of the largest matrix that a kernel may put together: 4 MiB in float32, and never the fastest."""


def _emit_body(build: GraphBuilder, op: HadamardOp) -> ir.Value:
    node, definition = ops.hadamard_transform(op.x, op.factors, trailing=op.spec.trailing, name=build.layer)
    return build.planish(node, definition)


def _emit(count: int, build: GraphBuilder, op: HadamardOp) -> ir.Value:
    """``count`` products, the last group first: it is on the last axis, the others take matrices."""
    spec = op.spec
    groups = _groups(op, count)
    orders = [len(group) for group in groups]
    passed = [0] * (spec.rank - 1)
    blocks = [] if spec.block == spec.features else [spec.features // spec.block]
    inner, value, shape = spec.trailing, op.x, [spec.features]
    for position in reversed(range(count)):
        order, matrix = orders[position], groups[position]
        dims = [*blocks, *orders[:position], order] + ([inner] if inner > 1 else [])
        if dims != shape:
            value = build.op("Reshape", value, build.constant(np.array(passed + dims), f"dims_{position}"))
        if inner == 1:
            value = build.op("MatMul", value, _constant(build, matrix, position, spec))
        else:
            value = build.op("MatMul", _constant(build, matrix.T, position, spec), value)
        inner, shape = inner * order, dims
    if shape == [spec.features]:
        return value
    return build.op("Reshape", value, build.constant(np.array([*passed, spec.features]), "dims"))


def _constant(build: GraphBuilder, matrix: Matrix, position: int, spec: HadamardSpec) -> ir.Value:
    return build.constant(matrix.astype(ir.DataType[spec.dtype].numpy()), f"matrix_{position}")


def _groups(op: HadamardOp, count: int) -> list[Matrix]:
    """The matrices of the best grouping."""
    parts = [part for factor in op.factors for part in parts_of(constant_of(factor).numpy())]
    cuts = _cuts([len(part) for part in parts], count)
    return [functools.reduce(np.kron, parts[start:end]) for start, end in itertools.pairwise(cuts)]


def _cuts(orders: Sequence[int], count: int) -> tuple[int, ...]:
    """Where to cut the parts into ``count`` groups so that the orders of the groups have the least sum."""
    inner = itertools.combinations(range(1, len(orders)), count - 1)
    return min(
        ((0, *cuts, len(orders)) for cuts in inner),
        key=lambda cuts: sum(math.prod(orders[start:end]) for start, end in itertools.pairwise(cuts)),
    )


def _has_groups(count: int, op: HadamardOp) -> bool:
    orders = list(itertools.chain(*op.spec.factors))
    if len(orders) < count:
        return False
    cuts = _cuts(orders, count)
    return all(math.prod(orders[start:end]) <= _WIDEST_GROUP for start, end in itertools.pairwise(cuts))


HADAMARD_BODY: Kernel[HadamardOp] = Kernel("body", lambda op: True, _emit_body)
HADAMARD_KERNELS: tuple[Kernel[HadamardOp], ...] = (
    *(
        Kernel(name, functools.partial(_has_groups, count), functools.partial(_emit, count))
        for count, name in enumerate(("one MatMul", "two MatMuls", "three MatMuls"), start=1)
    ),
    HADAMARD_BODY,
)
