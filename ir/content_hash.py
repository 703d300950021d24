"""Which model this is: a hash of what it holds."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os

import numpy as np
import onnx_ir as ir

from .external import release
from .walk import all_nodes


def content_hash(model: ir.Model) -> str:
    """SHA-256 of a graph's weights, names included: which model a file was compiled from."""
    initializers = model.graph.initializers
    tensors = [(name, initializers[name].const_value) for name in sorted(initializers)]
    digest = hashlib.sha256()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(_tensor_hash, [given for given in tensors if given[1] is not None]):
            digest.update(found)
    return f"sha256:{digest.hexdigest()}"


def graph_hash(model: ir.Model) -> str:
    """SHA-256 of all that a model computes: nodes in order, names, attributes, functions and weights."""
    digest = hashlib.sha256(content_hash(model).encode())
    interface = [
        [(value.name, str(value.dtype), str(value.shape)) for value in values]
        for values in (model.graph.inputs, model.graph.outputs)
    ]
    digest.update(repr((interface, sorted(model.opset_imports.items()))).encode())
    for node in all_nodes(model):
        digest.update(_described(node).encode())
    return f"sha256:{digest.hexdigest()}"


def _described(node: ir.Node) -> str:
    operands = [
        [None if value is None else value.name for value in values] for values in (node.inputs, node.outputs)
    ]
    attributes = sorted((name, _attribute(attribute)) for name, attribute in node.attributes.items())
    return repr((node.domain, node.op_type, node.overload, node.name, operands, attributes))


def _attribute(attribute: ir.Attr) -> str:
    match attribute.type:
        case ir.AttributeType.TENSOR:
            return _tensor_hash(("", attribute.as_tensor())).hex()
        case ir.AttributeType.GRAPH | ir.AttributeType.GRAPHS:
            return str(attribute.type)  # their nodes are among all nodes
        case _:
            return repr(attribute.value)


def _tensor_hash(named: tuple[str, ir.TensorProtocol]) -> bytes:
    name, tensor = named
    digest = hashlib.sha256(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
    digest.update(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data)
    release(tensor)
    return digest.digest()
