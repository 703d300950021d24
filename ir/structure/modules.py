"""Residual modules: whole branches ``x + f(x)`` that can be dropped, and the nodes that then nobody needs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from ..views import Block, blocks
from ..views.values import is_constant
from .groups import ChannelGroup, ModuleKind, ResidualModule
from .names import common_path, unique

_LAYER_NUMBER = re.compile(r"(.*?\.)?\d+(?=\.|$)")
"""A module path up to its first number, such as ``model.layers.3``."""


def residual_modules(model: ir.Model, groups: Sequence[ChannelGroup]) -> tuple[ResidualModule, ...]:
    """The blocks of the residual stream, with the channel groups that lie inside each."""
    position = {node: index for index, node in enumerate(model.graph)}
    modules: list[ResidualModule] = []
    for block in blocks(model):
        nodes = sorted({block.add, *unneeded_without([(block.add, block.branch)])}, key=position.__getitem__)
        outputs = [node.outputs[0].name or "" for node in nodes]
        inside = frozenset(outputs)
        held = [group for group in groups if group.nodes and inside.issuperset(group.nodes)]
        modules.append(
            ResidualModule(
                name=held[0].name if len(held) == 1 else _path(nodes),
                kind=_kind(block),
                input=block.input.name or "",
                output=block.output.name or "",
                branch=block.branch.name or "",
                nodes=tuple(outputs),
                groups=tuple(group.name for group in held),
            )
        )
    names = unique([module.name for module in modules])
    return tuple(dataclasses.replace(module, name=name) for module, name in zip(modules, names, strict=True))


def _path(nodes: Sequence[ir.Node]) -> str:
    mixing = [node for node in nodes if node.op_type in ("Conv", "Gemm", "MatMul")]
    tensors = [
        value.name
        for node in mixing or nodes
        for value in node.inputs
        if value is not None and value.name and is_constant(value)
    ]
    return common_path(tensors) or nodes[-1].outputs[0].name or ""


def _kind(block: Block) -> ModuleKind:
    if block.has_attention:
        return "attention"
    if any(node.op_type == "Conv" for node in block.nodes):
        return "convolution"
    return "ffn" if block.linears else "other"


def layers_of(modules: Sequence[ResidualModule]) -> list[list[ResidualModule]]:
    """The modules by layer, in the order of the graph.

    A layer begins where the first number in the modules' names changes, and with an attention that follows
    something else: so self-attention, cross-attention and FFN are one layer, whatever the names are.
    """
    layers: list[list[ResidualModule]] = []
    for module in modules:
        before = layers[-1][-1] if layers else None
        if before is None or _begins_layer(module, before):
            layers.append([])
        layers[-1].append(module)
    return layers


def _begins_layer(module: ResidualModule, before: ResidualModule) -> bool:
    numbers = [_LAYER_NUMBER.match(name) for name in (module.name, before.name)]
    if all(numbers) and len({number.group() for number in numbers if number}) == 2:
        return True
    return module.kind == "attention" and before.kind != "attention"


def unneeded_without(branches: Iterable[tuple[ir.Node, ir.Value]]) -> set[ir.Node]:
    """The nodes that nobody needs once these residual Adds no longer read these branches.

    An attention whose result is not needed is not kept for the sake of its cache.
    """
    cut = list(branches)
    unneeded: set[ir.Node] = set()
    waiting = [branch for _, branch in cut]
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in unneeded or _is_needed(node, unneeded, cut):
            continue
        unneeded.add(node)
        waiting.extend(value for value in node.inputs if value is not None)
    return unneeded


def _is_needed(node: ir.Node, unneeded: set[ir.Node], cut: Sequence[tuple[ir.Node, ir.Value]]) -> bool:
    outputs = node.outputs[:1] if node.op_type == "Attention" else node.outputs
    return any(
        value.is_graph_output()
        or any(use.node not in unneeded and (use.node, value) not in cut for use in value.uses())
        for value in outputs
    ) or any(use.node not in unneeded for value in node.outputs[len(outputs) :] for use in value.uses())
