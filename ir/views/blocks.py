"""Blocks along the residual stream: ``x ← x + f(x)``, one for each residual Add."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from .linears import Linear, linears
from .values import is_constant, static_dim

_MIXING = frozenset({"Attention", "Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"})
"""Ops that combine channels or tokens: a branch without any is a part of an activation or a norm."""


@dataclasses.dataclass(frozen=True)
class Block:
    """One step of the residual stream, such as the attention or the MLP of a transformer layer.

    Attributes:
        input: the stream before the block.
        output: the stream after it: what ``add`` makes.
        add: the residual Add.
        branch: the value that is added to the stream, f(x).
        nodes: the nodes that compute the branch from the stream, in the graph's order.
        linears: the linears among them.
        has_attention: an Attention node is among them.
    """

    input: ir.Value
    output: ir.Value
    add: ir.Node
    branch: ir.Value
    nodes: tuple[ir.Node, ...]
    linears: tuple[Linear, ...]
    has_attention: bool


def blocks(model: ir.Model) -> list[Block]:
    """The blocks of the model's graph, in its order.

    An Add is residual if one operand is computed from the other by ops that mix channels or tokens, and both
    have the same known width: the last dimension of token features, the channels of images. x + x³ in a
    spelled-out activation is none. Blocks do not overlap, except where one encloses another.
    """
    position = {node: index for index, node in enumerate(model.graph)}
    by_node = {linear.node: linear for linear in linears(model)}
    found = (_as_block(node, position, by_node) for node in model.graph)
    return [block for block in found if block is not None]


def _as_block(node: ir.Node, position: dict[ir.Node, int], by_node: dict[ir.Node, Linear]) -> Block | None:
    if node.op_type != "Add" or node.domain != "":
        return None
    first, second = node.inputs
    if first is None or second is None or not _same_width(first, second):
        return None
    # The stream is what was there before, so the branch was computed after it.
    stream, branch = sorted((first, second), key=lambda value: _position(value, position))
    if len(stream.uses()) < 2 or is_constant(stream):
        return None
    nodes = _nodes_between(stream, branch, position)
    if not any(inner in by_node or inner.op_type in _MIXING for inner in nodes):
        return None
    return Block(
        input=stream,
        output=node.outputs[0],
        add=node,
        branch=branch,
        nodes=tuple(nodes),
        linears=tuple(by_node[inner] for inner in nodes if inner in by_node),
        has_attention=any(inner.op_type == "Attention" for inner in nodes),
    )


def _same_width(first: ir.Value, second: ir.Value) -> bool:
    if first.shape is None or second.shape is None or len(first.shape) != len(second.shape):
        return False
    axis = 1 if len(first.shape) == 4 else -1
    width = static_dim(first, axis)
    return width is not None and width > 1 and width == static_dim(second, axis)


def _position(value: ir.Value, position: dict[ir.Node, int]) -> int:
    producer = value.producer()
    return -1 if producer is None else position.get(producer, -1)


def _nodes_between(stream: ir.Value, branch: ir.Value, position: dict[ir.Node, int]) -> list[ir.Node]:
    """The nodes that compute ``branch`` from ``stream``; none if it does not depend on ``stream``."""
    start = _position(stream, position)
    seen: set[ir.Node] = set()
    waiting = [branch]
    while waiting:
        node = waiting.pop().producer()
        # Nothing that the stream's producer comes after can depend on the stream.
        if node is None or node in seen or position.get(node, -1) <= start:
            continue
        seen.add(node)
        waiting.extend(operand for operand in node.inputs if operand is not None)
    dependent = {stream}
    nodes: list[ir.Node] = []
    for node in sorted(seen, key=position.__getitem__):
        if not dependent.isdisjoint(operand for operand in node.inputs if operand is not None):
            nodes.append(node)
            dependent.update(node.outputs)
    return nodes if branch in dependent else []
