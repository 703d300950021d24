"""The part of a model whose time depends on one group of channels, as a model that runs by itself.

What the part reads from the rest of the model becomes its inputs, with the arrays that the dense model has
there. So masks, positions and lengths are real, and a piece of a fixed batch and sequence needs nothing else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ..codegen.target import BoundModel
from ..ir import clone
from ..ir.errors import InputError
from ..ir.structure import ChannelGroup, Choice, ResidualModule, Structure, shrink
from ..ir.walk import values_read
from .calibration.data import Array, Feeds
from .session import Session

_FEW_INTEGERS = 16
"""Integer tensors up to this size are shapes, axes and lengths: work depends on what is in them."""
_ONE_COPY_OF_THE_WEIGHTS = {"session.disable_prepacking": "1"}


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """A part of a model, and what it reads.

    Attributes:
        model: its nodes, with the names that they have in the whole model; shares its tensors.
        feeds: an array for every input.
    """

    model: ir.Model
    feeds: Feeds

    def at_level(self, group: ChannelGroup, kept: int) -> Piece:
        """The piece with the first ``kept`` structures of ``group``; which ones does not change the time."""
        model = clone(self.model)
        if kept < group.structures:
            shrink(model, [Choice(group, np.arange(kept))])
        feeds = {str(value.name): _fitted(value, self.feeds[str(value.name)]) for value in model.graph.inputs}
        return Piece(model, feeds)

    def without_work(self) -> Piece:
        """A model with the same inputs and as many outputs that computes nothing worth the name."""
        inputs = [
            ir.val(str(value.name), shape=value.shape, dtype=value.dtype) for value in self.model.graph.inputs
        ]
        nodes = [ir.node("Shape", [inputs[0]]) for _ in self.model.graph.outputs]
        for index, node in enumerate(nodes):
            node.outputs[0].name = f"shape.{index}"
            node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        graph = ir.Graph(
            inputs,
            [node.outputs[0] for node in nodes],
            nodes=nodes,
            opset_imports={"": self.model.graph.opset_imports[""]},
            name="overhead",
        )
        return Piece(ir.Model(graph, ir_version=self.model.ir_version), self.feeds)

    def signature(self) -> str:
        """A hash of all that the time depends on: ops, attributes, shapes; not names, not weights."""
        return signature(self.model, self.feeds)


def group_nodes(structure: Structure, group: ChannelGroup) -> tuple[str, ...]:
    """The nodes whose time depends on ``group``, by first output.

    All of the group's own module, its norm and Add included: nothing of it is left at level 0. Without one,
    the nodes that shrink with the group.
    """
    module = own_module(structure, group)
    return group.nodes if module is None else module.nodes


def own_module(structure: Structure, group: ChannelGroup) -> ResidualModule | None:
    """The residual module in which this group lies, and no other."""
    return next((module for module in structure.modules if module.groups == (group.name,)), None)


def extract(model: ir.Model, parts: Mapping[str, Sequence[str]], feeds: Feeds) -> dict[str, Piece]:
    """Cut out several parts of a model; the dense model runs once for all of them.

    Args:
        model: not changed.
        parts: the nodes of each part, by the name of their first output.
        feeds: of the whole model.

    Raises:
        InputError: a node is not in the graph, or onnxruntime fails on the feeds.
    """
    graphs = {name: _cut(model, nodes, name) for name, nodes in parts.items()}
    names = {str(value.name) for graph in graphs.values() for value in graph.inputs}
    arrays = {**_captured(model, sorted(names - set(feeds)), feeds), **feeds}
    return {name: _piece(model, graph, arrays) for name, graph in graphs.items()}


def signature(model: ir.Model, feeds: Feeds) -> str:
    """A hash of all that a run's time depends on: ops, attributes and shapes; not names, not weights."""
    inputs = [_array_key(feeds[str(value.name)]) for value in model.graph.inputs]
    functions = [
        [str(identifier), _graph_key(model.functions[identifier].graph, {})]
        for identifier in sorted(model.functions)
    ]
    text = json.dumps([inputs, _graph_key(model.graph, {}), functions], default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _cut(model: ir.Model, nodes: Sequence[str], name: str) -> ir.Graph:
    wanted = set(nodes)
    inside = {node: None for node in model.graph if node.outputs and node.outputs[0].name in wanted}
    if len(inside) < len(wanted):
        unknown = sorted(wanted - {str(node.outputs[0].name) for node in inside})
        raise InputError(
            f"latency of {name!r}: the graph has no node with the output {unknown[0]!r}",
            hint="discover the structure of this very model",
        )
    read = {value: None for node in inside for value in values_read(node) if value.producer() not in inside}
    read_outside = {value for node in model.graph if node not in inside for value in values_read(node)}
    made = [value for node in inside for value in node.outputs]
    return ir.GraphView(
        [value for value in read if not value.is_initializer()],
        [value for value in made if value in read_outside or value.is_graph_output()],
        nodes=list(inside),
        initializers=[value for value in read if value.is_initializer()],
        opset_imports=model.graph.opset_imports,
        name=name,
    ).clone()


def _captured(model: ir.Model, names: Sequence[str], feeds: Feeds) -> dict[str, Array]:
    """The values ``names`` of the dense model."""
    if not names:
        return {}
    copy = clone(model)
    values = {str(value.name): value for node in copy.graph for value in node.outputs}
    copy.graph.outputs[:] = [values[name] for name in names]
    return Session(BoundModel(model=copy, session_options=_ONE_COPY_OF_THE_WEIGHTS)).run(feeds)


def _piece(model: ir.Model, graph: ir.Graph, arrays: Feeds) -> Piece:
    own = {str(value.name): np.asarray(arrays[str(value.name)], order="C") for value in graph.inputs}
    for value in graph.inputs:
        array = own[str(value.name)]
        if value.dtype is None:
            value.dtype = ir.DataType.from_numpy(array.dtype)
        if value.shape is None:
            value.shape = ir.Shape([None] * array.ndim)
    # What the whole model is known to be (canonical, say), its pieces are.
    piece = ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))
    piece.meta.update(model.meta)
    return Piece(clone(piece), own)


