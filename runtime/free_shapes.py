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
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..ir import clone
from ..ir.structure import ChannelGroup, Choice, Member, ResidualModule, new_weights, shrink
from ..ir.views import Convolution, Linear, convolutions, linears
from ..ir.views.values import static_dim
from .calibration.data import Feeds, fitted
from .gates import add_gates

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
Keeps = Mapping[str, Indices]
"""The structures that stay, by name of their group; groups that are not there stay whole."""
Place = tuple[int, int]
"""An operand: the position of a node in the graph, and that of the operand among the node's."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Share:
    """What one structure of a group accounts for.

    Attributes:
        operands: of the entries of constant operands.
        inputs: of the size of graph inputs, by name and axis.
        computed: the axes of other values that it has a part in, by name; None for all of them.
    """

    operands: Mapping[Place, Array]
    inputs: Mapping[str, Mapping[int, int]]
    computed: Mapping[str, Sequence[int] | None]


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
            try:
                self._shares[group.name] = _share(model, group)
                self._groups[group.name] = group
            except _FixedError as reason:
                self.fixed[group.name] = str(reason)
        self._members = _by_tensor(self._groups.values())
        graph = self.model.graph
        self._operands = _own_operands(
            graph, {place for share in self._shares.values() for place in share.operands}
        )
        self._gates = add_gates(graph, modules)
        names = dict.fromkeys([*self._members, *_biases(model, self._members)])
        self._dense = {name: _data(graph.initializers[name]) for name in names}
        self._shell = _without_nodes(model)
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
        new = new_weights(choices)
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
        shell = clone(self._shell)
        chosen = self._input_sizes(keeps)
        for value in shell.graph.inputs:
            _resize(value, chosen.get(str(value.name), {}))
        result = [dict(fitted(feeds, shell)) for feeds in samples]
        for name, axes in sizes.items():
            for (axis, size), feeds in itertools.product(axes.items(), result):
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

    def _input_sizes(self, keeps: Keeps) -> dict[str, dict[int, int]]:
        """The sizes of graph inputs, by name and axis, that are smaller than the dense ones."""
        sizes: dict[str, dict[int, int]] = {}
        for value in self._shell.graph.inputs:
            for group, keep in keeps.items():
                for axis, share in self._shares[group].inputs.get(str(value.name), {}).items():
                    axes = sizes.setdefault(str(value.name), {})
                    axes[axis] = axes.get(axis, _size(value, axis)) - share * self._gone(group, keep)
        return sizes

    def _forget_sizes(self) -> None:
        """Let shapes say nothing that does not hold at all sizes; what does, onnxruntime may not infer."""
        graph = self.model.graph
        computed = {str(value.name): value for node in graph for value in node.outputs}
        for share in self._shares.values():
            for name, axes in share.computed.items():
                if axes is None:
                    computed[name].shape = None
                else:
                    _resize(computed[name], dict.fromkeys(axes))
        free = [(member.tensor, member.axis) for group in self._groups.values() for member in group.members]
        for share in self._shares.values():
            free += [(name, axis) for name, axes in share.inputs.items() for axis in axes]
        values = {value.name: value for value in graph.inputs} | dict(graph.initializers)
        for name, axis in free:
            _resize(values[name], {axis: None})


def _resize(value: ir.Value, sizes: Mapping[int, int | None]) -> None:
    if value.shape is not None:
        value.shape = ir.Shape([sizes.get(axis, dim) for axis, dim in enumerate(value.shape)])


def _without_nodes(model: ir.Model) -> ir.Model:
    """The inputs of a model, and nothing else."""
    inputs = [ir.Value(name=value.name, shape=value.shape, type=value.type) for value in model.graph.inputs]
    return ir.Model(ir.Graph(inputs, [], nodes=[]), ir_version=model.ir_version)


class _FixedError(Exception):
    """The reason why a graph cannot be made free of a group's size."""


