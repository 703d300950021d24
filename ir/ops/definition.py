"""What a planish op is: an ONNX function whose body, in standard ops, is its meaning."""

from __future__ import annotations

import dataclasses
import functools

import onnx.parser
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from ..errors import ModelError

DOMAIN = "planish"
VERSION = 1
MINIMUM_OPSET = 23


@dataclasses.dataclass(frozen=True)
class OpDefinition:
    """One overload of an op: its signature and its body, written as ONNX function text.

    Attributes:
        op_type: the op's name in the ``planish`` domain.
        overload: tells bodies of the same op apart; empty for the plain one.
        signature: attributes, inputs and outputs, in the syntax of ``onnx.parser``.
        body: the nodes between the braces.
    """

    op_type: str
    overload: str
    signature: str
    body: str

    @property
    def identifier(self) -> ir.OperatorIdentifier:
        """(domain, op_type, overload): the key of the function in a model."""
        return (DOMAIN, self.op_type, self.overload)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs, in order."""
        names = self.signature.partition("=>")[0].rpartition("(")[2].rstrip().rstrip(")")
        return tuple(name.strip() for name in names.split(","))

    def function(self, opset_version: int) -> ir.Function:
        """A new function with this body, importing the standard ops at ``opset_version``."""
        function = ir.serde.deserialize_function(_parse(self, opset_version))
        for node in function:
            node.name = f"{self.op_type}.{node.outputs[0].name}"
        return function


@functools.cache
def _parse(definition: OpDefinition, opset_version: int) -> onnx.FunctionProto:
    overload = f', overload: "{definition.overload}"' if definition.overload else ""
    return onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset_version}]{overload}>\n'
        f"{definition.op_type} {definition.signature}\n{{{definition.body}}}"
    )


def define(model: ir.Model, definition: OpDefinition) -> None:
    """Add the op's function and the domain's opset import to ``model``, unless they are there already.

    Raises:
        ModelError: the model's opset is older than the ops that bodies are written in (23).
    """
    opset_version = model.opset_imports.get("", 0)
    if opset_version < MINIMUM_OPSET:
        raise ModelError(
            f"planish::{definition.op_type} needs opset {MINIMUM_OPSET}, the model has {opset_version}",
            hint="load it with planish.load, which converts it up",
        )
    model.opset_imports.setdefault(DOMAIN, VERSION)
    if definition.identifier not in model.functions:
        model.functions[definition.identifier] = definition.function(opset_version)


def inline(model: ir.Model) -> int:
    """Replace every planish op of ``model`` by its body, in place; returns how many were replaced.

    Nodes of the bodies inherit the names, as the first part of theirs, and the metadata of the ops that they
    replace. Functions of other domains stay.
    """
    calls = [node for node in model.graph.all_nodes() if node.domain == DOMAIN]
    for node in calls:
        node.metadata_props[_CALLER] = node.name or ""
    InlinePass(criteria=lambda function: function.domain == DOMAIN)(model)
    model.opset_imports.pop(DOMAIN, None)
    for node in model.graph.all_nodes():
        if caller := node.metadata_props.pop(_CALLER, None):
            node.name = f"{caller}.{node.name}"
        _drop_trailing_gaps(node)
    return len(calls)


_CALLER = "planish.caller"
"""Metadata that only lives while ops are inlined: the name of the op that a node is part of the body of."""


def _drop_trailing_gaps(node: ir.Node) -> None:
    """Drop omitted inputs at the end: an empty name there keeps onnxruntime from fusing DequantizeLinear."""
    used = len(node.inputs)
    while used and node.inputs[used - 1] is None:
        used -= 1
    if used < len(node.inputs):
        node.resize_inputs(used)
