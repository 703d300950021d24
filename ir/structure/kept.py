"""Which indices stay along the axes that shrink."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from .groups import Indices


class Kept:
    """What stays of the values of a graph, asked by value and axis."""

    def __init__(self, graph: ir.Graph, axes: Mapping[str, Mapping[int, Indices]]) -> None:
        self._graph = graph
        self._axes = axes

    def axes(self, value: ir.Value | None) -> Mapping[int, Indices]:
        """The indices that stay along every axis of the value that shrinks."""
        return self._axes.get(value.name or "", {}) if value is not None else {}

    def size(self, value: ir.Value | None, axis: int) -> int | None:
        """The new size of an axis, None if it does not shrink."""
        indices = self.axes(value).get(axis)
        return None if indices is None else len(indices)

    def values(self) -> Iterator[ir.Value]:
        """Every value that shrinks, each once."""
        found = dict.fromkeys((*self._graph.inputs, *self._graph.initializers.values()))
        found.update((value, None) for node in self._graph for value in node.outputs)
        return (value for value in found if value.name in self._axes)
