"""A stretch of a graph as a model of its own: what it reads from before becomes its inputs."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from .clone import clone
from .errors import InputError
from .walk import values_read


def window(model: ir.Model, start: int, stop: int, outputs: Sequence[str] | None = None) -> ir.Model:
    """The nodes from ``start`` to ``stop`` of the main graph, those that the outputs do not need left out.

    Args:
        model: not changed; its weights are shared.
        start: position of the first node in the graph's order.
        stop: position behind the last.
        outputs: names of values that these nodes compute; by default all that nodes behind them read, and
            the graph's own outputs among them.

    Raises:
        InputError: the nodes compute no such value.
    """
    nodes = list(model.graph)
    made = {value for node in nodes[start:stop] for value in node.outputs}
    read_later = {value for node in nodes[stop:] for value in values_read(node)}
    wanted = [
        value
        for node in nodes[start:stop]
        for value in node.outputs
        if (value.name in outputs if outputs is not None else value in read_later or value.is_graph_output())
    ]
    if not wanted:
        raise InputError("nothing reads what these nodes compute")
    read = dict.fromkeys(value for node in nodes[start:stop] for value in values_read(node))
    inputs = [value for value in read if value not in made and not value.is_initializer()]
    graph = ir.convenience.extract(model.graph, inputs, wanted)
    used = {value.name for value in graph.inputs if value.uses() or value.is_graph_output()}
    graph.inputs[:] = [value for value in graph.inputs if value.name in used]
    return clone(
        ir.Model(
            graph,
            ir_version=model.ir_version,
            producer_name=model.producer_name,
            producer_version=model.producer_version,
            functions=tuple(model.functions.values()),
        )
    )
