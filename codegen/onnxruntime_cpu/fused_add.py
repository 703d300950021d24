"""``Add`` in front of a LayerNormalization or a Gelu: whether to let onnxruntime fuse the two.

    Add(x, residual) → LayerNormalization    becomes    SkipLayerNormalization
    Add(x, bias) → Gelu                      becomes    BiasGelu

when onnxruntime loads a model. The fused kernels are slower than the two nodes on some machines and faster
on others. ``Sum`` of two values is the same function as ``Add`` and is not fused; unlike a disabled
optimiser, it stays with the file.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import onnx_ir as ir

from ...ir.graph_builder import GraphBuilder
from ..microbenchmark import Feeds
from .kernel import Kernel

_EPSILON = 1e-5
_FUSED_KERNELS = {"LayerNormalization": "SkipLayerNormalization", "Gelu": "BiasGelu"}


@dataclasses.dataclass(frozen=True)
class AddSpec:
    """What the time depends on, besides the rows: the op after the addition and its last dimension."""

    reader: str
    features: int


@dataclasses.dataclass(frozen=True)
class AddOp:
    """An addition and its reader: x plus a residual of the same shape, or plus a constant bias [features]."""

    spec: AddSpec
    x: ir.Value
    addend: ir.Value
    scale: ir.Value
    shift: ir.Value

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        """The operands that are not constant."""
        return (self.x, self.addend) if self.addend.const_value is None else (self.x,)

    def label(self) -> str:
        """What is measured."""
        return f"Add + {self.spec.reader}"

    def subject(self) -> dict[str, object]:
        """The spec."""
        return dataclasses.asdict(self.spec)

    def feeds(self, rows: int) -> Feeds:
        """Random operands."""
        rng = np.random.default_rng(rows)
        shape = (1, rows, self.spec.features)
        return {str(value.name): rng.standard_normal(shape).astype(np.float32) for value in self.inputs}


def made_up_add(spec: AddSpec) -> AddOp:
    """An addition of this spec."""
    rng = np.random.default_rng(0)

    def constant(name: str) -> ir.Value:
        tensor = ir.tensor(rng.uniform(0.5, 1, spec.features).astype(np.float32), name=name)
        return ir.val(name, dtype=tensor.dtype, const_value=tensor)

    def operand(name: str) -> ir.Value:
        return ir.val(name, shape=["batch", "rows", spec.features], dtype=ir.DataType.FLOAT)

    addend = operand("addend") if spec.reader == "LayerNormalization" else constant("addend")
    return AddOp(spec, operand("x"), addend, constant("scale"), constant("shift"))


def add_spec(node: ir.Node) -> AddSpec | None:
    """The spec of an ``Add`` that onnxruntime would fuse with what reads it; None for any other node."""
    output = node.outputs[0] if node.outputs else None
    if node.domain or node.op_type != "Add" or output is None or output.dtype != ir.DataType.FLOAT:
        return None
    shape, features = output.shape, output.shape[-1] if output.shape else None
    if shape is None or len(shape) != 3 or not isinstance(features, int):
        return None
    readers = {use.node.op_type for use in output.uses() if use.node.domain == ""}
    operands = [value.shape for value in node.inputs if value is not None]
    if "LayerNormalization" in readers and operands == [shape, shape]:
        return AddSpec("LayerNormalization", features)
    is_bias = any(
        value is not None and value.const_value is not None and value.shape == ir.Shape([features])
        for value in node.inputs
    )
    return AddSpec("Gelu", features) if readers == {"Gelu"} and is_bias else None


def _emit(op_type: str, build: GraphBuilder, op: AddOp) -> ir.Value:
    total = build.op(op_type, op.x, op.addend)
    if op.spec.reader == "Gelu":
        return build.op("Gelu", total)
    return build.op("LayerNormalization", total, op.scale, op.shift, axis=-1, epsilon=_EPSILON)


def _is_read_by(reader: str, op: AddOp) -> bool:
    return op.spec.reader == reader


SUM = "Sum"
ADD_KERNELS: tuple[Kernel[AddOp], ...] = (
    Kernel(SUM, lambda op: True, functools.partial(_emit, "Sum")),
    *(
        Kernel(kernel, functools.partial(_is_read_by, reader), functools.partial(_emit, "Add"))
        for reader, kernel in _FUSED_KERNELS.items()
    ),
)


def fused_kernel(spec: AddSpec) -> str:
    """What onnxruntime makes of the addition and its reader."""
    return _FUSED_KERNELS[spec.reader]
