"""Shapes that are known up to symbols are written into the nodes that use them.

    Reshape(x[b, s, 64], Concat(Shape(x)[0], Shape(x)[1], 4, 16)) → Reshape(x, [0, 0, 4, 16])
    Where(shape == −1, 1, shape) → shape
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
import re
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_shape_inference import SYM_DATA_KEY

from ...ir.walk import graphs
from .graph_edits import (
    add_initializer,
    as_dim,
    bypass,
    constant_tensor,
    dims,
    integer,
    integers,
    is_op,
    producer,
    rank,
    replace_node,
    retire,
    same_shape,
    shape_constant,
    sweep,
)

SELECTIONS = "shapes-resolved"
"""The statistic of rewrites after which inference knows more than before."""

ANONYMOUS = re.compile(r"\b_d\d+\b")
"""Symbols that onnx-shape-inference makes up, alone or within an expression."""

END = 2**31 - 1
"""Exporters write "to the end" as the largest int32 or int64."""


def forget_anonymous_symbols(model: ir.Model) -> None:
    """Drop shapes with a symbol that inference made up: it keeps what is there, and may know better now."""
    for graph in graphs(model):
        for node in graph:
            for value in node.outputs:
                symbols = [dim for dim in dims(value) or () if isinstance(dim, str)]
                if any(ANONYMOUS.search(symbol) for symbol in symbols) and not value.is_graph_output():
                    value.shape = None


def simplify_shapes(model: ir.Model) -> dict[str, int]:
    """Use what inference found in all graphs; shapes must have been inferred for rewriting."""
    statistics = {"shapes-made-constant": 0, "shape-no-ops-removed": 0, SELECTIONS: 0}
    for graph in graphs(model):
        for node in sweep(graph):
            rule = RULES.get(node.op_type)
            if rule is not None and is_op(node, node.op_type):
                name, apply = rule
                statistics[name] += apply(node)
    return statistics


def contents(value: ir.Value | None) -> list[int | str | None] | None:
    """The elements of a shape tensor as far as they are known: ints, symbols, ``None``."""
    if value is None:
        return None
    if constant_tensor(value) is not None:
        known = integers(value)
        return None if known is None else list(known)
    noted = value.metadata_props.get(SYM_DATA_KEY)
    return None if noted is None else [as_dim(entry) for entry in json.loads(noted)]


def _make_constant(node: ir.Node) -> bool:
    """Shape arithmetic whose result is known to consist of numbers becomes that constant."""
    output = node.outputs[0]
    known, rank_known = contents(output), rank(output)
    if known is None or rank_known not in (0, 1) or output.dtype != ir.DataType.INT64:
        return False
    if output.is_graph_output() or not isinstance(node.graph, ir.Graph):
        return False
    entries = [entry for entry in known if isinstance(entry, int)]
    if len(entries) != len(known) or (rank_known == 0 and len(entries) != 1):
        return False
    array = np.array(entries if rank_known else entries[0], dtype=np.int64)
    output.replace_all_uses_with(add_initializer(node.graph, ir.tensor(array), str(output.name)))
    retire(node)
    return True


def _reshape(node: ir.Node) -> bool:
    """A reshape to the shape that is there, or to one that can be written down."""
    value = node.inputs[0]
    if value is not None and same_shape(value, node.outputs[0]):
        return bypass(node, value)
    return _make_constant(node) or _make_shape_constant(node)


def _if_no_op(is_no_op: Callable[[ir.Node], bool]) -> Callable[[ir.Node], bool]:
    """Remove the node in favour of its first input where that is what it returns."""

    def apply(node: ir.Node) -> bool:
        value = node.inputs[0]
        return value is not None and is_no_op(node) and bypass(node, value)

    return apply


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


def _note_shape(node: ir.Node) -> bool:
    """ConstantOfShape(shape) with known symbols: inference by itself sees only numbers."""
    output, known = node.outputs[0], contents(node.inputs[0])
    if output.shape is not None or known is None or None in known:
        return False
    output.shape = ir.Shape(known)
    return True


def _select_shape(node: ir.Node) -> bool:
    """Where(shape == −1, 1, shape): how ``expand(−1, …)`` is exported. The constant parts decide now."""
    shape, equal = node.inputs[2], producer(node.inputs[0], "Equal")
    if equal is None or shape is None or rank(shape) != 1 or set(integers(node.inputs[1]) or [0]) != {1}:
        return False
    if not any(
        compared is shape and set(integers(number) or [0]) == {-1}
        for compared, number in (equal.inputs, reversed(equal.inputs))
    ):
        return False
    known = contents(shape)
    if known is None or None in known:
        return False
    if -1 not in known:
        return bypass(node, shape)
    return _replace_minus_ones(node, shape)


def _replace_minus_ones(node: ir.Node, shape: ir.Value) -> bool:
    """Concat(a, −1, …) with 1 for −1, if each −1 is in a constant part."""
    concat = producer(shape, "Concat")
    if concat is None or not isinstance(node.graph, ir.Graph):
        return False
    parts = [(part, contents(part)) for part in concat.inputs]
    if any(entry is None or (-1 in entry and constant_tensor(part) is None) for part, entry in parts):
        return False
    inputs = [
        shape_constant(node.graph, [1 if e == -1 else int(e) for e in entry if e is not None])
        if entry is not None and -1 in entry
        else part
        for part, entry in parts
    ]
    replace_node(node, "Concat", inputs, {"axis": 0})
    return True


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
    if (
        value is None
        or shape is None
        or constant_tensor(shape) is not None
        or not isinstance(node.graph, ir.Graph)
    ):
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


NO_OPS, CONSTANTS = "shape-no-ops-removed", "shapes-made-constant"

RULES: dict[str, tuple[str, Callable[[ir.Node], bool]]] = {
    "Concat": (CONSTANTS, _make_constant),
    "ConstantOfShape": (SELECTIONS, _note_shape),
    "Expand": (NO_OPS, _if_no_op(_expand_is_no_op)),
    "Gather": (CONSTANTS, _make_constant),
    "Reshape": (CONSTANTS, _reshape),
    "Shape": (CONSTANTS, _make_constant),
    "Slice": (NO_OPS, _if_no_op(_slice_is_no_op)),
    "Squeeze": (CONSTANTS, _make_constant),
    "Unsqueeze": (CONSTANTS, _make_constant),
    "Where": (SELECTIONS, _select_shape),
}
"""By op: under which statistic it counts, and the rewrite."""
