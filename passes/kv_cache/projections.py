"""Changing the projections around attention, and what the graph says of their sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...ir.errors import PassError
from ...ir.views import Linear
from ...ir.views.attention import AttentionBlock
from ...ir.views.values import is_constant, static_shape
from ..canonicalize.graph_edits import add_initializer

Array = npt.NDArray[Any]
Change = Callable[[Array], Array]
"""Of columns: [any, out] → [any, new out]."""
LAYOUT = ("Reshape", "Transpose")
"""Ops that lay a projection's output out as heads."""


def chosen(blocks: Sequence[AttentionBlock], layers: Sequence[int], name: str) -> list[AttentionBlock]:
    """Those at the given places, counted from 0; all for no places.

    Raises:
        PassError: there is no such place; says the pass's name.
    """
    wrong = [layer for layer in layers if not 0 <= layer < len(blocks)]
    if wrong:
        raise PassError(f"{name}: layers: expected numbers from 0 to {len(blocks) - 1}, found {wrong}")
    return [block for index, block in enumerate(blocks) if not layers or index in layers]


def reason_not_to_change(block: AttentionBlock) -> str | None:
    """Why the projections of an attention cannot be changed one by one, or None."""
    parts = (block.q, block.k, block.v, block.o)
    linears = [linear for linear in parts if linear is not None]
    if len({linear.node for linear in linears}) < len(parts):
        return "queries, keys, values and output have no projections of their own"
    if any(linear.is_quantized or len(linear.weight.uses()) > 1 for linear in linears):
        return "a projection is quantised or shared"
    if block.kv_heads is None or block.num_heads is None or block.head_size is None:
        return "the number or the size of its heads is not known"
    return None


def constant(value: ir.Value) -> Array:
    """The array of an initializer."""
    assert value.const_value is not None
    return value.const_value.numpy()


def change_columns(linear: Linear, change: Change) -> None:
    """Apply a function to a linear's weight [in, out], and to its bias as [1, out]."""
    array = constant(linear.weight)
    _set(linear.weight, change(array.T).T if linear.transposed else change(array))
    if linear.bias is not None:
        _set(linear.bias, change(constant(linear.bias).reshape(1, -1))[0])


def change_rows(linear: Linear, change: Change) -> None:
    """Apply a function on columns to the transpose of a linear's weight [in, out]."""
    array = constant(linear.weight)
    _set(linear.weight, change(array) if linear.transposed else change(array.T).T)


def _set(value: ir.Value, array: Array) -> None:
    value.const_value = ir.tensor(np.ascontiguousarray(array), name=value.name)
    value.shape = ir.Shape(array.shape)


def path_to(linear: Linear, start: ir.Value | None) -> Iterator[tuple[ir.Value, ir.Node | None]]:
    """The values from an attention's operand back to a projection's product, each with its node."""
    value = start
    while value is not None:
        node = value.producer()
        yield value, node
        if node is None or node is linear.node:
            return
        value = node.inputs[0]


def is_layout_only(linear: Linear, start: ir.Value | None, *, scaled: bool = False) -> bool:
    """Whether an operand of attention is the linear's output as heads, times a number if ``scaled``."""
    for value, node in path_to(linear, start):
        if value is linear.output:
            return True
        if node is None or not (node.op_type in LAYOUT or (scaled and _is_scaling(node))):
            return False
    return False


def _is_scaling(node: ir.Node) -> bool:
    """By one number for all channels."""
    factor = node.inputs[1] if node.op_type == "Mul" else None
    shape = static_shape(factor)
    return is_constant(factor) and shape is not None and math.prod(shape) == 1


def set_reshape(node: ir.Node, sizes: Array) -> None:
    """Give a Reshape a constant shape of its own, which others do not read."""
    name = f"{node.outputs[0].name}.shape"
    assert isinstance(node.graph, ir.Graph)
    node.replace_input_with(1, add_initializer(node.graph, ir.tensor(sizes, name=name), name))
