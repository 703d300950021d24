"""Which channels of a linear belong to which head: found by sending indices through the ops between.

Between a projection and the attention, a graph may reshape, transpose, slice and split in many ways, and a
fused projection may hold queries, keys and values in any order. So the ops are run on arrays that hold their
own indices; where an index comes out says which channel it was. Dimensions that are symbols get small,
different numbers, so that a mix-up of batch, sequence and heads cannot go unnoticed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...ir.views import AttentionBlock, Linear
from ...ir.views.linears import as_linear
from ...ir.views.values import input_at, integer, is_constant

Indices = npt.NDArray[np.int64]
Flow = Indices | list[Indices]
"""What a value holds: an array of indices, or a sequence of them."""

_LONGEST_PATH = 12
"""Nodes between a projection and the attention; a longer path is something else."""
_SIZES = (2, 3, 5, 7, 11, 13)
"""Of dimensions that are symbols."""


class NoHeads(Exception):  # noqa: N818 — an answer that unwinds, never an error to the user
    """Why channels could not be assigned to heads."""


def value_columns(block: AttentionBlock, linears: Sequence[Linear]) -> tuple[Linear, Indices]:
    """The linear that makes the values, and its output channels by head: [kv_heads, head_size].

    Raises:
        NoHeads: the path between is not understood, or something else reads those channels.
    """
    target = input_at(block.node, 2)
    linear, path = _path_back(target, {linear.output: linear for linear in linears})
    symbols = _Symbols()
    start = symbols.indices(linear.output)
    flow: Flow = start
    flows: list[tuple[ir.Value, Flow]] = [(linear.output, start)]
    for node, output in path:
        flow = _through(node, flow, output, symbols)
        flows.append((output, flow))
    columns = _columns_of_heads(flow, block, start.shape[-1])
    for (value, held), reader in zip(flows, [*(node for node, _ in path), block.node], strict=True):
        _check_only_reader(value, held, reader, columns, start.shape[-1], symbols)
    return linear, columns


def output_rows(block: AttentionBlock) -> tuple[Linear, Indices]:
    """The linear that reads the attention, and its input channels by query head: [num_heads, head_size].

    Raises:
        NoHeads: the path between is not understood, or something else reads the attention.
    """
    symbols = _Symbols()
    value = block.node.outputs[0]
    start = symbols.indices(value)
    flow: Flow = start
    for _ in range(_LONGEST_PATH):
        reader = _single_reader(value)
        linear = as_linear(reader)
        if linear is not None and linear.input is value:
            return linear, _rows_of_heads(flow, start, block)
        value = reader.outputs[0]
        flow = _through(reader, flow, value, symbols)
    raise NoHeads("the path from the attention to its output projection is too long")


def _path_back(
    value: ir.Value | None, by_output: dict[ir.Value, Linear]
) -> tuple[Linear, list[tuple[ir.Node, ir.Value]]]:
    """The linear that ``value`` comes from, and the nodes after it with the output that is followed."""
    path: list[tuple[ir.Node, ir.Value]] = []
    while value is not None and value not in by_output:
        node = value.producer()
        if node is None or len(path) == _LONGEST_PATH:
            raise NoHeads("the values of the attention come from no linear")
        path.append((node, value))
        value = node.inputs[0]
    if value is None:
        raise NoHeads("the values of the attention come from no linear")
    return by_output[value], path[::-1]


class _Symbols:
    """Numbers for dimensions that are symbols; a product of symbols gets the product of their numbers."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}

    def shape(self, value: ir.Value) -> list[int]:
        if value.shape is None:
            raise NoHeads(f"the shape of {value.name} is not known")
        return [dim if isinstance(dim, int) else self._size(dim.value, value) for dim in value.shape]

    def indices(self, value: ir.Value) -> Indices:
        shape = self.shape(value)
        return np.arange(math.prod(shape), dtype=np.int64).reshape(shape)

    def _size(self, symbol: str | None, value: ir.Value) -> int:
        if symbol is None:
            raise NoHeads(f"the shape of {value.name} is not known")
        product = 1
        for factor in symbol.replace(" ", "").split("*"):
            if factor.isdigit():
                product *= int(factor)
                continue
            if factor not in self._sizes and len(self._sizes) == len(_SIZES):
                raise NoHeads("too many symbolic dimensions")
            product *= self._sizes.setdefault(factor, _SIZES[min(len(self._sizes), len(_SIZES) - 1)])
        return product


def _through(node: ir.Node, flow: Flow, output: ir.Value, symbols: _Symbols) -> Flow:
    """What ``output`` of ``node`` holds when its first input holds ``flow``.

    Raises:
        NoHeads: the op does more than move elements, or how it moves them is not constant.
    """
    try:
        moved = _moved(node, flow, output, symbols)
    except (ValueError, IndexError) as error:
        raise NoHeads(f"the shapes around {node.op_type} {node.name} are not understood: {error}") from error
    if moved is None:
        raise NoHeads(f"{node.op_type} stands between the projection and the attention")
    return moved


