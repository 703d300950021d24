"""``Add`` in front of a LayerNormalization: whether to let onnxruntime fuse the two.

onnxruntime turns Add → LayerNormalization into SkipLayerNormalization when it loads a model, which is slower
than the two nodes on some machines and faster on others. ``Sum`` of two values is the same function as
``Add`` and is not fused; unlike a disabled optimiser, it stays with the file.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from ..microbenchmark import Feeds
from .graph_builder import GraphBuilder
from .kernel import Kernel

_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class ResidualOp:
    """A residual addition and the normalization of its result."""

    features: int
    left: ir.Value
    right: ir.Value
    scale: ir.Value
    bias: ir.Value

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        """The two values that are added."""
        return (self.left, self.right)

    def label(self) -> str:
        """What is measured."""
        return "Add + LayerNormalization"

    def subject(self) -> dict[str, object]:
        """Its size."""
        return {"features": self.features}

    def feeds(self, rows: int) -> Feeds:
        """Two random values."""
        rng = np.random.default_rng(rows)
        shape = (1, rows, self.features)
        return {name: rng.standard_normal(shape).astype(np.float32) for name in ("left", "right")}


def made_up_residual(features: int) -> ResidualOp:
    """A residual addition of this many features."""
    rng = np.random.default_rng(0)

    def constant(name: str) -> ir.Value:
        tensor = ir.tensor(rng.uniform(0.5, 1, features).astype(np.float32), name=name)
        return ir.val(name, dtype=tensor.dtype, const_value=tensor)

    def operand(name: str) -> ir.Value:
        return ir.val(name, shape=["batch", "rows", features], dtype=ir.DataType.FLOAT)

    return ResidualOp(features, operand("left"), operand("right"), constant("scale"), constant("bias"))


def residual_features(node: ir.Node) -> int | None:
    """The features of an ``Add`` that onnxruntime would fuse with the normalization after it; else None."""
    if node.domain or node.op_type != "Add" or any(value is None for value in node.inputs):
        return None
    readers = {use.node for use in node.outputs[0].uses()}
    if not any(reader.domain == "" and reader.op_type == "LayerNormalization" for reader in readers):
        return None
    shapes = [value.shape for value in (*node.inputs, node.outputs[0]) if value is not None]
    if any(shape is None or len(shape) != 3 or shape != shapes[-1] for shape in shapes):
        return None
    features = shapes[-1][-1] if shapes[-1] is not None else None
    is_float32 = node.outputs[0].dtype == ir.DataType.FLOAT
    return features if is_float32 and isinstance(features, int) else None


def _emit(op_type: str, build: GraphBuilder, op: ResidualOp) -> ir.Value:
    total = build.op(op_type, op.left, op.right)
    return build.op("LayerNormalization", total, op.scale, op.bias, axis=-1, epsilon=_EPSILON)


SUM = "Sum, LayerNormalization"
SKIP = "SkipLayerNormalization"
RESIDUAL_KERNELS: tuple[Kernel[ResidualOp], ...] = (
    Kernel(SUM, lambda op: True, lambda build, op: _emit("Sum", build, op)),
    Kernel(SKIP, lambda op: True, lambda build, op: _emit("Add", build, op)),
)
