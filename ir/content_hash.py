"""Which model this is: a hash of what it holds."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .external import release
from .walk import all_graphs


def content_hash(model: ir.Model) -> str:
    """SHA-256 of a graph's weights, names included: which model a file was compiled from."""
    hashes = ContentHash(model)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(hashes.add, model.graph.initializers.values()):
            pass
    return hashes.result()


class ContentHash:
    """The `content_hash` of a model, for whoever reads its weights anyway."""

    def __init__(self, model: ir.Model) -> None:
        self._hashes = {
            name: _begun(name, value.const_value)
            for name, value in sorted(model.graph.initializers.items())
            if value.const_value is not None
        }
        self._model = model

    def covers(self, value: ir.Value) -> bool:
        """Whether the bytes of a weight are part of it: those of the main graph are."""
        return value.graph is self._model.graph and value.name in self._hashes

    def update(self, value: ir.Value, numbers: npt.NDArray[Any]) -> None:
        """Add some numbers of a weight, one-dimensional and contiguous, after those before them."""
        self._hashes[str(value.name)].update(numbers.view(np.uint8).data)

    def add(self, value: ir.Value) -> None:
        """Add all numbers of a weight, and release it."""
        tensor = value.const_value
        if tensor is not None:
            self.update(value, np.ascontiguousarray(tensor.numpy()).reshape(-1))
            release(tensor)

    def result(self) -> str:
        """The hash, when every weight was added."""
        digest = hashlib.sha256()
        for found in self._hashes.values():
            digest.update(found.digest())
        return f"sha256:{digest.hexdigest()}"


def graph_hash(model: ir.Model) -> str:
    """SHA-256 of all that a model computes: nodes in order, names, attributes, functions and weights."""
    digest = hashlib.sha256(content_hash(model).encode())
    digest.update(repr(sorted(model.opset_imports.items())).encode())
    for graph in all_graphs(model):
        interface = [
            [(value.name, str(value.dtype), str(value.shape)) for value in values]
            for values in (graph.inputs, graph.outputs)
        ]
        digest.update(f"graph {graph.name} {interface}".encode())
        if graph is not model.graph:
            for name, value in graph.initializers.items():
                digest.update(b"" if value.const_value is None else _tensor_hash(name, value.const_value))
        for node in graph:
            digest.update(_described(node).encode())
    for key, function in model.functions.items():
        digest.update(f"function {key} {[value.name for value in function.inputs]}".encode())
        digest.update(repr([value.name for value in function.outputs]).encode())
        for node in function.all_nodes():
            digest.update(_described(node).encode())
    return f"sha256:{digest.hexdigest()}"


def _described(node: ir.Node) -> str:
    operands = [[value and value.name for value in values] for values in (node.inputs, node.outputs)]
    attributes = sorted((name, _attribute(attribute)) for name, attribute in node.attributes.items())
    return repr((node.domain, node.op_type, node.overload, node.name, operands, attributes))


def _attribute(attribute: ir.Attr) -> str:
    if attribute.is_ref():
        return f"reference to {attribute.ref_attr_name}"
    match attribute.type:
        case ir.AttributeType.TENSOR:
            return _tensor_hash("", attribute.as_tensor()).hex()
        case ir.AttributeType.TENSORS:
            return "".join(_tensor_hash("", tensor).hex() for tensor in attribute.as_tensors())
        case ir.AttributeType.GRAPH | ir.AttributeType.GRAPHS:
            return str(attribute.type)  # graphs are hashed by themselves
        case _:
            return repr(attribute.value)


def _tensor_hash(name: str, tensor: ir.TensorProtocol) -> bytes:
    digest = _begun(name, tensor)
    digest.update(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data)
    release(tensor)
    return digest.digest()


def _begun(name: str, tensor: ir.TensorProtocol) -> hashlib._Hash:
    return hashlib.sha256(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
