"""Running a graph for its values: no graph optimisation, any intermediate tensor as an output.

What checks and comparisons run. Speed does not matter here; that onnxruntime changes nothing does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from ..ir import clone
from ..ir.errors import InputError
from ..ir.walk import subgraphs_of
from .session import open_session, run_session, serialize_sharing_weights

Array = np.ndarray[Any, Any]


class ReferenceSession:
    """A graph as onnxruntime's CPU kernels run it node by node, without graph optimisation.

    Args:
        model: the graph; not changed. Functions (the ``planish`` domain) are inlined by onnxruntime.
        outputs: names of the tensors to compute, intermediate ones of the main graph included; only what
            they depend on is run. The graph's own outputs when absent.

    Raises:
        TargetError: onnxruntime rejects the graph.
        InputError: the graph has no tensor of a name in ``outputs``.
    """

    def __init__(self, model: ir.Model, outputs: Sequence[str] | None = None) -> None:
        if outputs is not None:
            model = _with_outputs(model, outputs)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        serialized, _weights = serialize_sharing_weights(model, options)
        self._session = open_session(serialized, options)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Any]:
        """Run once; arrays in, arrays out (a list of arrays for a sequence output), by name.

        Raises:
            InputError: an input is missing, unknown or of the wrong type, or onnxruntime fails on it.
        """
        return run_session(self._session, feeds)


def run_model(
    model: ir.Model, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
) -> dict[str, Any]:
    """Run a graph once, see `ReferenceSession`."""
    return ReferenceSession(model, outputs).run(feeds)


def _with_outputs(model: ir.Model, outputs: Sequence[str]) -> ir.Model:
    """A copy that computes ``outputs`` and nothing that they do not need."""
    copy = clone(model)
    graph = copy.graph
    values = {value.name: value for node in graph for value in node.outputs}
    values.update({value.name: value for value in (*graph.inputs, *graph.initializers.values())})
    unknown = [name for name in outputs if name not in values]
    if unknown:
        raise InputError(f"the graph has no tensor {unknown[0]!r}")
    graph.outputs[:] = [values[name] for name in outputs]
    # Nodes go, outputs of the nodes that stay do not: some kernels want their optional outputs together.
    needed = ancestors(graph.outputs)
    unneeded = [node for node in graph if node not in needed]
    for inner in (inner for node in unneeded for body in subgraphs_of(node) for inner in body.all_nodes()):
        for index in range(len(inner.inputs)):
            inner.replace_input_with(index, None)  # what it captures is no longer used by it
    graph.remove(unneeded, safe=True)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        if not graph.initializers[name].is_graph_output():
            del graph.initializers[name]
    return copy


def ancestors(values: Iterable[ir.Value]) -> set[ir.Node]:
    """The nodes that values depend on, those that feed subgraphs from outside included."""
    pending = [node for value in values if (node := value.producer()) is not None]
    seen: set[ir.Node] = set(pending)
    while pending:
        node = pending.pop()
        for before in _predecessors(node):
            if before not in seen:
                seen.add(before)
                pending.append(before)
    return seen


def _predecessors(node: ir.Node) -> Iterator[ir.Node]:
    yield from node.predecessors()
    for attribute in node.attributes.values():
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            graphs = [attribute.value] if attribute.type == ir.AttributeType.GRAPH else attribute.value
            for graph in graphs:
                for inner in graph.all_nodes():
                    yield from inner.predecessors()
                for value in graph.outputs:
                    if (producer := value.producer()) is not None:
                        yield producer
