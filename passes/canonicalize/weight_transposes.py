"""Transposes of weights are folded into the weights, without copying them.

    MatMul(x, Transpose(W[N, K])) → MatMul(x, W[K, N])

The folded initializer keeps its name and is transposed when it is read: a view, until its bytes are needed.

A weight that is read both as it is and transposed is tied: the token embedding that is the output projection
too. The tie stays: one initializer, with the Transpose in front of the projection, and the metadata
``planish.tied_to`` on the projection's MatMul names the embedding. With ``untie`` the projection gets its own
(transposed) initializer instead, named after its module, as quantising it alone requires.
"""

from __future__ import annotations

import onnx_ir as ir

from ...ir.rearranged import TransposedTensor
from ...ir.walk import graphs
from .graph_edits import add_initializer, constant_tensor, is_op, retire, sweep
from .module_paths import module_path

TIED_TO = "planish.tied_to"
"""Metadata of a MatMul whose weight is the transposed embedding of this name."""


def fold_weight_transposes(model: ir.Model, *, untie: bool) -> dict[str, int]:
    """Fold every Transpose of a constant that is nobody else's weight."""
    statistics = {"weight-transposes-folded": 0, "weights-untied": 0}
    for graph in graphs(model):
        for node in sweep(graph):
            if not is_op(node, "Transpose") or node.outputs[0].is_graph_output():
                continue
            weight = node.inputs[0]
            tensor = constant_tensor(weight)
            if weight is None or tensor is None or weight.graph is not graph or weight.is_graph_output():
                continue
            permutation = _permutation(node, len(tensor.shape))
            if _is_tied(weight, permutation):
                if untie:
                    _give_own_copy(node, tensor, permutation)
                    statistics["weights-untied"] += 1
                else:
                    _mark(node, weight)
            else:
                _fold(graph, weight, tensor, permutation)
                statistics["weight-transposes-folded"] += 1
    return statistics


def _permutation(node: ir.Node, rank: int) -> tuple[int, ...]:
    attribute = node.attributes.get("perm")
    return tuple(reversed(range(rank))) if attribute is None else tuple(attribute.as_ints())


def _is_tied(weight: ir.Value, permutation: tuple[int, ...]) -> bool:
    """Whether something reads the weight in another orientation."""
    return any(
        not is_op(use.node, "Transpose")
        or use.node.outputs[0].is_graph_output()
        or _permutation(use.node, len(permutation)) != permutation
        for use in weight.uses()
    )


def _fold(graph: ir.Graph, weight: ir.Value, tensor: ir.TensorProtocol, permutation: tuple[int, ...]) -> None:
    """Replace the initializer by its transposition and remove all (equal) Transpose nodes that read it."""
    assert weight.name is not None
    readers = [use.node for use in weight.uses()]
    metadata = dict(weight.metadata_props)
    del graph.initializers[weight.name]
    folded = add_initializer(graph, TransposedTensor(tensor, permutation, weight.name), weight.name)
    folded.metadata_props.update(metadata)
    for reader in readers:
        reader.outputs[0].replace_all_uses_with(folded)
        retire(reader)


def _give_own_copy(node: ir.Node, tensor: ir.TensorProtocol, permutation: tuple[int, ...]) -> None:
    assert isinstance(node.graph, ir.Graph)
    users = [use.node for use in node.outputs[0].uses()]
    path = module_path(users[0]) if users else None
    name = f"{path}.weight" if path else str(node.outputs[0].name)
    own = add_initializer(node.graph, TransposedTensor(tensor, permutation, name), name)
    node.outputs[0].replace_all_uses_with(own)
    retire(node)


def _mark(node: ir.Node, weight: ir.Value) -> None:
    for use in node.outputs[0].uses():
        if is_op(use.node, "MatMul"):
            use.node.metadata_props[TIED_TO] = str(weight.name)
