"""Small questions about values that all views ask."""

from __future__ import annotations

import onnx_ir as ir


def is_constant(value: ir.Value | None) -> bool:
    """Whether the value is an initializer that callers cannot override, or made by a Constant node."""
    if value is None:
        return False
    node = value.producer()
    if node is not None:
        return node.op_type == "Constant" and node.domain == ""
    return value.const_value is not None and not value.is_graph_input()


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape, if every dimension of it is a number."""
    if value is None or value.shape is None:
        return None
    dims = tuple(dim for dim in value.shape if isinstance(dim, int))
    return dims if len(dims) == len(value.shape) else None


def static_dim(value: ir.Value | None, axis: int) -> int | None:
    """The size of dimension ``axis``, if it is known."""
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    dim = value.shape[axis]
    return dim if isinstance(dim, int) else None


def only_reader(value: ir.Value) -> ir.Node | None:
    """The node that reads the value, if there is one reader and the value is no output of the graph."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    return next(iter(uses)).node


def input_at(node: ir.Node, index: int) -> ir.Value | None:
    """Input ``index``, or None if it is omitted."""
    return node.inputs[index] if index < len(node.inputs) else None


def number(node: ir.Node, name: str, default: float) -> float:
    """The value of a numeric attribute."""
    attribute = node.attributes.get(name)
    return default if attribute is None or attribute.is_ref() else float(attribute.value)


def integer(node: ir.Node, name: str) -> int | None:
    """The value of an integer attribute, if the node has it."""
    attribute = node.attributes.get(name)
    return None if attribute is None or attribute.is_ref() else attribute.as_int()


def parameter_owner(value: ir.Value) -> str:
    """``model.layers.0.mlp.up_proj.weight`` → ``model.layers.0.mlp.up_proj``."""
    name = value.name or ""
    return name.removesuffix(".weight")
