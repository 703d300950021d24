"""Target ``portable``: standard ONNX ops only, for any runtime that reads opset 23.

Every planish op becomes its body. The bodies store weights [K, N] with blocks along axis 0, which is the form
that onnxruntime itself turns into its low-bit kernels, and the dynamic int8 form that it fuses at no cost.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import onnx
import onnx_ir as ir

from ...ir import clone, ops
from ...ir.errors import TargetError
from ..target import Binding, BoundModel, Target
from .packed_gather import pack_table

_STANDARD_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Portable(Target):
    """Any runtime: planish ops are replaced by standard ones, ops of other vendors are refused."""

    name: ClassVar[str] = "portable"

    def bind(self, model: ir.Model) -> BoundModel:
        """Replace each planish op by its body.

        Raises:
            TargetError: an op that neither ONNX nor a function of the model defines.
        """
        bound = clone(model)
        bindings = [_bind(bound, node) for node in list(bound.graph.all_nodes()) if node.domain == ops.DOMAIN]
        ops.inline(bound)
        _require_standard_ops(bound)
        return BoundModel(model=bound, bindings=tuple(bindings))

    def adds_products_in_16_bits(self) -> bool:
        """Yes: the file may meet a CPU whose signed int8 kernel does."""
        return True


def _bind(model: ir.Model, node: ir.Node) -> Binding:
    name, op = node.name or "", f"{node.domain}::{node.op_type}"
    if node.op_type == "QuantizedGather" and node.overload == "block" and pack_table(model, node):
        return Binding(name, op, "Gather of packed rows", "standard Gather takes no 4-bit integers")
    return Binding(name, op, "body", "standard ops for any runtime")


def _require_standard_ops(model: ir.Model) -> None:
    for node in model.graph.all_nodes():
        version = model.opset_imports.get(node.domain, 0)
        is_defined = _is_standard(node.domain, node.op_type, version)
        if not is_defined and node.op_identifier() not in model.functions:
            op = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            raise TargetError(
                f"portable: node {node.name!r} is {op}, which is not a standard op",
                hint="use the target onnxruntime-cpu, or a pipeline that leaves the op out",
            )


@functools.cache
def _is_standard(domain: str, op_type: str, version: int) -> bool:
    """Whether ONNX defines an op; of opsets that are newer than onnx, all of theirs count."""
    if domain not in _STANDARD_DOMAINS:
        return False
    return version > onnx.defs.onnx_opset_version() or onnx.defs.has(op_type, version, domain)