def _fitted(value: ir.Value, array: Array) -> Array:
    """The array with the first channels or heads, as many as the shrunk graph declares."""
    for axis, dim in enumerate(value.shape or ()):
        if isinstance(dim, int) and dim < array.shape[axis]:
            array = array.take(range(dim), axis)
    return np.asarray(array, order="C")


def _graph_key(graph: ir.Graph, numbers: dict[ir.Value, int]) -> list[object]:
    """The graph with numbers for names; values of the graphs around it have theirs in ``numbers``."""
    key: list[object] = []

    def number(value: ir.Value | None) -> int | None:
        if value is None:
            return None
        if value not in numbers:
            numbers[value] = len(numbers)
            if value.const_value is not None:
                key.append(_tensor_key(value.const_value))
        return numbers[value]

    key.append([number(value) for value in graph.inputs])
    for node in graph:
        attributes = [
            [name, _attribute_key(node.attributes[name], numbers)] for name in sorted(node.attributes)
        ]
        operands, results = ([number(value) for value in values] for values in (node.inputs, node.outputs))
        key.append([node.domain, node.op_type, node.overload, operands, results, attributes])
    key.append([number(value) for value in graph.outputs])
    return key


def _attribute_key(attribute: ir.Attr, numbers: dict[ir.Value, int]) -> object:
    if attribute.is_ref():
        return ["attribute", attribute.ref_attr_name]
    if attribute.type == ir.AttributeType.TENSOR:
        return _tensor_key(attribute.as_tensor())
    if attribute.type == ir.AttributeType.GRAPH:
        return _graph_key(attribute.as_graph(), numbers)
    if attribute.type == ir.AttributeType.GRAPHS:
        return [_graph_key(graph, numbers) for graph in attribute.as_graphs()]
    return attribute.value


def _tensor_key(tensor: ir.TensorProtocol) -> list[object]:
    shape = list(tensor.shape.numpy())
    if tensor.dtype.is_integer() and tensor.size <= _FEW_INTEGERS:
        return [tensor.dtype.name, shape, tensor.numpy().tolist()]
    return [tensor.dtype.name, shape]


def _array_key(array: Array) -> list[object]:
    content = array.tolist() if array.dtype.kind in "iu" and array.size <= _FEW_INTEGERS else None
    return [str(array.dtype), list(array.shape), content]
