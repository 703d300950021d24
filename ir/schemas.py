"""Are nodes of the standard domain written as their ops ask for?

Checked are the numbers of inputs and outputs, the names and types of attributes, values of some attributes
that passes rely on, and element types, as far as they follow from those of graph inputs and weights. A file
that breaks these rules would be refused by every runtime.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import onnx
import onnx_ir as ir

from .errors import ModelError
from .walk import root_graphs

_HINT = "check it with onnx.checker.check_model"
_TYPE_ATTRIBUTES = frozenset({"dtype", "output_dtype", "precision", "softmax_precision", "stash_type", "to"})
"""Attributes whose integer stands for an element type; 0 for none."""

_ELEMENT_TYPES = frozenset(map(int, ir.DataType))

Types = dict[ir.Value, ir.DataType]


@dataclass(frozen=True)
class _Operand:
    """What an input or output may be.

    Attributes:
        types: names of its types, such as ``tensor(float)``.
        variable: operands of the same variable have the same type; empty where each has a type of its own.
        is_required: whether there must be one.
    """

    types: frozenset[str]
    variable: str
    is_required: bool


@dataclass(frozen=True)
class _Signature:
    """What an op takes and gives in one opset."""

    inputs: Sequence[_Operand]
    outputs: Sequence[_Operand]
    attributes: Mapping[str, int]
    required: frozenset[str]
    counts: tuple[range, range]
    """How many inputs and outputs there may be."""

    def input(self, index: int) -> _Operand:
        """The input at a place; the last one stands for all that follow it."""
        return self.inputs[min(index, len(self.inputs) - 1)]

    def output(self, index: int) -> _Operand:
        """The output at a place."""
        return self.outputs[min(index, len(self.outputs) - 1)]


def check_nodes(model: ir.Model, *, source: str) -> None:
    """Check every node of the standard domain whose op the opset has, if onnx knows the opset.

    Args:
        model: its nodes are sorted.
        source: what to call the model in errors.

    Raises:
        ModelError: names the first node that is not as its op asks for.
    """
    types: Types = {}
    for root in root_graphs(model):
        version = root.opset_imports.get("")
        if version is None or version > onnx.defs.onnx_opset_version():
            continue
        signature_of = functools.cache(functools.partial(_signature, version))
        for graph in (root, *root.subgraphs()):
            _note_types(graph, types)
            for node in graph:
                problem = _problem(node, signature_of(node.op_type), types) if node.domain == "" else None
                if problem is not None:
                    raise ModelError(f"{source}: node {node.op_type} '{node.name}': {problem}", hint=_HINT)


def _note_types(graph: ir.Graph, types: Types) -> None:
    for value in (*graph.inputs, *graph.initializers.values()):
        dtype = value.dtype if value.const_value is None else value.const_value.dtype
        if dtype is not None and (value.type is None or isinstance(value.type, ir.TensorType)):
            types[value] = dtype


def _problem(node: ir.Node, signature: _Signature | None, types: Types) -> str | None:
    if signature is None:
        return None  # an op of somebody's own; targets may refuse it
    return (
        _wrong_count(node, signature)
        or _wrong_attribute(node, signature)
        or _wrong_value(node)
        or _wrong_type(node, signature, types)
    )


def _signature(version: int, op_type: str) -> _Signature | None:
    try:
        schema = onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return None
    allowed = {each.type_param_str: frozenset(each.allowed_type_strs) for each in schema.type_constraints}

    def operand(parameter: onnx.defs.OpSchema.FormalParameter) -> _Operand:
        types = allowed.get(parameter.type_str, frozenset({parameter.type_str}))
        variable = parameter.type_str if parameter.is_homogeneous and parameter.type_str in allowed else ""
        is_required = parameter.option == onnx.defs.OpSchema.FormalParameterOption.Single
        return _Operand(types, variable, is_required)

    return _Signature(
        inputs=[operand(each) for each in schema.inputs],
        outputs=[operand(each) for each in schema.outputs],
        attributes={name: cast(Any, each.type).value for name, each in schema.attributes.items()},
        required=frozenset(name for name, each in schema.attributes.items() if each.required),
        counts=(
            range(schema.min_input, schema.max_input + 1),
            range(schema.min_output, schema.max_output + 1),
        ),
    )


def _wrong_count(node: ir.Node, signature: _Signature) -> str | None:
    for kind, values, allowed in zip(
        ("inputs", "outputs"), (node.inputs, node.outputs), signature.counts, strict=True
    ):
        if len(values) not in allowed:
            return f"expected {allowed.start} to {allowed.stop - 1} {kind}, found {len(values)}"
    for index, value in enumerate(node.inputs):
        if value is None and signature.input(index).is_required:
            return f"input {index} is missing"
    return None


def _wrong_attribute(node: ir.Node, signature: _Signature) -> str | None:
    for name, attribute in node.attributes.items():
        expected = signature.attributes.get(name)
        if expected is None:
            return f"the op has no attribute '{name}'"
        if attribute.type != expected:
            found = ir.AttributeType(attribute.type).name
            return f"attribute '{name}': expected {ir.AttributeType(expected).name}, found {found}"
    missing = sorted(signature.required - node.attributes.keys())
    return f"attribute '{missing[0]}' is missing" if missing else None


def _wrong_value(node: ir.Node) -> str | None:
    if node.op_type == "Constant" and len(node.attributes) != 1:
        return f"expected one value, found {len(node.attributes)}"
    for name, attribute in node.attributes.items():
        if attribute.is_ref() or attribute.type not in (ir.AttributeType.INT, ir.AttributeType.INTS):
            continue
        if name in _TYPE_ATTRIBUTES and attribute.as_int() not in _ELEMENT_TYPES:
            return f"attribute '{name}': {attribute.as_int()} is no element type"
        if name == "perm" and not _is_permutation(attribute.as_ints(), node.inputs[0]):
            return f"attribute 'perm': {list(attribute.as_ints())} is no order of the axes of its input"
    return None


def _is_permutation(order: Sequence[int], value: ir.Value | None) -> bool:
    rank = len(order)
    if value is not None and value.const_value is not None:
        rank = len(value.const_value.shape)
    return sorted(order) == list(range(rank))


def _wrong_type(node: ir.Node, signature: _Signature, types: Types) -> str | None:
    """What is wrong with the types of the inputs; else those of the outputs are noted in ``types``."""
    variables: dict[str, ir.DataType] = {}
    for index, value in enumerate(node.inputs):
        dtype = None if value is None else types.get(value)
        if value is None or dtype is None:
            continue
        operand = signature.input(index)
        if f"tensor({dtype.name.lower()})" not in operand.types:
            return f"input {index} ('{value.name}') cannot be {dtype.name}"
        if operand.variable and variables.setdefault(operand.variable, dtype) != dtype:
            other = variables[operand.variable].name
            return f"input {index} ('{value.name}') is {dtype.name}, and another of the same type is {other}"
    for index, value in enumerate(node.outputs):
        operand = signature.output(index)
        dtype = variables.get(operand.variable)
        if dtype is not None:
            types[value] = dtype
        elif len(operand.types) == 1:
            _note_only_type(value, operand, types)
    if node.op_type == "Cast" and not node.attributes["to"].is_ref():
        types[node.outputs[0]] = ir.DataType(node.attributes["to"].as_int())
    return None


def _note_only_type(value: ir.Value, operand: _Operand, types: Types) -> None:
    (name,) = operand.types
    if name.startswith("tensor("):
        types[value] = ir.DataType[name[len("tensor(") : -1].upper()]
