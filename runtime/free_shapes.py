"""A graph in which the sizes of channel groups are free, so that one session runs it at every size.

    y = Reshape(x · W[in, 12·32], [0, 0, 12, 32])   →   y = Reshape(x · W[in, ?], shape)

Weights that shrink with a group, and the operands that say sizes (shapes of Reshape and Expand, sizes of
Split, bounds of Slice), become initializers of free shape or value, which a session may take as inputs.
Branches of the residual stream are multiplied by gates of one element, for x + 0·f(x) is x exactly.

What depends on a group is not told by rules but by trial: `planish.ir.structure.shrink` removes one structure
in a copy of the model, and the difference is what each structure accounts for, as structures of a group are
alike. A group is left out, with the reason, where shrinking it changes something else: an attribute (heads of
a three-dimensional Attention, groups of a depthwise convolution), or a shape put together at run time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..ir import clone
from ..ir.structure import ChannelGroup, Choice, Member, ResidualModule, shrink
from ..ir.views import convolutions, linears
from .calibration.data import Feeds, fitted

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
Keeps = Mapping[str, Indices]
"""The structures that stay, by name of their group; groups that are not there stay whole."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Share:
    """What one structure of a group accounts for.

    Attributes:
        operands: of entries of constant operands, by position of a node in the graph and of its input.
        inputs: of the size of graph inputs, by name and axis.
    """

    operands: Mapping[tuple[int, int], Array]
    inputs: Mapping[tuple[str, int], int]


