"""Kernels of ``QuantizedGather``: rows of an embedding table that is stored as integers."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from ...ir import ops
from ...ir.errors import TargetError
from ...ir.graph_builder import CONTRIB, GraphBuilder
from ..linear_op import constant_of
from ..microbenchmark import Feeds
from .kernel import Kernel

_TIMED_ROWS = 4096
"""Rows of the table that is made up for timing: enough not to fit a cache, whatever the vocabulary."""
_SMALLEST_BLOCK = 16
_SIGN_OFFSET = {4: 8, 8: 128}


@dataclasses.dataclass(frozen=True)
class GatherSpec:
    """What the time of a kernel depends on, besides the number of ids."""

    columns: int
    bits: int
    block_size: int
    signed: bool
    zero_point: bool
    dtype: str
    ids: str


@dataclasses.dataclass(frozen=True)
class GatherOp:
    """A ``QuantizedGather``: its operands and what is known of them."""

    spec: GatherSpec
    ids: ir.Value
    table: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        """The ids."""
        return (self.ids,)

    def label(self) -> str:
        """The op's name."""
        return "QuantizedGather"

    def subject(self) -> dict[str, object]:
        """The spec."""
        return dataclasses.asdict(self.spec)

    def feeds(self, rows: int) -> Feeds:
        """Ids all over the table."""
        ids = np.random.default_rng(rows).integers(0, _TIMED_ROWS, (1, rows))
        return {"ids": ids.astype(ir.DataType[self.spec.ids].numpy())}


def gather_op(node: ir.Node) -> GatherOp:
    """Read a planish gather.

    Raises:
        TargetError: the table is not constant.
    """
    ids, table, scale, zero_point = (*node.inputs, None)[:4]
    if ids is None or table is None or scale is None:
        raise TargetError(f"node {node.name!r}: {node.op_type} lacks its ids, table or scale")
    spec = GatherSpec(
        columns=int(constant_of(table).shape.numpy()[1]),
        bits=node.attributes["bits"].as_int(),
        block_size=node.attributes["block_size"].as_int() if node.overload == "block" else 0,
        signed=table.dtype in (ir.DataType.INT4, ir.DataType.INT8),
        zero_point=zero_point is not None,
        dtype=(scale.dtype or ir.DataType.FLOAT).name,
        ids=(ids.dtype or ir.DataType.INT64).name,
    )
    return GatherOp(spec, ids, table, scale, zero_point)


def made_up_gather(spec: GatherSpec) -> GatherOp:
    """An op of this spec with a random table."""
    rng = np.random.default_rng(0)
    container = ops.container(spec.bits, signed=spec.signed)
    low, high = (1 - (1 << (spec.bits - 1)), 1 << (spec.bits - 1)) if spec.signed else (0, 1 << spec.bits)
    grid = (_TIMED_ROWS, spec.columns // spec.block_size if spec.block_size else 1)
    scales = rng.uniform(0.5, 1, grid).astype(ir.DataType[spec.dtype].numpy())

    def constant(name: str, tensor: ir.TensorProtocol) -> ir.Value:
        return ir.val(name, dtype=tensor.dtype, const_value=tensor)

    def integers(name: str, shape: tuple[int, int]) -> ir.Value:
        return constant(name, ops.integer_tensor(rng.integers(low, high, shape), container, name))

    return GatherOp(
        spec=spec,
        ids=ir.val("ids", shape=["batch", "rows"], dtype=ir.DataType[spec.ids]),
        table=integers("table", (_TIMED_ROWS, spec.columns)),
        scale=constant("scale", ir.tensor(scales, name="scale")),
        zero_point=integers("zero_point", grid) if spec.zero_point else None,
    )


def _emit_body(build: GraphBuilder, op: GatherOp) -> ir.Value:
    node, definition = ops.quantized_gather(
        op.ids,
        op.table,
        op.scale,
        op.zero_point,
        bits=op.spec.bits,
        block_size=op.spec.block_size,
        name=build.layer,
    )
    return build.planish(node, definition)


def _emit_block_quantized(build: GraphBuilder, op: GatherOp) -> ir.Value:
    """One kernel gathers and dequantises; 8-bit integers must be unsigned, and a row is one long block."""
    table, zero_point, bits = op.table, op.zero_point, 4 if op.spec.bits <= 4 else 8
    if bits == 8:
        offset = _SIGN_OFFSET[8] if op.spec.signed else 0
        integers = ops.integer_values(constant_of(op.table)).astype(np.int16)
        table = build.constant((integers + offset).astype(np.uint8), "table_unsigned")
        zero_points: np.ndarray[tuple[int, ...], np.dtype[np.int16]] = np.full(
            constant_of(op.scale).numpy().shape, offset, np.int16
        )
        if op.zero_point is not None:
            zero_points += ops.integer_values(constant_of(op.zero_point)).astype(np.int16)
        zero_point = build.constant(zero_points.astype(np.uint8), "zero_point_unsigned")
    block_size = op.spec.block_size or max(_SMALLEST_BLOCK, 1 << (op.spec.columns - 1).bit_length())
    return build.op(
        "GatherBlockQuantized",
        table,
        op.ids,
        op.scale,
        zero_point,
        domain=CONTRIB,
        gather_axis=0,
        quantize_axis=1,
        block_size=block_size,
        bits=bits,
    )


def _has_a_default_zero(op: GatherOp) -> bool:
    """Unsigned 4-bit integers without zero points have no form here: the kernel's default is 8, not 0."""
    return op.spec.bits > 4 or op.spec.signed or op.spec.zero_point


GATHER_BODY: Kernel[GatherOp] = Kernel("Gather, Cast, Mul", lambda op: True, _emit_body)
GATHER_KERNELS: tuple[Kernel[GatherOp], ...] = (
    GATHER_BODY,
    Kernel("GatherBlockQuantized", _has_a_default_zero, _emit_block_quantized),
)
