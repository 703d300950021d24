"""Layers of a model that are alike: what is planned for one of them is planned for all."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from ..ir.structure import ResidualModule, layers_of
from ..ir.structure.modules import residual_modules
from ..ir.views.values import is_constant
from ..passes.infrastructure.patterns import matches
from ..passes.infrastructure.pipeline import Pipeline

_NUMBER = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class AlikeLayers:
    """Layers that differ in the numbers in their weights and in nothing else.

    Attributes:
        layers: their residual modules, layer by layer in the order of the graph.
        name: of the first module of the first of them, which no other kind has.
    """

    layers: tuple[tuple[ResidualModule, ...], ...]
    name: str

    def __len__(self) -> int:
        return len(self.layers)


def alike_layers(model: ir.Model, pipeline: Pipeline) -> list[AlikeLayers]:
    """The layers of a model in canonical form by what a pipeline can tell apart without their weights.

    Two layers are alike if they have the same ops with the same attributes on weights of the same shapes, and
    if every pattern among the options of the pipeline (``ignore=[re:.*layers.0.*]``) means the same of them.
    """
    patterns = sorted(set(_texts([pass_.changed_options() for pass_ in pipeline])))
    makers = {output.name: node for node in model.graph for output in node.outputs}
    found: dict[object, list[tuple[ResidualModule, ...]]] = {}
    for layer in layers_of(residual_modules(model, ())):
        nodes = [makers[name] for module in layer for name in module.nodes]
        found.setdefault(_make_up(nodes, patterns), []).append(tuple(layer))
    return [AlikeLayers(tuple(layers), layers[0][0].name) for layers in found.values()]


def starred(name: str) -> str:
    """A name with ``*`` for its first number, which is mostly that of the layer: ``model.layers.*.mlp``."""
    return _NUMBER.sub("*", name, count=1)


def _make_up(nodes: Sequence[ir.Node], patterns: Sequence[str]) -> object:
    return tuple(
        (
            node.op_identifier(),
            tuple(sorted((name, _plain(attribute)) for name, attribute in node.attributes.items())),
            tuple(_operand(value, patterns) for value in node.inputs),
        )
        for node in nodes
    )


def _plain(attribute: ir.Attr) -> str:
    """An attribute as text; a tensor by what it looks like, because reading it would read weights."""
    value = attribute.value
    return f"{value.dtype}{value.shape}" if isinstance(value, ir.TensorProtocol) else repr(value)


def _operand(value: ir.Value | None, patterns: Sequence[str]) -> object:
    if value is None or not is_constant(value):
        return value is not None
    owner = str(value.name).rpartition(".")[0]
    return (str(value.dtype), str(value.shape), tuple(matches(owner, [pattern]) for pattern in patterns))


def _texts(value: Any) -> Iterator[str]:
    """All texts in the options of a pass, whatever holds them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts(value.values())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _texts(vars(value))
    elif isinstance(value, Iterable):
        for item in value:
            yield from _texts(item)