class FreeShapes:
    """A copy of a model that runs at all sizes of some groups, and what it needs to do so.

    Args:
        model: not changed; its tensors are shared.
        groups: those whose sizes are to be free.
        modules: residual modules that are to have gates.

    Attributes:
        model: the copy; with its own initializers it computes what the model does.
        fixed: by name of a group that could not be made free, the reason.
    """

    def __init__(
        self, model: ir.Model, groups: Iterable[ChannelGroup], modules: Iterable[ResidualModule]
    ) -> None:
        self.model = clone(model)
        self.fixed: dict[str, str] = {}
        self._groups: dict[str, ChannelGroup] = {}
        self._shares: dict[str, _Share] = {}
        for group in groups:
            share = _share(model, group)
            if isinstance(share, str):
                self.fixed[group.name] = share
            else:
                self._groups[group.name], self._shares[group.name] = group, share
        self._members = _by_tensor(self._groups.values())
        graph = self.model.graph
        self._operands = _own_operands(
            graph, {place for share in self._shares.values() for place in share.operands}
        )
        self._gates = _add_gates(graph, modules)
        names = dict.fromkeys([*self._members, *_biases(model, self._members)])
        self._dense = {name: _data(graph.initializers[name]) for name in names}
        self._inputs = [(value.name, value.shape, value.type) for value in model.graph.inputs]
        self._forget_sizes()

    @property
    def replaceable(self) -> list[str]:
        """Names of the initializers that other values may replace: weights, sizes and gates."""
        return [*self._dense, *self._operands.values(), *self._gates.values()]

    def serves(self, choices: Iterable[Choice], dropped: Iterable[ResidualModule]) -> bool:
        """Whether the copy can compute what the model does that is shrunk in this way."""
        return all(
            choice.group.name in self._groups and self._dense.keys() >= choice.weights.keys()
            for choice in choices
        ) and all(module.name in self._gates for module in dropped)

    def arrays(self, choices: Sequence[Choice], dropped: Sequence[ResidualModule]) -> dict[str, Array]:
        """Of the initializers that are `replaceable`, those that change, with their new values."""
        keeps = self._keeps(choices) | self._least(dropped)
        new = {name: array for choice in choices for name, array in choice.weights.items()}
        arrays: dict[str, Array] = {self._gates[module.name]: np.zeros(1) for module in dropped}
        for name, dense in self._dense.items():
            members = [entry for entry in self._members.get(name, ()) if entry[0].name in keeps]
            if members or name in new:
                arrays[name] = _cut(new.get(name, dense), members, keeps)
        for group, keep in keeps.items():
            for place, share in self._shares[group].operands.items():
                name = self._operands[place]
                entries = arrays.get(name, _data(self.model.graph.initializers[name]))
                arrays[name] = entries - share * self._gone(group, keep)
        return arrays

    def samples(
        self, samples: Sequence[Feeds], choices: Sequence[Choice], dropped: Sequence[ResidualModule]
    ) -> Sequence[Feeds]:
        """The samples as the model takes them that is shrunk in this way: its caches may have fewer heads."""
        least = self._least(dropped)
        keeps = {name: keep for name, keep in self._keeps(choices).items() if name not in least}
        sizes = self._input_sizes(keeps | least)
        if not sizes:
            return samples
        shell = self._shell(self._input_sizes(keeps))
        result = [dict(fitted(feeds, shell)) for feeds in samples]
        for feeds in result:
            for (name, axis), size in sizes.items():
                feeds[name] = feeds[name].take(range(size), axis)
        return result

    def _keeps(self, choices: Iterable[Choice]) -> dict[str, Indices]:
        return {choice.group.name: choice.keep for choice in choices}

    def _least(self, dropped: Iterable[ResidualModule]) -> dict[str, Indices]:
        """Dropped modules are computed, too, and then multiplied by zero: as little of them as can be."""
        names = {name for module in dropped for name in module.groups}
        return {name: np.zeros(1, np.int64) for name in names if name in self._groups}

    def _gone(self, name: str, keep: Indices) -> int:
        return self._groups[name].structures - len(keep)

    def _input_sizes(self, keeps: Keeps) -> dict[tuple[str, int], int]:
        """The sizes of graph inputs, by name and axis, that are smaller than the dense ones."""
        shapes = {name: shape for name, shape, _ in self._inputs}
        sizes: dict[tuple[str, int], int] = {}
        for group, keep in keeps.items():
            for (name, axis), share in self._shares[group].inputs.items():
                dense = sizes.get((name, axis), shapes[name][axis])
                sizes[name, axis] = dense - share * self._gone(group, keep)
        return sizes

    def _shell(self, sizes: Mapping[tuple[str, int], int]) -> ir.Model:
        """A model without nodes whose inputs have some other sizes."""
        inputs = [
            ir.Value(
                name=name,
                shape=ir.Shape([sizes.get((name, axis), dim) for axis, dim in enumerate(shape)]),
                type=value_type,
            )
            for name, shape, value_type in self._inputs
        ]
        return ir.Model(ir.Graph(inputs, [], nodes=[]), ir_version=self.model.ir_version)

    def _forget_sizes(self) -> None:
        """Let the shapes say nothing that does not hold at all sizes; onnxruntime infers what it needs."""
        graph = self.model.graph
        for value in (value for node in graph for value in node.outputs if not value.is_graph_output()):
            value.shape = None
        free = [(member.tensor, member.axis) for group in self._groups.values() for member in group.members]
        free += [place for share in self._shares.values() for place in share.inputs]
        values = {value.name: value for value in graph.inputs} | dict(graph.initializers)
        for name, axis in free:
            shape = values[name].shape
            values[name].shape = ir.Shape([None if i == axis else dim for i, dim in enumerate(shape)])


def _share(model: ir.Model, group: ChannelGroup) -> _Share | str:
    """What each structure of a group accounts for, or why that cannot be said."""
    if group.structures == 1:
        return _Share({}, {})
    copy = clone(model)
    nodes = [(node, tuple(node.inputs), dict(node.attributes)) for node in copy.graph]
    choice = Choice(group, np.arange(group.structures - 1), {})
    shrink(copy, [choice])
    operands: dict[tuple[int, int], Array] = {}
    for position, (node, inputs, attributes) in enumerate(nodes):
        if any(node.attributes.get(name) is not attribute for name, attribute in attributes.items()):
            return f"{node.op_type} '{node.outputs[0].name}' says a size in an attribute"
        for index, value in enumerate(node.inputs):
            before = inputs[index] if index < len(inputs) else None
            if value is before:
                continue
            if before is None or value is None or before.const_value is None or value.const_value is None:
                return f"{node.op_type} '{node.outputs[0].name}' is given a size that is computed"
            operands[position, index] = _data(before) - _data(value)
    members = _by_tensor([group])
    for name, value in copy.graph.initializers.items():
        before = model.graph.initializers.get(name)
        if before is None or before.const_value is value.const_value:
            continue
        expected = _cut(_data(before), members.get(name, ()), {group.name: choice.keep})
        if not np.array_equal(expected, _data(value)):
            return f"'{name}' does not only lose what goes with the group"
    inputs_after = zip(model.graph.inputs, copy.graph.inputs, strict=True)
    return _Share(operands, {place: size for pair in inputs_after for place, size in _lost(*pair)})


