"""Computes once what a lowered module computes from shapes and weights alone, for inputs of one shape.

    Range(0, Shape(x)[1], 1)              → a buffer
    Reshape(y, Concat(Shape(x), [4, 8]))  → Reshape(y, [2, 7, 4, 8])

What is left asks no tensor for its shape or its numbers, so that a CUDA graph can capture it. Results of more
than a million numbers are left to be computed, for memory's sake.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from .module_names import ModuleNames
from .registry import Registry, is_list
from .shape import shape_of, size_of

_OF_SHAPES = (shape_of, size_of)
"""Functions whose results are the same for all inputs of one shape."""
_MOST_NUMBERS = 1 << 20


def freeze(
    module: fx.GraphModule, arguments: Mapping[str, Any], registry: Registry
) -> tuple[fx.GraphModule, dict[str, torch.Tensor]]:
    """A module that computes the same for all inputs of these shapes, and what it computes for these.

    Args:
        module: lowered; its weights are shared.
        arguments: of its ``forward``, which runs once.
        registry: entries of its functions.
    """
    recorder = _Recorder(module)
    with torch.no_grad():
        outputs: dict[str, torch.Tensor] = recorder.run(
            *(arguments[node.target] for node in module.graph.find_nodes(op="placeholder"))
        )
    writer = _Writer(module, recorder.constants, registry)
    return writer.write(), outputs


class _Recorder(fx.Interpreter):
    """Runs a module and keeps what is the same for all inputs of these shapes."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.constants: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        computed = n.op in ("call_function", "call_method") and (
            n.target in _OF_SHAPES or all(operand in self.constants for operand in n.all_input_nodes)
        )
        if n.op == "get_attr" or (computed and _numbers(result) <= _MOST_NUMBERS):
            self.constants[n] = result
        return result


def _numbers(result: Any) -> int:
    parts = result if isinstance(result, tuple | list) else (result,)
    return sum(part.numel() for part in parts if isinstance(part, torch.Tensor))


class _Writer:
    """Writes a graph anew with constants in the place of what computed them."""

    def __init__(self, module: fx.GraphModule, constants: Mapping[fx.Node, Any], registry: Registry) -> None:
        self._module, self._constants = module, constants
        entries = registry.values()
        self._integers: dict[Any, tuple[int, ...]] = {entry.function: entry.integers for entry in entries}
        self._tensors: dict[str, torch.Tensor] = dict(module.named_buffers(remove_duplicate=False))
        self._tensors.update(module.named_parameters(remove_duplicate=False))
        self._names = ModuleNames()
        for name in self._tensors:
            self._names.add(name)
        self._graph = fx.Graph()
        self._copies: dict[fx.Node, Any] = {}

    def write(self) -> fx.GraphModule:
        for node in self._module.graph.nodes:
            if node not in self._constants:
                copy = self._graph.node_copy(node, self._in_graph)
                copy.args = self._with_integers(node, copy)
                self._copies[node] = copy
        read = {node.target for node in self._graph.find_nodes(op="get_attr")}
        tensors = {name: tensor for name, tensor in self._tensors.items() if name in read}
        result = fx.GraphModule(tensors, self._graph, class_name=f"Frozen{type(self._module).__name__}")
        result.meta.update(self._module.meta)
        return result

    def _with_integers(self, node: fx.Node, copy: fx.Node) -> tuple[Any, ...]:
        """Operands that say something about shapes are numbers."""
        arguments = list(copy.args)
        for position in self._integers.get(node.target, ()):
            operand = node.args[position] if position < len(arguments) else None
            value = self._constants.get(operand) if isinstance(operand, fx.Node) else None
            if isinstance(value, torch.Tensor) and is_list(value.shape):
                arguments[position] = value.tolist()
        return tuple(arguments)

    def _in_graph(self, operand: fx.Node) -> Any:
        if operand not in self._copies:
            value = self._constants[operand]
            name = operand.target if operand.op == "get_attr" else self._names.add(operand.name)
            if isinstance(value, torch.Tensor):
                self._tensors[str(name)] = value
                self._copies[operand] = self._graph.get_attr(str(name))
            else:
                self._copies[operand] = value
        return self._copies[operand]
