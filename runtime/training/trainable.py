"""Which weights of a model are trained: those of linears, convolutions and norms, and their biases."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import onnx_ir as ir

from ...ir.views import convolutions, linears

Role = Literal["linear", "convolution", "norm", "bias", "embedding"]

_NORMS = frozenset(
    {
        "BatchNormalization",
        "GroupNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "RMSNormalization",
    }
)


@dataclasses.dataclass(frozen=True)
class Weight:
    """A float initializer that training may change.

    Attributes:
        name: the initializer's.
        owner: the path of the module that it belongs to.
        role: what it does; a table that a linear shares is an embedding. BatchNormalization's statistics are
            no weights.
        axis: the axis that a linear's or convolution's weight is summed over first; None for others.
    """

    name: str
    owner: str
    role: Role
    axis: int | None = None


def float_weights(model: ir.Model) -> list[Weight]:
    """The weights of the model's graph, in the order of its nodes, each of them once."""
    found: dict[str, Weight] = {}
    tables = {node.inputs[0] for node in model.graph if node.op_type == "Gather" and node.domain == ""}
    for value, role, axis in _candidates(model):
        if value is None or not _is_float_initializer(value):
            continue
        if value in tables and role != "embedding":
            continue  # found as an embedding
        name = str(value.name)
        found.setdefault(name, Weight(name, name.rpartition(".")[0] or name, role, axis))
    return list(found.values())


def _candidates(model: ir.Model) -> Iterator[tuple[ir.Value | None, Role, int | None]]:
    by_node = {linear.node: linear for linear in linears(model)}
    convolution_of = {convolution.node: convolution for convolution in convolutions(model)}
    for node in model.graph:
        if node in by_node:
            yield by_node[node].weight, "linear", int(by_node[node].transposed)
            yield by_node[node].bias, "bias", None
        elif node in convolution_of:
            yield convolution_of[node].weight, "convolution", 1
            yield convolution_of[node].bias, "bias", None
        elif node.domain == "" and node.op_type in _NORMS:
            yield node.inputs[1], "norm", None
            yield (node.inputs[2] if len(node.inputs) > 2 else None), "norm", None
        elif node.domain == "" and node.op_type == "Gather":
            table = node.inputs[0]
            # Other tables, such as a rotary embedding's sines, are constants.
            if table is not None and str(table.name).endswith(".weight"):
                yield table, "embedding", None


def _is_float_initializer(value: ir.Value) -> bool:
    return (
        value.is_initializer()
        and not value.is_graph_input()
        and value.const_value is not None
        and value.const_value.dtype.is_floating_point()
        and len(value.const_value.shape) > 0
    )
