"""Gather rows of a 4-bit table in standard ops: two integers to a byte, taken apart after the gather.

    Y = (interleave(rows & 15, rows >> 4) − zero_point) · scale,   rows = packed[ids]

The body of ``QuantizedGather:block`` dequantises the whole table at every run, because standard ``Gather``
takes no 4-bit integers. Here the table is uint8 [V, D / 2], and only the rows asked for are dequantised. A
signed integer w is stored as w + 8, with 8 added to its zero point. Needs a constant table with an even D.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...ir import ops

_SIGN_OFFSET = 8

# The low bits go before the shift: OpenVINO rounds what is shifted out.
_UNPACK = """
  flat_shape = Constant <value_ints: ints = [-1]> ()
  last_axis = Constant <value_ints: ints = [-1]> ()
  grouped_shape = Constant <value_ints: ints = @grouped_shape> ()
  columns = Constant <value_ints: ints = @columns> ()
  fifteen_long = Constant <value_int: int = 15> ()
  fifteen = Cast <to: int = 2> (fifteen_long)
  high_bits_long = Constant <value_int: int = 240> ()
  high_bits = Cast <to: int = 2> (high_bits_long)
  four_long = Constant <value_int: int = 4> ()
  four = Cast <to: int = 2> (four_long)
  flat_ids = Reshape (ids, flat_shape)
  rows = Gather <axis: int = 0> (packed, flat_ids)
  low = BitwiseAnd (rows, fifteen)
  high_alone = BitwiseAnd (rows, high_bits)
  high = BitShift <direction: string = "RIGHT"> (high_alone, four)
  low_column = Unsqueeze (low, last_axis)
  high_column = Unsqueeze (high, last_axis)
  pairs = Concat <axis: int = -1> (low_column, high_column)
  grouped = Reshape (pairs, grouped_shape)
  integers = Cast <to: int = @dtype> (grouped)
"""
_ONE_OFFSET = """
  offset_long = Constant <value_int: int = 8> ()
  offset = Cast <to: int = @dtype> (offset_long)
"""
_ROW_OFFSETS = """
  row_zero_points = Gather <axis: int = 0> (zero_point, flat_ids)
  row_offsets = Cast <to: int = @dtype> (row_zero_points)
  offset = Unsqueeze (row_offsets, last_axis)
"""
_SCALE = """
  row_scales = Gather <axis: int = 0> (scale, flat_ids)
  scales = Unsqueeze (row_scales, last_axis)
  centred = Sub (integers, offset)
  product = Mul (centred, scales)
  ids_shape = Shape (ids)
  shape = Concat <axis: int = 0> (ids_shape, columns)
  Y = Reshape (product, shape)
"""
_ATTRIBUTES = "<dtype, grouped_shape, columns>"
_SYMMETRIC = ops.OpDefinition(
    "QuantizedGather",
    "packed",
    f"{_ATTRIBUTES} (ids, packed, scale) => (Y)",
    _UNPACK + _ONE_OFFSET + _SCALE,
)
_ASYMMETRIC = ops.OpDefinition(
    "QuantizedGather",
    "packed_zero_point",
    f"{_ATTRIBUTES} (ids, packed, scale, zero_point) => (Y)",
    _UNPACK + _ROW_OFFSETS + _SCALE,
)


def pack_table(model: ir.Model, node: ir.Node) -> bool:
    """Point ``node``, a ``QuantizedGather:block``, at a packed table; False if its table forbids that."""
    table, scale, zero_point = node.inputs[1], node.inputs[2], node.inputs[3]
    tensor = table.const_value if table is not None else None
    if tensor is None or tensor.dtype.bitwidth != 4 or tensor.numpy().shape[1] % 2:
        return False
    offset = _SIGN_OFFSET if tensor.dtype == ir.DataType.INT4 else 0
    zero_points = None if zero_point is None else zero_point.const_value
    if (zero_point is None) == (offset == 0) or (zero_point is not None and zero_points is None):
        return False
    integers = ops.integer_values(tensor).astype(np.int16) + offset
    packed = _initializer(model, f"{node.name}.packed", integers[:, 0::2] | (integers[:, 1::2] << 4))
    inputs = [node.inputs[0], packed, scale]
    if zero_points is not None:
        shifted = ops.integer_values(zero_points).astype(np.int16) + offset
        inputs.append(_initializer(model, f"{node.name}.zero_points", shifted))
    definition = _SYMMETRIC if zero_points is None else _ASYMMETRIC
    columns, block_size = integers.shape[1], node.attributes["block_size"].as_int()
    replacement = ir.node(
        definition.op_type,
        inputs,
        {
            "dtype": node.attributes["dtype"].as_int(),
            "grouped_shape": [-1, columns // block_size, block_size],
            "columns": [columns],
        },
        domain=ops.DOMAIN,
        overload=definition.overload,
        name=node.name,
    )
    ops.define(model, definition)
    ops.replace(node, replacement)
    return True


def _initializer(model: ir.Model, name: str, values: npt.NDArray[np.int16]) -> ir.Value:
    tensor = ir.tensor(values.astype(np.uint8), name=name)
    value = ir.val(name, shape=values.shape, dtype=ir.DataType.UINT8, const_value=tensor)
    model.graph.register_initializer(value)
    return value
