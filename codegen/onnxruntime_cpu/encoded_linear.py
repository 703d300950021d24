"""Linears whose weight is not integers on a uniform grid: code books, float8, bilevel scales, outliers.

onnxruntime's CPU provider multiplies none of these directly, with one exception: NF4 by ``MatMulBnb4``, which
takes its float32 values from a table of its own, so that the code book must be that table to the bit. All
others become floats once, when the model is loaded: the file keeps few bits, the process does not. While
onnxruntime folds the body of a code book or of bilevel scales, it keeps each step's result until all layers
are folded, which takes about six times the memory of the float weights; float8 and outliers on plain integers
take little more than once, by one folded ``DequantizeLinear``.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from ...ir import ops
from ...ir.errors import TargetError
from ...ir.graph_builder import CONTRIB, GraphBuilder
from ..linear_op import constant_of
from ..microbenchmark import Feeds
from .float_weights import FLOAT_KERNEL, FOLD_AT_LOAD
from .kernel import Kernel

NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
"""NF4 (https://arxiv.org/abs/2305.14314), as in the kernel."""
_NF4_QUANT_TYPE = 1
_SMALLEST_BLOCK = 16


@dataclasses.dataclass(frozen=True)
class EncodedSpec:
    """What the time of a kernel depends on, besides the number of rows, and which kernels apply."""

    overload: str
    in_features: int
    out_features: int
    bits: int
    block_size: int
    dtype: str
    scale_dtype: str
    rank: int
    nf4: bool


@dataclasses.dataclass(frozen=True)
class EncodedOp:
    """A ``QuantizedLinear`` of such a weight: the node, and what is known of it."""

    spec: EncodedSpec
    node: ir.Node
    x: ir.Value

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        """The activations."""
        return (self.x,)

    def label(self) -> str:
        """The op's name."""
        return "QuantizedLinear"

    def subject(self) -> dict[str, object]:
        """The spec."""
        return dataclasses.asdict(self.spec)

    def feeds(self, rows: int) -> Feeds:
        """Random activations."""
        shape = (rows, self.spec.in_features) if self.spec.rank == 2 else (1, rows, self.spec.in_features)
        values = np.random.default_rng(rows).uniform(-1, 1, shape)
        return {str(self.x.name): values.astype(ir.DataType[self.spec.dtype].numpy())}

    def operand(self, name: str) -> ir.Value:
        """An operand that the overload requires.

        Raises:
            TargetError: it is omitted.
        """
        value = ops.operand(self.node, name)
        if value is None:
            raise TargetError(f"node {self.node.name!r}: {self.node.op_type} lacks its {name}")
        return value

    def timed(self) -> EncodedOp:
        """The same layer with activations of any number of rows, to be measured."""
        rows = ["rows"] if self.spec.rank == 2 else ["batch", "rows"]
        shape = ir.Shape([*rows, self.spec.in_features])
        return dataclasses.replace(self, x=ir.val("x", shape=shape, dtype=ir.DataType[self.spec.dtype]))


def encoded_op(node: ir.Node) -> EncodedOp:
    """Read such a linear.

    Raises:
        TargetError: an operand is missing or not constant, or the dtype of the activations is unknown.
    """
    x, weight, scale = node.inputs[:3]
    if x is None or weight is None or scale is None or x.dtype is None:
        raise TargetError(f"node {node.name!r}: {node.op_type} lacks its activations, weight or scale")
    in_features, out_features = constant_of(weight).shape.numpy()
    spec = EncodedSpec(
        overload=node.overload,
        in_features=in_features,
        out_features=out_features,
        bits=node.attributes["bits"].as_int(),
        block_size=node.attributes["block_size"].as_int(),
        dtype=x.dtype.name,
        scale_dtype=constant_of(scale).dtype.name,
        rank=3 if x.shape is None else len(x.shape),
        nf4=_is_nf4(ops.operand(node, "codebook")),
    )
    return EncodedOp(spec, node, x)


def _emit_body(build: GraphBuilder, op: EncodedOp) -> ir.Value:
    definition = ops.definition_of(op.node)
    if definition is None:
        raise TargetError(f"node {op.node.name!r}: no such overload as {op.node.overload!r}")
    node = ir.node(
        op.node.op_type,
        [op.x, *op.node.inputs[1:]],
        op.node.attributes,
        domain=op.node.domain,
        overload=op.node.overload,
        name=build.layer,
    )
    return build.planish(node, definition)


def _dequantizes(op: EncodedOp) -> bool:
    """Whether the body has a ``DequantizeLinear``; the others are folded whatever the session says."""
    return not op.spec.overload.startswith(("codebook", "bilevel"))


def _is_nf4(codebook: ir.Value | None) -> bool:
    return codebook is not None and np.array_equal(constant_of(codebook).numpy(), NF4)


def _takes_bnb4(op: EncodedOp) -> bool:
    """Whether the kernel's own table is the code book, and its layout can hold the scales."""
    spec = op.spec
    is_power_of_two = spec.block_size & (spec.block_size - 1) == 0
    return (
        spec.nf4
        and spec.overload in ("codebook", "codebook_bias")
        and spec.dtype == "FLOAT"
        and spec.scale_dtype in ("FLOAT", "FLOAT16")
        and spec.block_size >= _SMALLEST_BLOCK
        and is_power_of_two
    )


def _emit_bnb4(build: GraphBuilder, op: EncodedOp) -> ir.Value:
    """Indices of [N, K], two to a byte, the first in the high bits; scales of [N, K / B]."""
    spec = op.spec
    indices = ops.integer_values(constant_of(op.operand("W"))).T.reshape(-1)
    packed = (indices[0::2] << 4) | indices[1::2]
    scales = constant_of(op.operand("scale")).numpy().astype(np.float32).T.reshape(-1)
    product = build.op(
        "MatMulBnb4",
        op.x,
        build.constant(packed, "weight_packed"),
        build.constant(scales, "scales"),
        domain=CONTRIB,
        K=spec.in_features,
        N=spec.out_features,
        block_size=spec.block_size,
        quant_type=_NF4_QUANT_TYPE,
    )
    bias = ops.operand(op.node, "bias")
    return product if bias is None else build.op("Add", product, bias)


ENCODED_BODY: Kernel[EncodedOp] = Kernel("body", _dequantizes, _emit_body)
ENCODED_KERNELS: tuple[Kernel[EncodedOp], ...] = (
    Kernel("MatMulBnb4", _takes_bnb4, _emit_bnb4),
    Kernel(FLOAT_KERNEL, lambda op: not _dequantizes(op), _emit_body),
    Kernel(FLOAT_KERNEL, _dequantizes, _emit_body, FOLD_AT_LOAD),
)
UNFOLDED_KERNELS = (*(kernel for kernel in ENCODED_KERNELS if not kernel.session_options), ENCODED_BODY)
"""For sessions that must not fold: the body dequantises at every run."""
