"""What a rule says about the dimensions of one node, and the small helpers that rules are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from ..views.values import is_constant, static_dim
from .groups import Indices, Role

Dimension = tuple[str, int]
"""A value's or initializer's name, and an axis counted from 0."""


@dataclasses.dataclass(frozen=True, eq=False)
class Relation:
    """Indices along two axes that go together.

    Attributes:
        first, second: the two axes; the same axis where indices of one axis belong together.
        indices: pairs of indices, first and second; None where every index goes with the same index.
    """

    first: Dimension
    second: Dimension
    indices: tuple[Indices, Indices] | None = None


@dataclasses.dataclass(frozen=True)
class Pin:
    """An axis that must stay as it is.

    Attributes:
        dimension: the axis.
        reason: why, as a clause.
        unless_hidden: it may shrink all the same where it is the width of the residual stream.
        unknown_op: there is no rule that says where its indices go from here.
    """

    dimension: Dimension
    reason: str
    unless_hidden: bool = False
    unknown_op: bool = False


@dataclasses.dataclass(frozen=True)
class Use:
    """What an axis of a weight is to the node that reads it."""

    dimension: Dimension
    role: Role


Fact = Relation | Pin | Use
Rule = Callable[[ir.Node], Iterator[Fact]]


def width(value: ir.Value | None, axis: int) -> int | None:
    """The size of an axis that could shrink: a known number above 1."""
    size = static_dim(value, axis)
    return size if size is not None and size > 1 else None


def dimension(value: ir.Value, axis: int) -> Dimension:
    """The key of an axis; negative axes count from the end."""
    return value.name or "", axis % rank(value)


def rank(value: ir.Value) -> int:
    """How many axes a value of known shape has."""
    assert value.shape is not None
    return len(value.shape)


def label(node: ir.Node) -> str:
    """How a reason names a node."""
    return f"{node.op_type} '{node.outputs[0].name}'"


def same(first: ir.Value | None, axis: int, second: ir.Value | None, other_axis: int) -> Iterator[Fact]:
    """Every index of one axis goes with the same index of the other; axes of size 1 are broadcast.

    An axis whose size is not known on the other side, or is another, cannot be followed and stays.
    """
    if first is None or second is None:
        return
    size, other = static_dim(first, axis), static_dim(second, other_axis)
    if size == other and size is not None:
        if size > 1:
            yield Relation(dimension(first, axis), dimension(second, other_axis))
    elif 1 not in (size, other):
        for value, along, there in ((first, axis, second), (second, other_axis, first)):
            yield from pin(value, [along], f"its size is not known, or another, at '{there.name}'")


def pairs(
    first: ir.Value, axis: int, indices: Indices, second: ir.Value, other_axis: int, others: Indices
) -> Relation:
    """Index ``indices[k]`` of one axis goes with ``others[k]`` of the other."""
    return Relation(dimension(first, axis), dimension(second, other_axis), (indices, others))


def together(value: ir.Value, axis: int, block: int) -> Iterator[Fact]:
    """Each ``block`` neighbouring indices of an axis belong together."""
    size = width(value, axis)
    if size is not None and block > 1:
        every = np.arange(size)
        yield pairs(value, axis, every, value, axis, every // block * block)


def pin(value: ir.Value | None, axes: Iterable[int], reason: str) -> Iterator[Pin]:
    """These axes of the value stay as they are."""
    if value is not None and value.shape is not None:
        for axis in axes:
            if width(value, axis) is not None:
                yield Pin(dimension(value, axis), reason)


def pin_all(values: Iterable[ir.Value | None], reason: str) -> Iterator[Pin]:
    """All axes of these values stay as they are."""
    for value in values:
        if value is not None and value.shape is not None:
            yield from pin(value, range(len(value.shape)), reason)


def use(value: ir.Value | None, axis: int, role: Role) -> Iterator[Fact]:
    """An axis has this role if the value is a weight."""
    if value is not None and width(value, axis) is not None:
        yield Use(dimension(value, axis), role)


def constant_integers(value: ir.Value | None) -> list[int] | None:
    """The elements of a constant integer vector, if the value is one."""
    if value is None or not is_constant(value):
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else [int(element) for element in tensor.numpy().reshape(-1)]


def integers(node: ir.Node, attribute: str, operand: int | None = None) -> list[int] | None:
    """Integers that an op takes as an attribute or, in newer opsets, as a constant operand."""
    if attribute in node.attributes:
        return list(node.attributes[attribute].as_ints())
    if operand is None or operand >= len(node.inputs):
        return None
    return constant_integers(node.inputs[operand])


def sizes(values: Sequence[ir.Value | None], axis: int) -> list[int] | None:
    """The known sizes of an axis of several values; None if any is unknown."""
    found = [static_dim(value, axis) for value in values]
    known = [size for size in found if size is not None]
    return known if len(known) == len(found) else None
