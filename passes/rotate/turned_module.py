"""A lowered model that takes its rotations as arguments and rounds activations: for learning them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import onnx_ir as ir
import torch
from torch import fx

from ...codegen.torch_fx import VALUE_KEY, lower
from ...ir.views import Linear, linears
from .heads import Indices
from .vectors import Vector


@dataclasses.dataclass(frozen=True)
class Turn:
    """One rotation to learn, and the constants whose vectors it multiplies.

    Attributes:
        label: that of the `Change` that makes it: ``R1 model.embed_tokens``.
        size: the rotation's order.
        operands: constants, and which channels of their vectors are turned: [heads, size], or all (None).
    """

    label: str
    size: int
    operands: tuple[tuple[Vector, Indices | None], ...]


def turned_module(
    model: ir.Model,
    turns: Sequence[Turn],
    *,
    activation_bits: int,
    weight_bits: int | None,
    ignore: Collection[str],
    output: str,
) -> fx.GraphModule:
    """Lower ``model`` to float32 with an argument more, ``rotation_0`` …, for each of ``turns`` in order.

    Args:
        model: not changed.
        turns: rotations; each multiplies the vectors of its constants on their way to where they are read.
        activation_bits: inputs of linears are rounded to so many bits, see `round_symmetrically`.
        weight_bits: weights of linears, turned, are rounded too, per output channel; None: they are not.
        ignore: names of linears that are left alone.
        output: the graph output to return; what it does not need is not computed.
    """
    module = lower(model, dtype=torch.float32)
    by_value = {node.meta[VALUE_KEY]: node for node in module.graph.nodes if VALUE_KEY in node.meta}
    turned = _turn_constants(module, turns, by_value)
    rounded = [linear for linear in linears(model) if linear.name not in ignore]
    _round_inputs(module, rounded, by_value, activation_bits)
    if weight_bits is not None:
        _round_weights(module, rounded, by_value | turned, weight_bits)
    (result,) = (node for node in module.graph.nodes if node.op == "output")
    result.args = ({output: result.args[0][output]},)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def turn_vectors(
    weight: torch.Tensor, matrix: torch.Tensor, axis: int, channels: torch.Tensor | None = None
) -> torch.Tensor:
    """The vectors of ``weight`` along ``axis`` times ``matrix``: whole, or at each row of ``channels``."""
    vectors = weight.movedim(axis, -1)
    if channels is None:
        return (vectors @ matrix).movedim(-1, axis)
    flat = channels.reshape(-1)
    parts = vectors[..., flat].reshape(*vectors.shape[:-1], *channels.shape)
    turned = (parts @ matrix).reshape(*vectors.shape[:-1], -1)
    result: torch.Tensor = vectors.index_copy(-1, flat, turned)
    return result.movedim(-1, axis)


def round_symmetrically(x: torch.Tensor, bits: int, axis: int = -1) -> torch.Tensor:
    """x on a symmetric grid of 2ᵇ − 1 integers for each vector along ``axis``; the gradient is that of x."""
    levels = 2 ** (bits - 1) - 1
    values = x.detach()
    # A vector of zeros has any grid, but for that of step 0.
    step = (values.abs().amax(axis, keepdim=True) / levels).clamp(min=torch.finfo(x.dtype).tiny)
    result: torch.Tensor = x + (torch.round(values / step) * step - values)
    return result


def _turn_constants(
    module: fx.GraphModule, turns: Sequence[Turn], by_value: dict[str, fx.Node]
) -> dict[str, fx.Node]:
    """Put the rotations between constants and their readers; returns what is read now, by constant."""
    graph = module.graph
    first = next(iter(graph.nodes))
    turned: dict[str, fx.Node] = {}
    for number, turn in enumerate(turns):
        with graph.inserting_before(first):
            matrix = graph.placeholder(f"rotation_{number}")
        for vector, channels in turn.operands:
            before = turned.get(vector.name) or by_value[vector.name]
            readers = list(before.users)
            with graph.inserting_before(before.next):
                where = None if channels is None else _add_buffer(module, channels)
                after = graph.call_function(turn_vectors, (before, matrix, vector.axis, where))
            for reader in readers:
                reader.replace_input_with(before, after)
            turned[vector.name] = after
    return turned


def _add_buffer(module: fx.GraphModule, channels: Indices) -> fx.Node:
    # Numbered: a constant's name may hold anything, and the target becomes a part of the module's source.
    target = f"planish_heads_{len(list(module.buffers()))}"
    module.register_buffer(target, torch.from_numpy(channels))
    return module.graph.get_attr(target)


def _round_inputs(
    module: fx.GraphModule, rounded: Sequence[Linear], by_value: dict[str, fx.Node], bits: int
) -> None:
    """Linears that read the same value read the same rounded one."""
    done: dict[fx.Node, fx.Node] = {}
    for linear in rounded:
        product = by_value[str(linear.node.outputs[0].name)]
        source = product.args[0]
        assert isinstance(source, fx.Node)
        if source not in done:
            with module.graph.inserting_after(source):
                done[source] = module.graph.call_function(round_symmetrically, (source, bits))
        product.update_arg(0, done[source])


def _round_weights(
    module: fx.GraphModule, rounded: Sequence[Linear], current: dict[str, fx.Node], bits: int
) -> None:
    for linear in rounded:
        product = current[str(linear.node.outputs[0].name)]
        weight = product.args[1]
        assert isinstance(weight, fx.Node)
        axis = -1 if linear.transposed else 0
        with module.graph.inserting_after(weight):
            product.update_arg(1, module.graph.call_function(round_symmetrically, (weight, bits, axis)))
