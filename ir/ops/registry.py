"""The ops with a quantised weight: which definition a node is of, and its operands by name."""

from __future__ import annotations

import onnx_ir as ir

from .definition import DOMAIN, OpDefinition
from .dynamic_quantized_linear import DEFINITIONS as DYNAMIC_QUANTIZED_LINEAR
from .quantized_conv import DEFINITIONS as QUANTIZED_CONV
from .quantized_gather import DEFINITIONS as QUANTIZED_GATHER
from .quantized_linear import DEFINITIONS as QUANTIZED_LINEAR
from .static_quantized_linear import DEFINITIONS as STATIC_QUANTIZED_LINEAR

_LINEARS = (QUANTIZED_LINEAR, DYNAMIC_QUANTIZED_LINEAR, STATIC_QUANTIZED_LINEAR)
LINEAR_OPS = frozenset(definition.op_type for family in _LINEARS for definition in family.values())
"""Ops that compute ``X[..., K] · W[K, N] (+ bias[N])`` with a quantised W: inputs X, W, scale, …"""
DEFINITIONS: dict[ir.OperatorIdentifier, OpDefinition] = {
    definition.identifier: definition
    for family in (*_LINEARS, QUANTIZED_GATHER, QUANTIZED_CONV)
    for definition in family.values()
}


def definition_of(node: ir.Node) -> OpDefinition | None:
    """The definition of the quantised op that ``node`` is; None for any other node."""
    return DEFINITIONS.get(node.op_identifier()) if node.domain == DOMAIN else None


def operand(node: ir.Node, name: str) -> ir.Value | None:
    """The input of a quantised op that its definition calls ``name``, such as ``bias`` or ``codebook``.

    None where the op is another one, has no such input, or omits it.
    """
    definition = definition_of(node)
    if definition is None or name not in definition.inputs:
        return None
    index = definition.inputs.index(name)
    return node.inputs[index] if index < len(node.inputs) else None