def _moved(node: ir.Node, flow: Flow, output: ir.Value, symbols: _Symbols) -> Flow | None:
    if node.domain != "":
        return None
    if isinstance(flow, list):
        return flow[_integers(node, 1)[0]] if node.op_type == "SequenceAt" else None
    match node.op_type:
        case "Identity" | "Cast":
            return flow
        case "Reshape" if is_constant(input_at(node, 1)) and not integer(node, "allowzero"):
            target = enumerate(_integers(node, 1))
            return flow.reshape([dim or flow.shape[axis] for axis, dim in target])
        case "Reshape" | "Squeeze" | "Unsqueeze":
            return flow.reshape(symbols.shape(output))
        case "Transpose":
            permutation = node.attributes.get("perm")
            return flow.transpose(None if permutation is None else permutation.as_ints())
        case "Split":
            axis, position = integer(node, "axis") or 0, node.outputs.index(output)
            sizes = [symbols.shape(each)[axis] for each in node.outputs]
            return np.split(flow, np.cumsum(sizes)[:-1], axis)[position]
        case "SplitToSequence" if input_at(node, 1) is not None and integer(node, "keepdims") != 0:
            return _split_to_sequence(flow, integer(node, "axis") or 0, node)
        case "Slice":
            return _sliced(flow, node)
        case "Gather":
            return np.take(flow, _constant(node, 1), integer(node, "axis") or 0)
        case _:
            return None


def _split_to_sequence(flow: Indices, axis: int, node: ir.Node) -> list[Indices]:
    split = _constant(node, 1)
    if split.ndim == 0:
        return np.split(flow, range(int(split), flow.shape[axis], int(split)), axis)
    return np.split(flow, np.cumsum(split)[:-1], axis)


def _sliced(flow: Indices, node: ir.Node) -> Indices:
    starts, ends = _integers(node, 1), _integers(node, 2)
    axes = _integers(node, 3) if input_at(node, 3) is not None else list(range(len(starts)))
    steps = _integers(node, 4) if input_at(node, 4) is not None else [1] * len(starts)
    index = [slice(None)] * flow.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 0:
            raise NoHeads(f"{node.op_type} {node.name} turns the order around")
        index[axis] = slice(start, end, step)
    return flow[tuple(index)]


def _constant(node: ir.Node, index: int) -> Indices:
    value = input_at(node, index)
    if value is None or not is_constant(value) or value.const_value is None:
        raise NoHeads(f"{node.op_type} {node.name} is not constant in what it takes")
    return np.asarray(value.const_value.numpy(), np.int64)


def _integers(node: ir.Node, index: int) -> list[int]:
    return [int(each) for each in _constant(node, index).reshape(-1)]


def _columns_of_heads(flow: Flow, block: AttentionBlock, features: int) -> Indices:
    """Which channel each [head, feature] of the attention's values is, the same for all tokens."""
    if isinstance(flow, list):
        raise NoHeads("the values of the attention are a sequence")
    by_head = _by_head(flow, block)
    batch, _, length, _ = by_head.shape
    tokens, channels = np.divmod(by_head, features)
    in_order = np.arange(batch * length).reshape(batch, 1, length, 1)
    if np.any(tokens != in_order) or np.any(channels != channels[:1, :, :1]):
        raise NoHeads("tokens or heads are mixed between the projection and the attention")
    return channels[0, :, 0]


def _by_head(flow: Indices, block: AttentionBlock) -> Indices:
    """[batch, kv_heads, sequence, head_size], as the op reads it."""
    if flow.ndim == 4:
        return flow
    heads = block.kv_heads
    if flow.ndim != 3 or heads is None:
        raise NoHeads("the number of heads is not known")
    return flow.reshape(*flow.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def _rows_of_heads(flow: Flow, start: Indices, block: AttentionBlock) -> Indices:
    """Which input channel of the projection each [head, feature] of the attention's result becomes."""
    heads = block.num_heads
    if isinstance(flow, list) or heads is None:
        raise NoHeads("the number of heads is not known")
    order = start.transpose(0, 2, 1, 3) if start.ndim == 4 else start  # [batch, sequence, …]
    tokens = order.reshape(order.shape[0] * order.shape[1], -1)
    read = flow.reshape(-1, flow.shape[-1])
    if read.shape != tokens.shape or np.any(np.sort(read[0]) != np.sort(tokens[0])):
        raise NoHeads("the output projection reads more or less than the attention")
    # Where in its token's features every index was, for the first token; all others must be alike.
    where = np.argsort(tokens[0])[np.searchsorted(np.sort(tokens[0]), read[0])]
    if np.any(tokens[:, where] != read):
        raise NoHeads("tokens are mixed between the attention and its output projection")
    return np.argsort(where).reshape(heads, -1)


def _single_reader(value: ir.Value) -> ir.Node:
    readers = [node for node in value.consumers() if node.op_type != "Shape"]
    if len(readers) != 1 or value.is_graph_output():
        raise NoHeads("more than the output projection reads the attention")
    return readers[0]


def _check_only_reader(
    value: ir.Value, held: Flow, reader: ir.Node, columns: Indices, features: int, symbols: _Symbols
) -> None:
    """Nothing but ``reader`` may read those channels of ``value`` that are in ``columns``."""
    if value.is_graph_output():
        raise NoHeads("the graph returns the projection")
    for node in dict.fromkeys(value.consumers()):
        if node is reader or node.op_type == "Shape":
            continue
        for output in node.outputs:
            try:
                taken = _through(node, held, output, symbols)
            except NoHeads as unknown:
                raise NoHeads(f"{node.op_type} reads the values too") from unknown
            parts = taken if isinstance(taken, list) else [taken]
            if np.isin(
                list(itertools.chain(*(part.reshape(-1) % features for part in parts))), columns
            ).any():
                raise NoHeads(f"{node.op_type} reads the values too")
