"""Streams: the activations of a graph that share one basis of their channels.

A residual stream is a set of activations [..., d] that are connected by ops that act on every d-vector as a
whole. If all that writes it is multiplied by a matrix M, and all that reads it by the inverse of M, the model
computes the same. `trace_stream` collects the writers and the readers, and says what stands in the way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from ...ir.views.linears import as_linear
from ...ir.views.values import input_at, integer, is_constant, static_dim
from .carried import carried
from .vectors import Vector

NORMS = ("LayerNormalization", "RMSNormalization")


@dataclasses.dataclass(frozen=True)
class Obstacle:
    """What keeps a stream in its basis: a node or value, and the reason."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.reason} ({self.name})"


@dataclasses.dataclass
class Stream:
    """What `trace_stream` found.

    Attributes:
        width: the length d of the vectors.
        values: the activations in this basis.
        writers: constants whose vectors enter the stream: embedding tables, weights along their outputs,
            biases, learned positions.
        readers: the weights of linears along their inputs.
        norms: normalisations that read the stream.
        is_residual: some of its activations are added to each other.
        obstacles: what else reads or writes it.
    """

    width: int
    values: set[ir.Value] = dataclasses.field(default_factory=set)
    writers: list[Vector] = dataclasses.field(default_factory=list)
    readers: list[Vector] = dataclasses.field(default_factory=list)
    norms: list[ir.Node] = dataclasses.field(default_factory=list)
    is_residual: bool = False
    obstacles: list[Obstacle] = dataclasses.field(default_factory=list)


def trace_stream(seed: ir.Value, *, passes_norm: Callable[[ir.Node], bool]) -> Stream | None:
    """The stream that ``seed`` belongs to; None if its width is not known.

    ``passes_norm`` says of a normalisation whether its output has the basis of its input; others end the
    stream.
    """
    width = static_dim(seed, -1)
    if width is None or width < 2:
        return None
    stream, inner, waiting = Stream(width), set[ir.Node](), [seed]
    while waiting:
        value = waiting.pop()
        if value in stream.values:
            continue
        stream.values.add(value)
        if value.is_graph_input():
            stream.obstacles.append(Obstacle(str(value.name), "the stream is an input of the graph"))
        if value.is_graph_output():
            stream.obstacles.append(Obstacle(str(value.name), "the graph returns the stream"))
        producer = value.producer()
        # A node may read a value more than once, and a linear may both read and write the same stream.
        readers = dict.fromkeys(value.consumers())
        for node in (*([] if producer is None else [producer]), *readers):
            if node in inner:
                continue
            connected = _connected(node, stream, passes_norm)
            if connected:
                inner.add(node)
                waiting.extend(connected)
            elif node is producer:
                _add_writer(node, stream)
            else:
                _add_reader(node, value, stream)
    return stream


def is_norm(node: ir.Node) -> bool:
    """Whether the node normalises vectors of the last axis."""
    if node.domain != "" or node.op_type not in NORMS:
        return False
    value = input_at(node, 0)
    axis = integer(node, "axis")
    rank = None if value is None or value.shape is None else len(value.shape)
    return axis in (None, -1) or (rank is not None and axis == rank - 1)


def norm_name(norm: ir.Node) -> str:
    """The norm's module: its weight's name without ``.weight``."""
    scale = input_at(norm, 1)
    return str(norm.name if scale is None else scale.name).removesuffix(".weight")


def is_weightless(norm: ir.Node) -> bool:
    """Whether the norm's scale is constant and all ones, and it has no bias."""
    scale, bias = input_at(norm, 1), input_at(norm, 2)
    if scale is None or scale.const_value is None or not is_constant(scale) or bias is not None:
        return False
    return bool(np.all(scale.const_value.numpy() == 1))


def read_vector(node: ir.Node) -> Vector | None:
    """The weight of a linear along its input; None for other nodes."""
    transposed = _is_linear(node)
    return None if transposed is None else Vector(node, 1, -1 if transposed else 0)


def _written_vectors(node: ir.Node) -> list[Vector]:
    """The constants that make a linear's output: its weight along its rows, and the bias of a Gemm."""
    transposed = _is_linear(node)
    if transposed is None:
        return []
    weight = Vector(node, 1, 0 if transposed else -1)
    return [weight] if input_at(node, 2) is None else [weight, Vector(node, 2, -1)]


def _is_linear(node: ir.Node) -> bool | None:
    """Whether the weight [in, out] is stored transposed; None if the node is no linear."""
    if node.domain != "" or node.op_type not in ("MatMul", "Gemm"):
        return None
    linear = as_linear(node)
    return None if linear is None else linear.transposed


def _connected(node: ir.Node, stream: Stream, passes_norm: Callable[[ir.Node], bool]) -> list[ir.Value]:
    """The values that the node puts into the same basis; none if the stream begins or ends there."""
    if is_norm(node) and passes_norm(node):
        stream.norms.append(node)
        return [value for value in (node.inputs[0], node.outputs[0]) if value is not None]
    operands = carried(node, stream.width)
    if operands is None:
        return []
    stream.writers.extend(Vector(node, index, -1) for index in operands.constants)
    stream.is_residual |= len(operands.activations) > 1 and node.op_type != "Concat"
    activations = [node.inputs[index] for index in operands.activations]
    return [value for value in (*activations, *node.outputs) if value is not None]


def _add_writer(node: ir.Node, stream: Stream) -> None:
    written = _written_vectors(node)
    stream.writers.extend(written)
    if not written:
        if is_norm(node):
            obstacle = Obstacle(norm_name(node), "a norm that keeps its weights writes the stream")
        else:
            obstacle = Obstacle(str(node.name), f"{node.op_type} writes the stream")
        stream.obstacles.append(obstacle)


def _add_reader(node: ir.Node, value: ir.Value, stream: Stream) -> None:
    reader = read_vector(node)
    if is_norm(node) and node.inputs[0] is value:
        stream.norms.append(node)
    elif reader is not None and node.inputs[0] is value:
        stream.readers.append(reader)
    else:
        stream.obstacles.append(Obstacle(str(node.name), f"{node.op_type} reads the stream"))
