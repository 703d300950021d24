"""Shapes that are known up to symbols are written into the nodes that use them.

    Reshape(x[b, s, 64], Concat(Shape(x)[0], Shape(x)[1], 4, 16)) → Reshape(x, [0, 0, 4, 16])
    Reshape(x, shape of x) → x,   Expand(x, shape of x) → x,   Slice(x, 0, all of it) → x

Two dimensions are equal if they are the same number or carry the same symbol: ONNX gives one symbol one value
throughout a graph. Symbols and the contents of shape tensors come from onnx-shape-inference. The Shape,
Gather and Concat chains that computed the shapes are left to dead-code removal.

Preconditions of the constant shape: every entry is a positive number, the symbol of the same axis of the
input (written 0, "copy"), or one single other entry (written −1). −1 beside a copied symbol is not
introduced, because runtimes refuse it when that dimension is empty.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import onnx_ir as ir
from onnx_shape_inference import SYM_DATA_KEY

from .graph_edits import (
    bypass,
    constant,
    constant_tensor,
    dims,
    graphs,
    integer,
    integers,
    is_op,
    same_shape,
    shape_constant,
)

END = 2**31 - 1
"""Exporters write "to the end" as the largest int32 or int64."""


def simplify_shapes(model: ir.Model) -> dict[str, int]:
    """Rewrite the Reshape, Expand and Slice nodes of every graph, whose shapes were inferred for rewriting."""
    statistics = {"shapes-made-constant": 0, "shape-no-ops-removed": 0}
    for graph in graphs(model):
        for node in graph:
            rule = NO_OPS.get(node.op_type)
            if rule is None or not is_op(node, node.op_type) or node.inputs[0] is None:
                continue
            if rule(node):
                statistics["shape-no-ops-removed"] += bypass(node, node.inputs[0])
            elif node.op_type == "Reshape":
                statistics["shapes-made-constant"] += _make_shape_constant(node)
    return statistics


def contents(value: ir.Value | None) -> list[int | str | None] | None:
    """The elements of a shape tensor as far as they are known: ints, symbols, ``None``."""
    if value is None:
        return None
    if constant_tensor(value) is not None:
        return list(integers(value) or []) if constant(value, limit=64) is not None else None
    noted = value.metadata_props.get(SYM_DATA_KEY)
    return None if noted is None else list(json.loads(noted))


def _reshape_is_no_op(node: ir.Node) -> bool:
    value = node.inputs[0]
    return value is not None and same_shape(value, node.outputs[0])


def _expand_is_no_op(node: ir.Node) -> bool:
    """Every target dimension is 1 or that of the input."""
    value, target = node.inputs[0], contents(node.inputs[1])
    own = dims(value)
    if own is None or target is None or len(target) > len(own):
        return False
    return all(
        wanted == 1 or (wanted is not None and wanted == dim)
        for wanted, dim in zip(reversed(target), reversed(own), strict=False)
    )


def _slice_is_no_op(node: ir.Node) -> bool:
    """Every sliced axis starts at 0, ends at or beyond its end, with step 1."""
    own = dims(node.inputs[0])
    if len(node.inputs) < 3:
        return False
    starts, ends = contents(node.inputs[1]), contents(node.inputs[2])
    if starts is None or ends is None or len(starts) != len(ends):
        return False
    steps = contents(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else [1]
    if any(start != 0 for start in starts) or steps is None or any(step != 1 for step in steps):
        return False
    if all(isinstance(end, int) and end >= END for end in ends):
        return True
    axes = integers(node.inputs[3]) if len(node.inputs) > 3 else list(range(len(starts)))
    if own is None or axes is None or any(axis >= len(own) for axis in axes):
        return False
    return all(_reaches(end, own[axis]) for end, axis in zip(ends, axes, strict=True))


def _reaches(end: int | str | None, dim: int | str | None) -> bool:
    if isinstance(end, int):
        return end >= END or (isinstance(dim, int) and end >= dim)
    return end is not None and end == dim


def _make_shape_constant(node: ir.Node) -> bool:
    value, shape = node.inputs[0], node.inputs[1]
    assert node.graph is not None
    assert value is not None
    if shape is None or constant_tensor(shape) is not None or not isinstance(node.graph, ir.Graph):
        return False
    entries = _entries(contents(shape), dims(value), dims(node.outputs[0]))
    if entries is None:
        return False
    node.replace_input_with(1, shape_constant(node.graph, entries))
    if integer(node, "allowzero", 0):
        node.attributes.pop("allowzero")
    return True


def _entries(
    wanted: list[int | str | None] | None,
    source: list[int | str | None] | None,
    result: list[int | str | None] | None,
) -> list[int] | None:
    """The constant shape: numbers, 0 for "the dimension of this axis of the input", at most one −1."""
    if wanted is None or source is None:
        return None
    entries: list[int] = []
    for axis, entry in enumerate(wanted):
        inferred = None if result is None or len(result) != len(wanted) else result[axis]
        if isinstance(entry, int) and entry > 0:
            entries.append(entry)
        elif entry == -1 and isinstance(inferred, int) and inferred > 0:
            entries.append(inferred)
        elif isinstance(entry, str) and axis < len(source) and entry == source[axis]:
            entries.append(0)
        elif entry == 0:
            return None
        else:
            entries.append(-1)
    explicit = wanted.count(-1) > 0
    if entries.count(-1) > 1 or (-1 in entries and 0 in entries and not explicit):
        return None
    return entries


NO_OPS: dict[str, Callable[[ir.Node], bool]] = {
    "Expand": _expand_is_no_op,
    "Reshape": _reshape_is_no_op,
    "Slice": _slice_is_no_op,
}
