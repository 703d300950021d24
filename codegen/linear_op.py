"""A quantised linear as the kernels see it, taken from a node or made up for timing."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import onnx_ir as ir

from ..ir import ops, release
from ..ir.errors import TargetError
from ..ir.ops.definition import OpDefinition
from .microbenchmark import Feeds

_FIXED_SEED = 0
_WIDEST_TIMED = 16384
_CONTAINERS = frozenset({ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT8, ir.DataType.UINT8})
_OP_TYPES = {
    "float": "QuantizedLinear",
    "tensor": "DynamicQuantizedLinear",
    "token": "DynamicQuantizedLinear",
    "static": "StaticQuantizedLinear",
}


@dataclasses.dataclass(frozen=True)
class LinearSpec:
    """What the time of a kernel depends on, besides the number of rows.

    Attributes:
        activations: what shares a grid at run time (``tensor`` or ``token``); ``static`` is one fixed grid,
            and ``float`` leaves them alone.
        in_features: K.
        out_features: N.
        bits: of the integers, 2 to 8.
        block_size: rows of [K, N] that share a scale; 0 for one scale per channel.
        signed: integers are signed.
        zero_point: there are zero points.
        bias: there is a bias.
        dtype: float type of the activations.
        rank: of the activations: onnxruntime treats matrices and batches differently.
        pairs_fit: sums of two products with adjacent rows fit 16 bits: such layers never saturate.
        activation_bits: of the activations' grid, where they have one.
        activation_clip: the part of a token's largest magnitude that its grid covers.
        activations_signed: the integers of a static grid are signed.
    """

    activations: Literal["float", "tensor", "token", "static"]
    in_features: int
    out_features: int
    bits: int
    block_size: int
    signed: bool
    zero_point: bool
    bias: bool
    dtype: str
    rank: int
    pairs_fit: bool
    activation_bits: int = 8
    activation_clip: float = 1.0
    activations_signed: bool = False

    def timed(self) -> LinearSpec:
        """The spec to measure: beyond some width a layer's time grows in proportion, kernel by kernel."""
        return dataclasses.replace(self, out_features=min(self.out_features, _WIDEST_TIMED))


@dataclasses.dataclass(frozen=True)
class LinearOp:
    """A linear of integers on a uniform grid: its operands and what is known of them.

    It is a plain ``QuantizedLinear``, a ``DynamicQuantizedLinear`` or a ``StaticQuantizedLinear``.
    """

    spec: LinearSpec
    x: ir.Value
    weight: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None
    bias: ir.Value | None
    x_scale: ir.Value | None = None
    x_zero_point: ir.Value | None = None

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        """The activations."""
        return (self.x,)

    def label(self) -> str:
        """The op's name."""
        return _OP_TYPES[self.spec.activations]

    def subject(self) -> dict[str, object]:
        """The spec."""
        return dataclasses.asdict(self.spec)

    def feeds(self, rows: int) -> Feeds:
        """Activations spread evenly over their grid: the hardest case for a kernel that saturates."""
        shape = (rows, self.spec.in_features) if self.spec.rank == 2 else (1, rows, self.spec.in_features)
        values = np.random.default_rng(rows).uniform(-1, 1, shape)
        return {"x": values.astype(ir.DataType[self.spec.dtype].numpy())}

    def integers(self) -> np.ndarray[tuple[int, int], np.dtype[np.int16]]:
        """The weight's integers [K, N]."""
        return _integers(self.weight)

    def zero_points(self) -> np.ndarray[tuple[int, ...], np.dtype[np.int16]] | None:
        """The integers of the zero points, shaped like the scale."""
        return None if self.zero_point is None else _integers(self.zero_point)

    def scales(self) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        """The scales as stored, [K / B, N] or [N]."""
        return constant_of(self.scale).numpy()

    def as_node(self, name: str) -> tuple[ir.Node, OpDefinition]:
        """The planish op itself."""
        spec = self.spec
        if spec.activations == "float":
            return ops.quantized_linear(
                self.x,
                self.weight,
                self.scale,
                self.zero_point,
                self.bias,
                bits=spec.bits,
                block_size=spec.block_size,
                name=name,
            )
        if spec.activations == "static":
            x_scale, x_zero_point = self.static_grid()
            return ops.static_quantized_linear(
                self.x,
                self.weight,
                self.scale,
                x_scale,
                x_zero_point,
                self.zero_point,
                self.bias,
                bits=spec.bits,
                name=name,
            )
        return ops.dynamic_quantized_linear(
            self.x,
            self.weight,
            self.scale,
            self.zero_point,
            self.bias,
            bits=spec.bits,
            granularity=spec.activations,
            activation_bits=spec.activation_bits,
            activation_clip=spec.activation_clip,
            block_size=spec.block_size,
            name=name,
        )

    def static_grid(self) -> tuple[ir.Value, ir.Value]:
        """Scale and zero point of the activations.

        Raises:
            TargetError: the op has no static grid.
        """
        if self.x_scale is None or self.x_zero_point is None:
            raise TargetError(f"{self.label()} lacks the grid of its activations")
        return self.x_scale, self.x_zero_point


def is_encoded(node: ir.Node) -> bool:
    """Whether ``node`` is a linear whose weight is not plain integers on a uniform grid."""
    if node.op_type != "QuantizedLinear":
        return False
    weight = ops.operand(node, "W")
    return node.overload not in ("", "bias") or (weight is not None and weight.dtype not in _CONTAINERS)


