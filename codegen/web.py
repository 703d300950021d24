"""Which nodes of a bound model onnxruntime-web has kernels for, by the operators that it documents.

The kernels that a node may be bound to are known here by op and version alone; that one of them takes the
node's types too (64-bit integers, say, which WebGPU has not) is not.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import onnx
import onnx_ir as ir

from ..ir.errors import TargetError
from . import web_operators

Provider = Literal["wasm", "webgpu"]

_TABLES: Mapping[str, Mapping[str, str]] = {
    "wasm": web_operators.WASM,
    "webgpu": web_operators.WEBGPU,
}
_NO_KERNEL_NEEDED = frozenset({"Constant"})
"""Ops that are gone when a model is loaded."""


@dataclasses.dataclass(frozen=True)
class WebSupport:
    """What a provider of onnxruntime-web has no kernels for.

    Attributes:
        provider: ``wasm``, which then does not load the model, or ``webgpu``, which leaves such nodes to wasm
            and copies their inputs and outputs.
        version: of onnxruntime-web.
        nodes: in the model, those of its functions at each call.
        unsupported: how many nodes have no kernel, by op and the opset of its definition:
            ``{"Transpose-23": 4}``, ``{"com.microsoft::MatMulBnb4-1": 2}``.
    """

    provider: str
    version: str
    nodes: int
    unsupported: Mapping[str, int]

    @property
    def complete(self) -> bool:
        """Whether every node has a kernel."""
        return not self.unsupported

    def __str__(self) -> str:
        """One line."""
        where = f"{self.provider} of onnxruntime-web {self.version}"
        if self.complete:
            return f"{where} has kernels for all {self.nodes} nodes"
        found = ", ".join(f"{count} {name}" for name, count in self.unsupported.items())
        return f"{where} has no kernel for {sum(self.unsupported.values())} of {self.nodes} nodes: {found}"


def web_support(model: ir.Model, provider: Provider = "webgpu") -> WebSupport:
    """Look every node of a bound model up in the operators of a provider.

    Args:
        model: bound; functions of its own are looked into.
        provider: of onnxruntime-web.

    Raises:
        TargetError: there is no such provider.
    """
    table = _TABLES.get(provider)
    if table is None:
        raise TargetError(f"onnxruntime-web: expected a provider of {sorted(_TABLES)}, found {provider!r}")
    kernels = {domain: _parsed(text) for domain, text in table.items()}
    nodes, missing = 0, collections.Counter[str]()
    for node in _called_nodes(model, model.graph):
        nodes += 1
        version, has_body = _definition(node, model)
        ranges = kernels.get(node.domain, {}).get(node.op_type, ())
        # The CPU provider runs an op without a kernel by the body that ONNX defines it by.
        by_body = provider == "wasm" and has_body
        if not (_has_kernel(version, ranges) or by_body or node.op_type in _NO_KERNEL_NEEDED):
            prefix = f"{node.domain}::" if node.domain else ""
            missing[f"{prefix}{node.op_type}-{version}"] += 1
    return WebSupport(provider, web_operators.VERSION, nodes, dict(missing.most_common()))


def _called_nodes(model: ir.Model, graph: ir.Graph) -> Iterator[ir.Node]:
    for node in graph.all_nodes():
        function = model.functions.get(node.op_identifier())
        if function is None:
            yield node
        else:
            yield from _called_nodes(model, function.graph)


def _parsed(text: str) -> dict[str, tuple[tuple[int, int | None], ...]]:
    """``"Abs 6-12,13+"`` → ``{"Abs": ((6, 12), (13, None))}``."""
    words = text.split()
    return {
        op: tuple(_range(part) for part in versions.split(","))
        for op, versions in zip(words[::2], words[1::2], strict=True)
    }


def _range(text: str) -> tuple[int, int | None]:
    if text.endswith("+"):
        return int(text[:-1]), None
    first, _, last = text.partition("-")
    return int(first), int(last or first)


def _has_kernel(version: int, ranges: tuple[tuple[int, int | None], ...]) -> bool:
    return any(first == version or (last is not None and first <= version <= last) for first, last in ranges)


def _definition(node: ir.Node, model: ir.Model) -> tuple[int, bool]:
    """The opset that the op's definition came with, and whether it has a body of other ops."""
    opset = model.opset_imports.get(node.domain, 1)
    if not onnx.defs.has(node.op_type, opset, node.domain):
        return 1, False  # of another domain, whose definitions are not versioned, or unknown
    schema: Any = onnx.defs.get_schema(node.op_type, opset, node.domain)
    return schema.since_version, schema.has_function or schema.has_context_dependent_function
