"""What one op of a model takes on this machine: the time of the kernel that it would be bound to.

Times come from the same cached microbenchmark that chooses kernels, so a pass that asks costs nothing more
than the binding at the end.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import onnx_ir as ir

from ...ir import ops
from ...ir.graph_builder import GraphBuilder
from ...ir.views.linears import Linear, as_linear
from ..hadamard_op import HadamardSpec, hadamard_op, made_up_hadamard
from ..linear_op import LinearSpec, is_encoded, linear_op, made_up_op
from ..microbenchmark import Feeds
from .encoded_linear import ENCODED_BODY, ENCODED_KERNELS, encoded_op
from .float_weights import FLOAT_KERNEL
from .hadamard import HADAMARD_BODY, HADAMARD_KERNELS
from .kernel import Chooser, Kernel
from .linear_kernels import LINEAR_BODY, LINEAR_KERNELS

_WIDEST_TIMED = 16384
"""Output features; beyond, the time of a product grows in proportion."""


def seconds(node: ir.Node, chooser: Chooser) -> float | None:
    """Seconds of ``node``, the geometric mean over the chooser's rows; None for an op without a cost here.

    Known are the planish linears, ``HadamardTransform``, and float products with a constant matrix, bias
    included.

    Raises:
        TargetError: no kernel runs the op.
    """
    if node.domain == ops.DOMAIN and node.op_type == "HadamardTransform":
        return _hadamard_seconds(hadamard_op(node).spec, chooser)
    if node.domain == ops.DOMAIN and is_encoded(node):
        op = encoded_op(node).timed()
        return chooser.choose(op, ENCODED_KERNELS, ENCODED_BODY, FLOAT_KERNEL).seconds
    linear = as_linear(node)
    if linear is None:
        return None
    if linear.is_quantized:
        spec = linear_op(node).spec
        return _linear_seconds(spec.timed(), chooser) * spec.out_features / spec.timed().out_features
    return _dense_seconds(linear, chooser)


@functools.cache
def _hadamard_seconds(spec: HadamardSpec, chooser: Chooser) -> float:
    op = made_up_hadamard(spec)
    return chooser.choose(op, HADAMARD_KERNELS, HADAMARD_BODY, HADAMARD_BODY.name).seconds


@functools.cache
def _linear_seconds(spec: LinearSpec, chooser: Chooser) -> float:
    return chooser.choose(made_up_op(spec), LINEAR_KERNELS, LINEAR_BODY, FLOAT_KERNEL).seconds


def _dense_seconds(linear: Linear, chooser: Chooser) -> float:
    timed = min(linear.out_features, _WIDEST_TIMED)
    spec = DenseSpec(
        in_features=linear.in_features,
        out_features=timed,
        bias=linear.bias is not None,
        dtype=(linear.weight.dtype or ir.DataType.FLOAT).name,
        rank=3 if linear.input.shape is None else len(linear.input.shape),
    )
    return _timed_dense_seconds(spec, chooser) * linear.out_features / timed


@functools.cache
def _timed_dense_seconds(spec: DenseSpec, chooser: Chooser) -> float:
    return chooser.choose(made_up_dense(spec), DENSE_KERNELS, DENSE_KERNELS[0], DENSE_KERNELS[0].name).seconds


@dataclasses.dataclass(frozen=True)
class DenseSpec:
    """A float linear: X[..., in] · W[in, out] (+ bias[out]); ``rank`` is that of X."""

    in_features: int
    out_features: int
    bias: bool
    dtype: str
    rank: int


@dataclasses.dataclass(frozen=True)
class DenseOp:
    """A float linear with its operands."""

    spec: DenseSpec
    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        """The activations."""
        return (self.x,)

    def label(self) -> str:
        """What is measured."""
        return "MatMul + Add" if self.spec.bias else "MatMul"

    def subject(self) -> dict[str, object]:
        """The spec."""
        return dataclasses.asdict(self.spec)

    def feeds(self, rows: int) -> Feeds:
        """Normally distributed activations."""
        spec = self.spec
        shape = (*[1] * (spec.rank - 2), rows, spec.in_features)
        values = np.random.default_rng(rows).standard_normal(shape)
        return {"x": values.astype(ir.DataType[spec.dtype].numpy())}


def made_up_dense(spec: DenseSpec) -> DenseOp:
    """A float linear of this spec with random weights."""
    rng = np.random.default_rng(0)
    dtype = ir.DataType[spec.dtype]

    def constant(name: str, shape: tuple[int, ...]) -> ir.Value:
        values = (rng.standard_normal(shape) / np.sqrt(spec.in_features)).astype(dtype.numpy())
        return ir.val(name, shape=shape, dtype=dtype, const_value=ir.tensor(values, name=name))

    leading = [f"dim_{axis}" for axis in range(spec.rank - 1)]
    return DenseOp(
        spec=spec,
        x=ir.val("x", shape=[*leading, spec.in_features], dtype=dtype),
        weight=constant("weight", (spec.in_features, spec.out_features)),
        bias=constant("bias", (spec.out_features,)) if spec.bias else None,
    )


def _emit_dense(build: GraphBuilder, op: DenseOp) -> ir.Value:
    product = build.op("MatMul", op.x, op.weight)
    return product if op.bias is None else build.op("Add", product, op.bias)


DENSE_KERNELS: tuple[Kernel[DenseOp], ...] = (Kernel("MatMul", lambda op: True, _emit_dense),)
