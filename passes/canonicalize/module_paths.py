"""Which module of the source model a node came from, and which parameter of it an input is.

Three kinds of evidence, the first that is there wins:
- ``pkg.torch.onnx.name_scopes`` in the node's metadata (torch ≥ 2.5, dynamo): a list of nested module paths;
- ``namespace`` in the node's metadata: the same as text, ``model.layers.0: LlamaDecoderLayer/…``;
- the node's name, where the TorchScript exporter wrote the path: ``/model/layers.0/self_attn/q_proj/MatMul``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import onnx_ir as ir

from .graph_edits import is_op, producer, rank

SCOPES = "pkg.torch.onnx.name_scopes"
NAMESPACE = "namespace"

PARAMETERS: dict[str, dict[int, str]] = {
    "BatchNormalization": {1: "weight", 2: "bias", 3: "running_mean", 4: "running_var"},
    "Conv": {1: "weight", 2: "bias"},
    "ConvTranspose": {1: "weight", 2: "bias"},
    "Gather": {0: "weight"},
    "Gemm": {1: "weight", 2: "bias"},
    "GroupNormalization": {1: "weight", 2: "bias"},
    "InstanceNormalization": {1: "weight", 2: "bias"},
    "LayerNormalization": {1: "weight", 2: "bias"},
    "MatMul": {1: "weight"},
    "PRelu": {1: "weight"},
    "RMSNormalization": {1: "weight"},
}
"""The inputs of an op that are parameters of its module, by torch's names for them."""


def module_path(node: ir.Node) -> str | None:
    """The dotted path of the module that ``node`` came from (``""`` is the root), else ``None``."""
    scopes = node.metadata_props.get(SCOPES)
    if scopes is not None:
        path = _listed(scopes)
        return path[-2] if len(path) > 1 else None
    namespace = node.metadata_props.get(NAMESPACE)
    if namespace is not None:
        parts = [part.partition(":")[0].strip() for part in namespace.split("/")]
        return parts[-2] if len(parts) > 1 else None
    if node.name and node.name.startswith("/"):
        return ".".join(node.name.split("/")[1:-1])
    return None


def _listed(text: str) -> list[str]:
    """The strings of a list as Python writes it; none if it is damaged: a path is only a name."""
    try:
        items = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return [str(item) for item in items] if isinstance(items, list) else []


def parameters(graph: ir.Graph) -> Iterator[tuple[ir.Node, int, str]]:
    """Every (node, input index, parameter name) of ``graph`` whose input is an initializer of rank ≥ 1."""
    for node in graph:
        roles = PARAMETERS.get(node.op_type, {})
        if is_op(node, "Add"):
            roles = _bias_role(node)
        elif not is_op(node, node.op_type):
            continue
        for index, role in roles.items():
            value = node.inputs[index] if index < len(node.inputs) else None
            if value is not None and value.is_initializer() and not value.is_graph_input() and rank(value):
                yield node, index, role


def _bias_role(node: ir.Node) -> dict[int, str]:
    """The bias of ``Add(MatMul(x, W), b)``: a vector added to the result of a linear layer."""
    for index, other in ((1, 0), (0, 1)):
        value = node.inputs[index]
        if value is not None and value.is_initializer() and rank(value) == 1:
            linear = producer(node.inputs[other], "MatMul")
            if linear is not None and linear.inputs[1] is not None and linear.inputs[1].is_initializer():
                return {index: "bias"}
    return {}
