"""Rotations of other positions than the decoder's own, as a graph: its computation of angles, copied."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from ....ir.errors import PassError
from ....ir.graph_builder import GraphBuilder
from ....ir.views.values import input_at

_POSITIONS = "position_ids"


def angles(build: GraphBuilder, rotary: ir.Node, positions: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Cosines and sines [batch, length, size / 2] of positions [batch, length] int64.

    Args:
        build: takes the nodes.
        rotary: a RotaryEmbedding of the decoder; what computes its cosines and sines is copied.
        positions: any.

    Raises:
        PassError: they depend on something else than ``position_ids``.
    """
    copied: dict[ir.Value, ir.Value] = {}
    found = []
    for index in (1, 2):
        value = rotary.inputs[index]
        assert value is not None
        angle = _copied(build, value, positions, copied)
        if input_at(rotary, 3) is not None:
            angle = build.op("Gather", angle, positions, axis=0)
        found.append(angle)
    return found[0], found[1]


def mean_rotation(
    build: GraphBuilder, rotary: ir.Node, seen: ir.Value, future: int
) -> tuple[ir.Value, ir.Value]:
    """Mean cosines and sines [1, 1, size / 2] of the ``future`` positions from ``seen`` [] int64 on."""
    one = build.constant(np.array(1, np.int64), "one")
    count = build.constant(np.array(future, np.int64), "future")
    first_axis = build.constant(np.array([0]), "first_axis")
    length_axis = build.constant(np.array([1]), "length_axis")
    row = build.op("Range", seen, build.op("Add", seen, count), one)
    cosines, sines = angles(build, rotary, build.op("Unsqueeze", row, first_axis))
    return (
        build.op("ReduceMean", cosines, length_axis, keepdims=1),
        build.op("ReduceMean", sines, length_axis, keepdims=1),
    )


def turned(build: GraphBuilder, rotary: ir.Node, keys: ir.Value, steps: ir.Value, *, size: int) -> ir.Value:
    """Rotated keys [batch, heads, kept, size], each turned on by its number of steps [batch, heads, kept].

    Rotations add up where angles are proportional to positions: R(p + s) = R(s) R(p).
    """
    cosines, sines = angles(build, rotary, build.op("Flatten", steps, axis=2))
    length = build.op("Shape", keys, start=2, end=3)
    one_head = build.op(
        "Concat",
        build.constant(np.array([-1, 1]), "one_head"),
        length,
        build.constant(np.array([size]), "size"),
        axis=0,
    )
    moved = build.op(
        "RotaryEmbedding",
        build.op("Reshape", keys, one_head),
        cosines,
        sines,
        **rotation_attributes(rotary),
    )
    return build.op("Reshape", moved, build.op("Shape", keys))


def rotation_attributes(rotary: ir.Node) -> dict[str, Any]:
    """Of a RotaryEmbedding, for one on [batch, heads, length, size]."""
    return {name: attribute for name, attribute in rotary.attributes.items() if name != "num_heads"}


def is_plain(rotary: ir.Node) -> bool:
    """Whether it turns and does not scale: its cosines are cosines, not multiples of them."""
    for index, op_type in ((1, "Cos"), (2, "Sin")):
        value = rotary.inputs[index]
        node = None if value is None else value.producer()
        if node is None or node.op_type != op_type:
            return False
    return True


def _copied(
    build: GraphBuilder, value: ir.Value, positions: ir.Value, copied: dict[ir.Value, ir.Value]
) -> ir.Value:
    """The value as computed from other positions."""
    if value.name == _POSITIONS and value.is_graph_input():
        return positions
    if value in copied:
        return copied[value]
    node = value.producer()
    if node is None:
        copied[value] = _constant(build, value)
        return copied[value]
    inputs = [
        None if operand is None else _copied(build, operand, positions, copied) for operand in node.inputs
    ]
    new = ir.node(
        node.op_type,
        inputs,
        dict(node.attributes),
        domain=node.domain,
        num_outputs=len(node.outputs),
        name=f"{build.layer}.{node.name}.{len(build.nodes)}",
    )
    build.nodes.append(new)
    copied.update(zip(node.outputs, new.outputs, strict=True))
    return copied[value]


def _constant(build: GraphBuilder, value: ir.Value) -> ir.Value:
    if value.const_value is None:
        raise PassError(
            f"evict: the rotation of keys depends on {value.name!r}, and position_ids alone were expected"
        )
    name = f"{build.layer}.{value.name}"
    known = next((other for other in build.initializers if other.name == name), None)
    if known is not None:
        return known
    new = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
    build.initializers.append(new)
    return new
