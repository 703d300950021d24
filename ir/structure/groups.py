"""What structured pruning may remove: groups of channels or heads, and whole branches of the residual stream.

Everything refers to tensors, values and nodes by *name*, so a structure that was found on a model holds for
clones of it and for pieces cut out of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import networkx
import numpy as np
import numpy.typing as npt

from ..errors import InputError

Indices = npt.NDArray[np.int64]
Role = Literal["producer", "consumer", "passenger"]
GroupKind = Literal["ffn", "attention", "convolution", "hidden", "other"]
ModuleKind = Literal["attention", "ffn", "convolution", "other"]


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """One axis of one initializer, which shrinks when structures of its group go.

    Attributes:
        tensor: the initializer's name.
        axis: the axis, counted from 0.
        indices: [structures, width], which indices along the axis go with each structure, ascending.
        role: "producer": the output axis of a linear's, convolution's or embedding's weight; "consumer": the
            axis of such a weight that is summed over; "passenger": biases, parameters of norms, depthwise
            kernels. A tied weight that is read in two ways has a member for each role.
    """

    tensor: str
    axis: int
    indices: Indices
    role: Role

    @property
    def width(self) -> int:
        """How many indices along the axis go with each structure."""
        return int(self.indices.shape[1])


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Structures (channels, heads, groups of heads), any of which can go, in all these tensors together.

    Attributes:
        name: unique and readable: the module path that the tensors have in common.
        kind: "attention": a structure is a head, or under grouped queries a key-value head with all its query
            heads; "hidden": the width of the residual stream.
        structures: how many there are.
        members: the axes that shrink, in the order of the tensors' first use.
        nodes: the nodes whose work shrinks with the group, by the name of their first output, in the graph's
            order.
    """

    name: str
    kind: GroupKind
    structures: int
    members: tuple[Member, ...]
    nodes: tuple[str, ...]

    @property
    def producers(self) -> tuple[Member, ...]:
        """The weights whose output axis shrinks."""
        return tuple(member for member in self.members if member.role == "producer")

    @property
    def consumers(self) -> tuple[Member, ...]:
        """The weights that sum over the axis that shrinks."""
        return tuple(member for member in self.members if member.role == "consumer")


@dataclasses.dataclass(frozen=True, eq=False)
class ResidualModule:
    """A whole branch on the residual stream: ``output = input + branch``, branch = f(input).

    Attributes:
        name: unique: the module path that the branch's weights have in common.
        kind: what the branch is.
        input: the stream before, a value's name.
        output: the stream after.
        branch: what is added.
        nodes: all nodes that go when the branch is dropped, its norm and its Add among them, by the name of
            their first output, in the graph's order.
        groups: the names of the channel groups that lie wholly inside.
    """

    name: str
    kind: ModuleKind
    input: str
    output: str
    branch: str
    nodes: tuple[str, ...]
    groups: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Unprunable:
    """Channels that have producers and consumers, and yet must stay."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """What can be pruned from a model, what cannot, and why.

    Attributes:
        groups: the channel groups, in the graph's order, and last the width of the residual stream.
        modules: the residual modules, in the graph's order.
        unprunable: what must stay.
        graph: the relations between dimensions. A node is (name of an initializer or value, axis), with its
            ``size``; an edge says that indices along two axes go together, and holds their ``relation``.
    """

    groups: tuple[ChannelGroup, ...]
    modules: tuple[ResidualModule, ...]
    unprunable: tuple[Unprunable, ...]
    graph: networkx.MultiGraph

    def group(self, name: str) -> ChannelGroup:
        """The channel group of that name.

        Raises:
            InputError: there is none.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise InputError(
            f"no channel group is named '{name}'",
            hint=_known("groups", [group.name for group in self.groups]),
        )

    def module(self, name: str) -> ResidualModule:
        """The residual module of that name.

        Raises:
            InputError: there is none.
        """
        for module in self.modules:
            if module.name == name:
                return module
        raise InputError(
            f"no residual module is named '{name}'",
            hint=_known("modules", [module.name for module in self.modules]),
        )

    def __str__(self) -> str:
        from .printer import format_structure

        return format_structure(self)


def _known(what: str, names: list[str]) -> str:
    if not names:
        return f"the model has no {what}"
    more = f", … ({len(names)} in all)" if len(names) > 6 else ""
    return f"its {what} are {', '.join(names[:6])}{more}"


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """Which structures of a group stay, and the new values of its tensors.

    Attributes:
        group: the group.
        keep: the structures that stay, ascending, at least one.
        weights: new values by tensor name, in the tensor's full dense shape: refitted weights of consumers
            and their biases. What they hold at indices that go does not matter.
    """

    group: ChannelGroup
    keep: Indices
    weights: Mapping[str, npt.NDArray[np.generic]] = dataclasses.field(default_factory=dict)


def new_weights(choices: Sequence[Choice]) -> dict[str, npt.NDArray[np.generic]]:
    """The new values of all choices' tensors, by name, in their full dense shapes.

    Where a weight reads several groups side by side, each group's choice says what becomes of its
    own indices.
    """
    weights: dict[str, npt.NDArray[np.generic]] = {}
    for choice in choices:
        for name, array in choice.weights.items():
            if name in weights:
                array = _with_own_indices(weights[name], array, choice.group, name)
            weights[name] = array
    return weights


def _with_own_indices(
    base: npt.NDArray[np.generic], new: npt.NDArray[np.generic], group: ChannelGroup, name: str
) -> npt.NDArray[np.generic]:
    result = base.copy()
    for member in group.consumers:
        if member.tensor == name:
            into, source = (np.moveaxis(array, member.axis, 0) for array in (result, new))
            own = member.indices.reshape(-1)
            into[own] = source[own]
    return result
