"""Rules of the ops that move data without computing: reshaping, transposing, joining, cutting, expanding.

A Reshape that splits an axis, [384] → [12, 32], makes structures of the *major* axis: index i of 384 goes
with i // 32 of 12, and the 32 stay. Merging axes, [C, H, W] → [C·H·W], is the same the other way round.
Where single indices are taken of the major axis, as queries, keys and values of [3, 12, 32], the next one
carries the structure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from ..views.values import input_at, integer, is_constant, static_dim
from .facts import (
    Fact,
    constant_integers,
    integers,
    label,
    pairs,
    pin,
    pin_all,
    rank,
    same,
    sizes,
    use,
    width,
)
from .shape_operands import follow_shape_operand

Size = int | str
Matched = tuple[list[int], list[int]]
"""Axes before and after a Reshape that hold the same elements."""


def reshape(node: ir.Node) -> Iterator[Fact]:
    """Reshape, Flatten, Squeeze and Unsqueeze: the shapes say which axes hold the same elements."""
    source, target = node.inputs[0], node.outputs[0]
    assert source is not None
    groups, before, after = _match(_sizes(source), _sizes(target))
    for axes, targets in groups:
        yield from _matched(source, axes, target, targets, node)
    reason = f"{label(node)} mixes it with other axes"
    yield from pin(source, before, reason)
    yield from pin(target, after, reason)
    if node.op_type == "Reshape":
        yield from follow_shape_operand(node)


def _matched(
    source: ir.Value, axes: list[int], target: ir.Value, targets: list[int], node: ir.Node
) -> Iterator[Fact]:
    if len(axes) == 1 and len(targets) == 1:
        yield from same(source, axes[0], target, targets[0])
    elif len(axes) == 1 and targets:
        yield from _split(source, axes[0], target, targets, node)
    elif len(targets) == 1 and axes:
        yield from _split(target, targets[0], source, axes, node)
    else:
        reason = f"{label(node)} mixes it with other axes"
        yield from pin(source, axes, reason)
        yield from pin(target, targets, reason)


def _split(
    whole: ir.Value, axis: int, parts: ir.Value, part_axes: list[int], node: ir.Node
) -> Iterator[Fact]:
    """An axis seen as several: the first one that is not taken apart carries its structure."""
    carrier = next((part for part in part_axes if not _is_taken_apart(parts, part)), part_axes[0])
    inner = math.prod(static_dim(parts, part) or 1 for part in part_axes if part > carrier)
    total, carried = width(whole, axis), width(parts, carrier)
    if total is None or carried is None:
        return
    every = np.arange(total)
    yield pairs(whole, axis, every, parts, carrier, every // inner % carried)
    others = [part for part in part_axes if part != carrier]
    yield from pin(parts, others, f"{label(node)} lays it inside another axis")


def _is_taken_apart(value: ir.Value, axis: int) -> bool:
    """Whether readers take single indices of an axis, as of the 3 in [3, heads, size]."""
    return any(_takes_apart(reader.node, value, axis) for reader in value.uses())


def _takes_apart(node: ir.Node, value: ir.Value, axis: int) -> bool:
    if node.op_type == "Transpose":
        return _is_taken_apart(node.outputs[0], _permutation(node).index(axis))
    if node.op_type == "Gather":
        return (integer(node, "axis") or 0) % rank(value) == axis
    return node.op_type in ("Slice", "Split") and static_dim(node.outputs[0], axis) == 1


def _sizes(value: ir.Value) -> list[Size]:
    """Sizes, and names for those unknown; an unknown size without a name equals no other."""
    assert value.shape is not None
    return [
        dim if isinstance(dim, int) else dim.value or f"{value.name}:{axis}"
        for axis, dim in enumerate(value.shape)
    ]


def _match(source: Sequence[Size], target: Sequence[Size]) -> tuple[list[Matched], list[int], list[int]]:
    """Groups of axes with equal products from either end, and the axes in the middle that are left over."""
    before = [axis for axis, size in enumerate(source) if size != 1]
    after = [axis for axis, size in enumerate(target) if size != 1]
    groups: list[Matched] = []
    for direction in (1, -1):
        while before and after:
            taken = _first_group(source, before[::direction], target, after[::direction])
            if taken is None:
                break
            groups.append((sorted(taken[0]), sorted(taken[1])))
            before = [axis for axis in before if axis not in taken[0]]
            after = [axis for axis in after if axis not in taken[1]]
    return groups, before, after


def _first_group(
    source: Sequence[Size], before: list[int], target: Sequence[Size], after: list[int]
) -> Matched | None:
    if source[before[0]] == target[after[0]]:
        return [before[0]], [after[0]]
    left = right = 1
    i = j = 0
    while True:
        # Take a further axis on the side whose product is behind.
        take_source = i == 0 or (j > 0 and left < right)
        axes, values, position = (before, source, i) if take_source else (after, target, j)
        size = values[axes[position]] if position < len(axes) else None
        if not isinstance(size, int):
            return None
        if take_source:
            left, i = left * size, i + 1
        else:
            right, j = right * size, j + 1
        if left == right and j:
            return before[:i], after[:j]


def transpose(node: ir.Node) -> Iterator[Fact]:
    """The axes change places."""
    source, target = node.inputs[0], node.outputs[0]
    assert source is not None
    for position, axis in enumerate(_permutation(node)):
        yield from same(source, axis, target, position)


def _permutation(node: ir.Node) -> list[int]:
    source = node.inputs[0]
    assert source is not None
    return integers(node, "perm") or list(reversed(range(rank(source))))


def concat(node: ir.Node) -> Iterator[Fact]:
    """Along the joined axis the inputs follow one another."""
    yield from _joined(node.outputs[0], node.inputs, integer(node, "axis") or 0, node)


def split(node: ir.Node) -> Iterator[Fact]:
    """Along the cut axis the outputs follow one another."""
    yield from _joined(node.inputs[0], node.outputs, integer(node, "axis") or 0, node)
    given = input_at(node, 1)
    if given is not None and not is_constant(given):
        yield from pin(node.inputs[0], [integer(node, "axis") or 0], f"{label(node)} computes where it cuts")


def _joined(
    whole: ir.Value | None, parts: Sequence[ir.Value | None], axis: int, node: ir.Node
) -> Iterator[Fact]:
    assert whole is not None
    axis %= rank(whole)
    for other in range(rank(whole)):
        if other != axis:
            for part in parts:
                yield from same(whole, other, part, other)
    lengths = sizes(parts, axis)
    total = static_dim(whole, axis)
    if lengths is None or total != sum(lengths):
        for value in (whole, *parts):
            yield from pin(value, [axis], f"{label(node)} cuts or joins it at places that are not known")
        return
    start = 0
    for part, length in zip(parts, lengths, strict=True):
        if part is not None and length > 0:
            indices = np.arange(length)
            if length == 1:
                # A single index cannot be followed further, and an axis must not become empty.
                yield from pin(whole, [axis], f"'{part.name}' is a single index of it")
            else:
                yield pairs(part, axis, indices, whole, axis, indices + start)
        start += length


def split_to_sequence(node: ir.Node) -> Iterator[Fact]:
    """Followed where the parts are taken out of the sequence, by a number known beforehand."""
    source, axis = node.inputs[0], integer(node, "axis") or 0
    if part_sizes(node) is None:
        yield from pin(source, [axis], f"{label(node)} computes where it cuts")
    for reader in node.outputs[0].uses():
        if part_number(reader.node) is None:
            yield from pin_all([source], f"{label(node)} makes a sequence that {label(reader.node)} reads")


def sequence_at(node: ir.Node) -> Iterator[Fact]:
    """One part of a value that SplitToSequence cut."""
    cut, number, target = node.inputs[0], part_number(node), node.outputs[0]
    splitter = None if cut is None else cut.producer()
    if splitter is None or splitter.op_type != "SplitToSequence" or number is None:
        yield from pin(target, range(rank(target)), f"{label(node)} reads a sequence of unknown origin")
        return
    source, lengths = splitter.inputs[0], part_sizes(splitter)
    assert source is not None
    axis = (integer(splitter, "axis") or 0) % rank(source)
    for other in range(rank(source)):
        if other != axis:
            yield from same(source, other, target, other)
    length = width(target, axis)
    if lengths is None or length is None:
        yield from pin(target, [axis], f"{label(splitter)} computes where it cuts")
        return
    start = sum(lengths[:number])
    yield pairs(target, axis, np.arange(length), source, axis, np.arange(start, start + length))


def part_sizes(splitter: ir.Node) -> list[int] | None:
    """How long the parts are that a SplitToSequence makes; None if they are computed or drop their axis."""
    source, axis = splitter.inputs[0], integer(splitter, "axis") or 0
    total, lengths = static_dim(source, axis), constant_integers(input_at(splitter, 1))
    if total is None or not lengths:
        return None
    operand = splitter.inputs[1]
    if operand is not None and operand.shape is not None and len(operand.shape) == 0:
        lengths = [min(lengths[0], total - start) for start in range(0, total, lengths[0])]
    return lengths


def part_number(reader: ir.Node) -> int | None:
    """Which part a SequenceAt takes."""
    found = constant_integers(input_at(reader, 1)) if reader.op_type == "SequenceAt" else None
    return found[0] if found and found[0] >= 0 else None


def slice_(node: ir.Node) -> Iterator[Fact]:
    """Along a cut axis, every index goes with the one that it was; the other axes stay the same."""
    source, target = node.inputs[0], node.outputs[0]
    assert source is not None
    cuts = slice_cuts(node)
    for axis in range(rank(source)):
        if cuts is None:
            yield from pin_all([source, target], f"{label(node)} cuts at places that are computed")
            return
        if axis not in cuts:
            yield from same(source, axis, target, axis)
            continue
        start, step = cuts[axis]
        length = width(target, axis)
        if step != 1 or length is None or width(source, axis) is None:
            yield from pin(source, [axis], f"{label(node)} takes single indices of it")
            yield from pin(target, [axis], f"{label(node)} takes single indices of it")
            continue
        yield pairs(target, axis, np.arange(length), source, axis, np.arange(start, start + length))


def slice_cuts(node: ir.Node) -> dict[int, tuple[int, int]] | None:
    """The axes that a Slice cuts, with the first index and the step; None if they are computed."""
    source = node.inputs[0]
    assert source is not None
    starts, axes = constant_integers(input_at(node, 1)), constant_integers(input_at(node, 3))
    steps = constant_integers(input_at(node, 4))
    if input_at(node, 3) is None:
        axes = None if starts is None else list(range(len(starts)))
    if axes is None:
        return None
    if starts is None or (input_at(node, 4) is not None and steps is None):
        # Which axes are cut is known, where is not: fine as long as their sizes are not known either.
        if any(width(source, axis) is not None for axis in axes):
            return None
        return {axis % rank(source): (0, 0) for axis in axes}
    cuts: dict[int, tuple[int, int]] = {}
    for position, axis in enumerate(axes):
        size = static_dim(source, axis) or 0
        start = starts[position]
        start = max(start + size, 0) if start < 0 else min(start, size)
        cuts[axis % rank(source)] = (start, 1 if steps is None else steps[position])
    return cuts


def pad(node: ir.Node) -> Iterator[Fact]:
    """Padded axes stay; the others are the same before and after."""
    source, target = node.inputs[0], node.outputs[0]
    assert source is not None
    pads = constant_integers(input_at(node, 1))
    axes = constant_integers(input_at(node, 3))
    if pads is None or (input_at(node, 3) is not None and axes is None):
        yield from pin_all([source, target], f"{label(node)} computes its padding")
        return
    padded = axes if axes is not None else list(range(rank(source)))
    changed = {
        axis % rank(source)
        for position, axis in enumerate(padded)
        if pads[position] or pads[position + len(padded)]
    }
    for axis in range(rank(source)):
        if axis in changed:
            yield from pin(source, [axis], f"{label(node)} pads it")
            yield from pin(target, [axis], f"{label(node)} pads it")
        else:
            yield from same(source, axis, target, axis)


def expand(node: ir.Node) -> Iterator[Fact]:
    """Axes that are not repeated stay the same."""
    source, target = node.inputs[0], node.outputs[0]
    assert source is not None
    for axis in range(-min(rank(source), rank(target)), 0):
        yield from same(source, axis, target, axis)
    yield from follow_shape_operand(node)


def tile(node: ir.Node) -> Iterator[Fact]:
    """Axes that are repeated stay; the others are the same."""
    source, target = node.inputs[0], node.outputs[0]
    assert source is not None
    repeats = constant_integers(input_at(node, 1))
    for axis in range(rank(source)):
        if repeats is not None and repeats[axis] == 1:
            yield from same(source, axis, target, axis)
        else:
            yield from pin(source, [axis], f"{label(node)} repeats it")
            yield from pin(target, [axis], f"{label(node)} repeats it")


def gather(node: ir.Node) -> Iterator[Fact]:
    """Rows are looked up: the axis that they lie along stays, the axes of a row are the same."""
    table, indices, target = node.inputs[0], node.inputs[1], node.outputs[0]
    assert table is not None
    assert indices is not None
    axis = (integer(node, "axis") or 0) % rank(table)
    yield from pin(table, [axis], f"{label(node)} looks it up by index")
    for position in range(rank(indices)):
        yield from same(indices, position, target, axis + position)
    for other in range(rank(table)):
        if other != axis:
            position = other if other < axis else other + rank(indices) - 1
            yield from same(table, other, target, position)
            yield from use(table, other, "producer")


def gather_nd(node: ir.Node) -> Iterator[Fact]:
    """Rows are looked up by several indices: the axes that those run along stay."""
    table, indices, target = node.inputs[0], node.inputs[1], node.outputs[0]
    assert table is not None
    assert indices is not None
    depth = static_dim(indices, -1)
    if integer(node, "batch_dims") or depth is None:
        yield from pin_all([table, target], f"{label(node)} looks it up batch by batch")
        return
    yield from pin(table, range(depth), f"{label(node)} looks it up by index")
    for position in range(rank(indices) - 1):
        yield from same(indices, position, target, position)
    for other in range(depth, rank(table)):
        yield from same(table, other, target, other - depth + rank(indices) - 1)
        yield from use(table, other, "producer")