def linear_op(node: ir.Node) -> LinearOp:
    """Read a planish linear of integers.

    Raises:
        TargetError: the weight is not a constant matrix.
    """
    x, weight, scale = node.inputs[:3]
    if x is None or weight is None or scale is None:
        raise TargetError(f"node {node.name!r}: {node.op_type} lacks its activations, weight or scale")
    zero_point, bias = ops.operand(node, "zero_point"), ops.operand(node, "bias")
    x_zero_point = ops.operand(node, "x_zero_point")
    in_features, out_features = (int(size) for size in constant_of(weight).shape.numpy())
    activations = _activations_of(node)
    activation_bits = node.attributes.get_int("activation_bits", 8)
    spec = LinearSpec(
        activations=activations,
        in_features=in_features,
        out_features=out_features,
        bits=node.attributes["bits"].as_int(),
        block_size=node.attributes.get_int("block_size", 0),
        signed=weight.dtype in (ir.DataType.INT4, ir.DataType.INT8),
        zero_point=zero_point is not None,
        bias=bias is not None,
        dtype=(scale.dtype or ir.DataType.FLOAT).name,
        rank=3 if x.shape is None else len(x.shape),
        pairs_fit=activations != "float" and (activation_bits < 8 or _pairs_fit(_integers(weight))),
        activation_bits=activation_bits,
        activation_clip=node.attributes.get_float("activation_clip", 1.0),
        activations_signed=x_zero_point is not None and x_zero_point.dtype == ir.DataType.INT8,
    )
    x_scale = ops.operand(node, "x_scale")
    return LinearOp(spec, x, weight, scale, zero_point, bias, x_scale, x_zero_point)


def _activations_of(node: ir.Node) -> Literal["float", "tensor", "token", "static"]:
    if node.op_type == "QuantizedLinear":
        return "float"
    if node.op_type == "StaticQuantizedLinear":
        return "static"
    return "tensor" if node.overload.startswith("tensor") else "token"


def made_up_op(spec: LinearSpec) -> LinearOp:
    """An op of this spec with random weights; its constants are initializers-to-be."""
    rng = np.random.default_rng(_FIXED_SEED)
    k, n = spec.in_features, spec.out_features
    container = ops.container(spec.bits, signed=spec.signed)
    high = 1 << (spec.bits - 1) if spec.signed else 1 << spec.bits
    low = 1 - high if spec.signed else 0
    if spec.pairs_fit and spec.signed and spec.activation_bits == 8:
        low, high = max(low, -64), min(high, 65)
    grid = (k // spec.block_size, n) if spec.block_size else (n,)
    float_dtype = ir.DataType[spec.dtype]
    # Per channel, 4-bit weights of a dynamic op are widened to int8, and their zero points are stored so.
    widened = spec.activations == "token" and not spec.block_size and container.bitwidth == 4
    x_integers = ir.DataType.INT8 if spec.activations_signed else ir.DataType.UINT8
    x_middle = np.array(0 if spec.activations_signed else 128, x_integers.numpy())

    def constant(name: str, tensor: ir.TensorProtocol) -> ir.Value:
        return ir.val(name, dtype=tensor.dtype, const_value=tensor)

    def floats(name: str, shape: tuple[int, ...], low: float) -> ir.Value:
        return constant(name, ir.tensor(rng.uniform(low, 1, shape).astype(float_dtype.numpy()), name=name))

    def integers(name: str, low: int, high: int, shape: tuple[int, ...], dtype: ir.DataType) -> ir.Value:
        return constant(
            name,
            ops.integer_tensor(rng.integers(low, high, shape, np.int8 if low < 0 else np.uint8), dtype, name),
        )

    return LinearOp(
        spec=spec,
        x=ir.val("x", shape=["rows", k] if spec.rank == 2 else ["batch", "rows", k], dtype=float_dtype),
        weight=integers("weight", low, high, (k, n), container),
        scale=floats("scale", grid, 0.5),
        zero_point=integers("zero_point", max(low, 0), high, grid, ir.DataType.INT8 if widened else container)
        if spec.zero_point
        else None,
        bias=floats("bias", (n,), -1) if spec.bias else None,
        x_scale=constant("x_scale", ir.tensor(np.array(1 / 127, np.float32), name="x_scale")),
        x_zero_point=constant("x_zero_point", ir.tensor(x_middle, name="x_zero_point")),
    )


def constant_of(value: ir.Value) -> ir.TensorProtocol:
    """The constant tensor of an operand.

    Raises:
        TargetError: it is not constant.
    """
    if value.const_value is None:
        raise TargetError(
            f"operand {value.name!r} of a quantised op is not constant",
            hint="run canonicalize after quantize",
        )
    return value.const_value


def _integers(value: ir.Value) -> np.ndarray[tuple[int, int], np.dtype[np.int16]]:
    integers = ops.integer_values(constant_of(value)).astype(np.int16)
    release(value.const_value)
    return integers


def _pairs_fit(integers: np.ndarray[tuple[int, int], np.dtype[np.int16]]) -> bool:
    """Whether 255·(w₂ᵢ + w₂ᵢ₊₁) stays within 16 bits where both weights have the same sign."""
    even, odd = integers[0 : len(integers) // 2 * 2 : 2], integers[1::2]
    sums = np.where((even > 0) == (odd > 0), np.abs(even + odd), 0)
    return bool(sums.max(initial=0) <= 128)
