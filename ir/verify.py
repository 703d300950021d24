"""The structural rules of the IR, checked in milliseconds so that they can be checked after every pass.

Rules, for the model's graph, its subgraphs and its functions:

- every value is defined before it is used, in the same graph or in one around it;
- names are unique within a graph and the graphs around it;
- a value's list of uses is exactly the inputs that read it, so that passes may rely on it;
- an initializer is registered under its own name, has data, and its shape and dtype are the data's;
- graph outputs are produced; every node belongs to the graph that it is in;
- the domain of every node is imported, and nodes of the ``planish`` domain call a function of the model, with
  its arity and required attributes.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from .errors import VerificationError
from .printer import format_node
from .walk import root_graphs, subgraphs_of

PLANISH_DOMAIN = "planish"

_NODES_AROUND = 3
"""How many nodes before and after the offending one an error shows."""
_LONGEST_LINE = 500
"""Characters that it shows of each."""


def verify(model: ir.Model) -> None:
    """Check that ``model`` obeys the structural rules of the IR.

    Raises:
        VerificationError: names the node and the rule; the nodes around it are in the error's ``__notes__``.
    """
    for function in model.functions.values():
        if function.graph.initializers:
            raise VerificationError(
                f"function {function.domain}::{function.name} owns initializers",
                hint="use Constant nodes in it",
            )
    verifiers = [_Verifier(model, root) for root in root_graphs(model)]
    for verifier in verifiers:
        verifier.check_graphs()
    for verifier in verifiers:
        verifier.check_uses()


class _Verifier:
    """Checks one root graph (the model's or a function's) and everything inside.

    This runs after every pass on every node: the loops look at each thing once, and leave the wording of
    errors to functions that are only called for them.
    """

    def __init__(self, model: ir.Model, root: ir.Graph) -> None:
        self._functions = model.functions
        self._root = root
        self._domains = root.opset_imports.keys()
        self._scope: dict[str, ir.Value] = {}  # the visible values by name
        self._reads: dict[ir.Value, int] = {}  # the visible values: how many inputs have read them so far
        self._wrong_uses: list[tuple[ir.Value, int]] = []

    def check_graphs(self) -> None:
        """Check the root graph and its subgraphs, and note the values whose uses are not what reads them."""
        self._check_graph(self._root)

    def check_uses(self) -> None:
        """Raise for the first value that was noted."""
        for value, reads in self._wrong_uses:
            raise _wrong_uses(value, reads)

    def _check_graph(self, graph: ir.Graph) -> None:
        reads, domains = self._reads, self._domains
        defined = list(dict.fromkeys((*graph.inputs, *graph.initializers.values())))
        for value in defined:
            self._define(value, None)
        _check_initializers(graph)
        for node in graph:
            for read in node.inputs:
                if read is not None:
                    if read not in reads:
                        raise _undefined(node, read, graph)
                    reads[read] += 1
            if node.domain not in domains:
                raise _error(node, f"domain '{node.domain or 'ai.onnx'}' is not imported")
            if node.graph is not graph:
                raise _error(node, "the node does not know the graph that it is in")
            if node.domain == PLANISH_DOMAIN:
                self._check_call(node)
            if node.attributes:
                for subgraph in subgraphs_of(node):
                    self._check_graph(subgraph)
            for value in node.outputs:
                self._define(value, node)
                defined.append(value)
        self._check_outputs(graph)
        for value in defined:  # they go out of scope
            count = reads.pop(value)
            if len(value.uses()) != count:
                self._wrong_uses.append((value, count))
            if value.name:
                del self._scope[value.name]

    def _define(self, value: ir.Value, node: ir.Node | None) -> None:
        name = value.name
        if not name:
            if value.uses() or value.is_graph_output():
                raise _error(node, f"output {value.index()} is used but has no name")
        elif self._scope.setdefault(name, value) is not value:
            raise _error(node or self._scope[name].producer(), f"two values are called '{name}'")
        if value.producer() is not node:
            raise _error(node or value.producer(), f"'{name}' does not know the node that produces it")
        self._reads[value] = 0

    def _check_call(self, node: ir.Node) -> None:
        function = self._functions.get(node.op_identifier())
        if function is None:
            raise _error(node, f"the model has no function {node.domain}::{node.op_type}")
        if len(node.inputs) > len(function.inputs) or len(node.outputs) > len(function.outputs):
            raise _error(
                node,
                f"{node.op_type} has {len(function.inputs)} inputs and {len(function.outputs)} outputs, "
                f"the node {len(node.inputs)} and {len(node.outputs)}",
            )
        for name, attribute in function.attributes.items():
            if attribute.value is None and name not in node.attributes:
                raise _error(node, f"{node.op_type} needs the attribute '{name}'")

    def _check_outputs(self, graph: ir.Graph) -> None:
        for value in graph.outputs:
            # A subgraph may hand an outer value through: it is visible, and that is enough.
            if value not in self._reads:
                raise _error(
                    value.producer(), f"output '{value.name}' of graph '{graph.name}' is not produced"
                )


def _check_initializers(graph: ir.Graph) -> None:
    for name, value in graph.initializers.items():
        if value.name != name or value.graph is not graph:
            raise _initializer_error(
                graph, name, f"is registered for the value '{value.name}' of another place"
            )
        tensor = value.const_value
        if tensor is None:
            raise _initializer_error(graph, name, "has no data")
        if value.dtype is not None and value.dtype != tensor.dtype:
            raise _initializer_error(
                graph, name, f"is {value.dtype.name}, but its data is {tensor.dtype.name}"
            )
        if value.shape is not None and value.shape is not tensor.shape and value.shape != tensor.shape:
            raise _initializer_error(graph, name, f"has shape {value.shape}, but its data has {tensor.shape}")


def _initializer_error(graph: ir.Graph, name: str, text: str) -> VerificationError:
    return VerificationError(f"initializer '{name}' of graph '{graph.name}' {text}")


def _undefined(node: ir.Node, value: ir.Value, graph: ir.Graph) -> VerificationError:
    producer = value.producer()
    if producer is None:
        what = f"input '{value.name}' is no graph input, initializer or output of a node"
    elif producer.graph is graph:
        what = f"input '{value.name}' is used before the node that produces it"
    else:
        what = f"input '{value.name}' is produced in a graph that is not around this one"
    return _error(node, what)


def _wrong_uses(value: ir.Value, reads: int) -> VerificationError:
    text = f"'{value.name}' is read {reads} times, but lists {len(value.uses())} uses"
    hint = "remove replaced nodes with safe=True"
    return _error(value.producer() or next((use.node for use in value.uses()), None), text, hint=hint)


def _error(node: ir.Node | None, text: str, *, hint: str | None = None) -> VerificationError:
    if node is None:
        return VerificationError(text, hint=hint)
    error = VerificationError(f"node {node.op_type} '{node.name}': {text}", hint=hint)
    error.add_note("\n".join(_surroundings(node)))
    return error


def _surroundings(node: ir.Node) -> Iterable[str]:
    if node.graph is None:
        return [f"> {format_node(node)}  (in no graph)"]
    nodes = list(node.graph)
    position = nodes.index(node)
    first = max(0, position - _NODES_AROUND)
    return [
        f"{'>' if index == position else ' '} {format_node(nodes[index])}"[:_LONGEST_LINE]
        for index in range(first, min(len(nodes), position + _NODES_AROUND + 1))
    ]