def _lost(before: ir.Value, after: ir.Value) -> Iterator[tuple[tuple[str, int], int]]:
    for axis, (old, new) in enumerate(zip(before.shape or (), after.shape or (), strict=True)):
        if old != new:
            yield (str(before.name), axis), int(old) - int(new)


def _by_tensor(groups: Iterable[ChannelGroup]) -> dict[str, list[tuple[ChannelGroup, Member]]]:
    found: dict[str, list[tuple[ChannelGroup, Member]]] = {}
    for group in groups:
        for member in group.members:
            found.setdefault(member.tensor, []).append((group, member))
    return found


def _cut(dense: Array, members: Iterable[tuple[ChannelGroup, Member]], keeps: Keeps) -> Array:
    """What stays of an array along all its axes."""
    stays: dict[int, npt.NDArray[np.bool_]] = {}
    for group, member in members:
        along = stays.setdefault(member.axis, np.ones(dense.shape[member.axis], np.bool_))
        along[np.delete(member.indices, keeps[group.name], axis=0)] = False
    for axis, along in stays.items():
        dense = np.compress(along, dense, axis)
    return dense


def _own_operands(graph: ir.Graph, places: Collection[tuple[int, int]]) -> dict[tuple[int, int], str]:
    """Give nodes constants of their own, which other nodes do not read: their names."""
    names: dict[tuple[int, int], str] = {}
    for position, node in enumerate(graph):
        for index, shared in enumerate(node.inputs):
            if (position, index) in places:
                name = f"planish.size.{position}.{index}"
                own = ir.Value(
                    name=name, shape=shared.shape, type=shared.type, const_value=shared.const_value
                )
                graph.register_initializer(own)
                node.replace_input_with(index, own)
                names[position, index] = name
    return names


def _add_gates(graph: ir.Graph, modules: Iterable[ResidualModule]) -> dict[str, str]:
    """Multiply the branches of modules by gates that are 1: the gates' names, by module."""
    adds = {node.outputs[0].name: node for node in graph if node.op_type == "Add"}
    names: dict[str, str] = {}
    for module in modules:
        add = adds.get(module.output)
        branches = [] if add is None else [value for value in add.inputs if value.name == module.branch]
        if len(branches) != 1:
            continue
        (branch,) = branches
        name = names[module.name] = f"planish.gate.{module.name}"
        one = ir.tensor(np.ones(1, branch.dtype.numpy()), name=name)
        gate = ir.Value(name=name, shape=one.shape, type=ir.TensorType(one.dtype), const_value=one)
        graph.register_initializer(gate)
        product = ir.node("Mul", [branch, gate], name=name)
        product.outputs[0].name = f"{name}.branch"
        product.outputs[0].type = branch.type
        graph.insert_before(add, product)
        add.replace_input_with(add.inputs.index(branch), product.outputs[0])
    return names


def _biases(model: ir.Model, tensors: Collection[str]) -> list[str]:
    """The biases of linears and convolutions with these weights: they may be refitted with them."""
    layers = [*linears(model), *convolutions(model)]
    return [
        str(layer.bias.name) for layer in layers if layer.bias is not None and layer.weight.name in tensors
    ]


def _data(value: ir.Value) -> Array:
    assert value.const_value is not None
    return value.const_value.numpy()