def _share(model: ir.Model, group: ChannelGroup) -> _Share:
    """What each structure of a group accounts for: what goes with the last one."""
    if group.structures == 1:
        return _Share({}, {}, {})
    copy = clone(model)
    nodes = [(node, tuple(node.inputs), dict(node.attributes)) for node in copy.graph]
    choice = Choice(group, np.arange(group.structures - 1), {})
    shrink(copy, [choice])
    operands: dict[Place, Array] = {}
    for position, (node, inputs, attributes) in enumerate(nodes):
        if any(node.attributes.get(name) is not attribute for name, attribute in attributes.items()):
            raise _FixedError(f"{node.op_type} '{node.outputs[0].name}' says a size in an attribute")
        operands |= {(position, index): share for index, share in _operand_shares(node, inputs)}
    _require_only_cut(model, copy, choice)
    return _Share(operands, _input_shares(model, copy), _computed_axes(model, copy))


def _operand_shares(node: ir.Node, inputs: Sequence[ir.Value | None]) -> Iterator[tuple[int, Array]]:
    """By how much the entries of a node's operands are less than those of ``inputs``, where they changed."""
    for index, (after, before) in enumerate(itertools.zip_longest(node.inputs, inputs)):
        if after is before:
            continue
        if after is None or before is None or after.const_value is None or before.const_value is None:
            raise _FixedError(f"{node.op_type} '{node.outputs[0].name}' is given a size that is computed")
        if after.const_value.shape != before.const_value.shape:
            raise _FixedError(f"{node.op_type} '{node.outputs[0].name}' is given sizes in another form")
        yield index, _data(before) - _data(after)


def _require_only_cut(model: ir.Model, shrunk: ir.Model, choice: Choice) -> None:
    """Initializers lose what goes with the group; they do not change otherwise."""
    members = _by_tensor([choice.group])
    for name, after in shrunk.graph.initializers.items():
        before = model.graph.initializers.get(name)
        if before is None or before.const_value is after.const_value:
            continue
        expected = _cut(_data(before), members.get(name, ()), {choice.group.name: choice.keep})
        if not np.array_equal(expected, _data(after)):
            raise _FixedError(f"'{name}' does not only lose what goes with the group")


def _input_shares(model: ir.Model, shrunk: ir.Model) -> dict[str, dict[int, int]]:
    shares: dict[str, dict[int, int]] = {}
    for before, after in zip(model.graph.inputs, shrunk.graph.inputs, strict=True):
        for axis, (old, new) in enumerate(zip(before.shape or (), after.shape or (), strict=True)):
            if old != new:
                shares.setdefault(str(before.name), {})[axis] = _size(before, axis) - _size(after, axis)
    return shares


def _computed_axes(model: ir.Model, shrunk: ir.Model) -> dict[str, Sequence[int] | None]:
    """The axes of nodes' outputs whose sizes are others, by name."""
    changed: dict[str, Sequence[int] | None] = {}
    after = {value.name: value.shape for node in shrunk.graph for value in node.outputs}
    for value in (value for node in model.graph for value in node.outputs):
        old, new = value.shape, after.get(value.name)
        if old is not None and (new is None or len(new) != len(old)):
            changed[str(value.name)] = None
        elif old is not None and new is not None and old != new:
            pairs = enumerate(zip(old, new, strict=True))
            changed[str(value.name)] = [axis for axis, (size, other) in pairs if size != other]
    return changed


def _size(value: ir.Value, axis: int) -> int:
    size = static_dim(value, axis)
    assert size is not None  # only known sizes shrink
    return size


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


def _own_operands(graph: ir.Graph, places: Collection[Place]) -> dict[Place, str]:
    """Give nodes constants of their own there, which other nodes do not read: their names."""
    names: dict[Place, str] = {}
    for position, node in enumerate(graph):
        for index, shared in enumerate(node.inputs):
            if shared is None or (position, index) not in places:
                continue
            name = names[position, index] = f"planish.size.{position}.{index}"
            node.replace_input_with(index, _registered(graph, name, _data(shared)))
    return names


def _registered(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _biases(model: ir.Model, tensors: Collection[str]) -> list[str]:
    """The biases of linears and convolutions with these weights: they may be refitted with them."""
    layers: list[Linear | Convolution] = [*linears(model), *convolutions(model)]
    return [
        str(layer.bias.name) for layer in layers if layer.bias is not None and layer.weight.name in tensors
    ]


def _data(value: ir.Value) -> Array:
    assert value.const_value is not None
    return value.const_value.numpy()
