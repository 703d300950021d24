"""Embedding tables: a constant table that ``Gather`` takes rows of becomes int8 with one scale per row.

    Gather(table[V, D], ids)  →  planish::QuantizedGather(ids, Q[V, D], scale[V, 1])

scale = max|row| / 127. A table that something else reads too (tied to the output layer, say) is skipped: the
float table would have to stay, and the file would grow.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from ...ir import ops
from ...ir.errors import PassError
from .grid import Grid
from .streamed import round_weight
from .weights import ERROR_KEY, FLOATS, add_tensor, float_dtype

_SMALLEST_TABLE = 1 << 14
"""Elements; the extra nodes of a smaller table cost more than its bytes are worth."""


@dataclasses.dataclass(frozen=True)
class EmbeddingTable:
    """A constant table and the nodes that take rows of it."""

    name: str
    table: ir.Value
    gathers: tuple[ir.Node, ...]


def embedding_tables(model: ir.Model) -> list[EmbeddingTable]:
    """Constant 2-D float tables that rows are gathered from, in the order of the initializers."""
    found = []
    for value in model.graph.initializers.values():
        gathers = tuple(use.node for use in value.uses() if use.idx == 0 and _gathers_rows(use.node))
        if gathers and value.dtype in FLOATS and value.shape is not None and len(value.shape) == 2:
            found.append(EmbeddingTable(str(value.name).removesuffix(".weight"), value, gathers))
    return found


def _gathers_rows(node: ir.Node) -> bool:
    return node.domain == "" and node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0


def reason_to_skip_table(table: EmbeddingTable) -> str | None:
    """Why ``table`` cannot be quantised, or does not pay; None if it can."""
    tensor = table.table.const_value
    if tensor is None or table.table.is_graph_input() or table.table.is_graph_output():
        return "its table is not constant"
    if len(table.table.uses()) > len(table.gathers):
        return "its table is read by other ops too"
    if tensor.size < _SMALLEST_TABLE:
        return f"its table has fewer than {_SMALLEST_TABLE} elements"
    return None


def quantize_table(model: ir.Model, table: EmbeddingTable) -> float:
    """Replace the table and its gathers in place; returns the relative error of the table."""
    grid = Grid(bits=8, symmetric=True, block_size=0, scale_dtype=float_dtype(table.table).numpy())
    by_column, error = round_weight(table.table, grid, transposed=True)
    integers = add_tensor(model, by_column.integers.T, f"{table.name}.weight_quantized", ir.DataType.INT8)
    scale = add_tensor(model, by_column.scale[:, None], f"{table.name}.weight_scale")
    for gather in table.gathers:
        ids = gather.inputs[1]
        if ids is None:
            raise PassError(f"quantize: node {gather.name!r} gathers from {table.name!r} without ids")
        node, definition = ops.quantized_gather(ids, integers, scale, bits=8, name=gather.name)
        node.metadata_props[ERROR_KEY] = f"{error:.3e}"
        ops.define(model, definition)
        ops.replace(gather, node)
    return error
