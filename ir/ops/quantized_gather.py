"""``planish::QuantizedGather``: rows of an embedding table that is stored as integers.

    Y[..., D] = dequantise(table[V, D])[ids[...]]

- plain: int8 table, one symmetric scale per row, ``scale`` [V, 1]. Only the rows asked for are dequantised.
- ``block``: int4 / uint4 or int8 / uint8 table in blocks of B along D, ``scale`` and ``zero_point``
  [V, D / B], as in blocked ``DequantizeLinear`` on axis 1. Standard ONNX cannot gather 4-bit integers, so
  this body dequantises first: targets bind it to a kernel that gathers first.
"""

from __future__ import annotations

import onnx_ir as ir

from ..errors import ModelError
from .definition import DOMAIN, OpDefinition

OP_TYPE = "QuantizedGather"

ROW = OpDefinition(
    OP_TYPE,
    "",
    "<bits, dtype> (ids, table, scale) => (Y)",
    """
  rows = Gather <axis: int = 0> (table, ids)
  row_scales = Gather <axis: int = 0> (scale, ids)
  rows_float = Cast <to: int = @dtype> (rows)
  Y = Mul (rows_float, row_scales)
""",
)
BLOCK = OpDefinition(
    OP_TYPE,
    "block",
    "<bits, dtype, block_size> (ids, table, scale, zero_point) => (Y)",
    """
  table_float = DequantizeLinear <axis: int = 1, block_size: int = @block_size> (table, scale, zero_point)
  Y = Gather <axis: int = 0> (table_float, ids)
""",
)
DEFINITIONS = {definition.overload: definition for definition in (ROW, BLOCK)}


def quantized_gather(
    ids: ir.Value,
    table: ir.Value,
    scale: ir.Value,
    zero_point: ir.Value | None = None,
    *,
    bits: int,
    block_size: int = 0,
    name: str | None = None,
) -> tuple[ir.Node, OpDefinition]:
    """A node of the op and the definition that its model must hold (see `define`).

    Args:
        ids: [...] int32 or int64, each in [−V, V).
        table: [V, D] int4, uint4, int8 or uint8; int8 when ``block_size`` is 0.
        scale: [V, D / block_size], or [V, 1] when ``block_size`` is 0; its dtype is that of the result.
        zero_point: shape of ``scale``, dtype of ``table``; blocked tables only.
        bits: how many bits of the container the integers use, 2 to 8.
        block_size: columns that share a scale; 0 for one scale per row.
        name: the node's name.

    Raises:
        ModelError: the scale's dtype is unknown, or a zero point without blocks.
    """
    if scale.dtype is None:
        raise ModelError(f"QuantizedGather {name!r}: the dtype of the scale must be known")
    if zero_point is not None and not block_size:
        raise ModelError(f"QuantizedGather {name!r}: a zero point needs blocks")
    definition = BLOCK if block_size else ROW
    attributes = {"bits": bits, "dtype": int(scale.dtype)}
    node = ir.node(
        OP_TYPE,
        [ids, table, scale] + ([zero_point] if block_size else []),
        attributes | ({"block_size": block_size} if block_size else {}),
        domain=DOMAIN,
        overload=definition.overload,
        name=name,
    )
    node.outputs[0].dtype = scale.dtype
    if ids.shape is not None and table.shape is not None:
        node.outputs[0].shape = ir.Shape([*ids.shape, table.shape[1]])
    return node, definition
