"""What every rewrite of this family needs: reading constants, and replacing values and nodes safely."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, np.dtype[Any]]

_RETIRED = "planish.retired"

SMALL = 4096
"""Elements of a constant that a rewrite may read to decide something; larger ones are weights."""


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Whether ``node`` is one of these ops of the standard ONNX domain."""
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in op_types


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that computes ``value`` if it is one of these standard ops, else ``None``."""
    if value is None:
        return None
    node = value.producer()
    return node if is_op(node, *op_types) else None


def opset(model: ir.Model) -> int:
    """The version of the standard domain that the model imports; 0 when it imports none."""
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of a value that no caller can override, else ``None``.

    An initializer that is also a graph input is only a default, so it is not constant.
    """
    if value is None or value.is_graph_input():
        return None
    if value.is_initializer() or producer(value, "Constant") is not None:
        return ir.convenience.get_const_tensor(value)
    return None


def constant(value: ir.Value | None, *, limit: int = SMALL) -> Array | None:
    """The array of a constant of at most ``limit`` elements, else ``None``."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.size > limit:
        return None
    return tensor.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The number in a constant of exactly one element (of any rank), else ``None``."""
    array = constant(value, limit=1)
    return None if array is None or array.size != 1 else float(array.reshape(()))


def integers(value: ir.Value | None) -> list[int] | None:
    """The elements of a constant integer vector or scalar, else ``None``."""
    array = constant(value, limit=64)
    if array is None or array.dtype.kind not in "iu":
        return None
    return [int(element) for element in array.reshape(-1)]


def integer(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute, or what the op takes when it is absent."""
    attribute = node.attributes.get(name)
    return default if attribute is None else int(attribute.as_int())


def number(node: ir.Node, name: str, default: float) -> float:
    """A float attribute, or what the op takes when it is absent."""
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.as_float())


def dims(value: ir.Value | None) -> list[int | str | None] | None:
    """The dimensions, each an int, a symbol's name or ``None``; ``None`` if the rank is unknown."""
    if value is None or value.shape is None:
        return None
    return [dim if isinstance(dim, int) else as_dim(dim.value) for dim in value.shape]


def as_dim(entry: int | str | None) -> int | str | None:
    """A dimension as inference gives it; a number that came out of symbolic arithmetic is text there."""
    return int(entry) if isinstance(entry, str) and entry.lstrip("-").isdigit() else entry


def rank(value: ir.Value | None) -> int | None:
    """How many dimensions a value has, if known."""
    return None if value is None or value.shape is None else len(value.shape)


def same_shape(left: ir.Value, right: ir.Value) -> bool:
    """Whether both shapes are known and provably equal: the same ints and the same symbols."""
    a, b = dims(left), dims(right)
    return a is not None and a == b and None not in a


def broadcasts_into(small: ir.Value, large: ir.Value) -> bool:
    """Whether an elementwise op of both provably has exactly the shape of ``large``."""
    a, b = dims(small), dims(large)
    if a is None or b is None or len(a) > len(b):
        return False
    return all(x == 1 or (x == y and x is not None) for x, y in zip(reversed(a), reversed(b), strict=False))


def only_use(value: ir.Value) -> bool:
    """Whether exactly one node reads the value and no graph returns it."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol, name: str) -> ir.Value:
    """Register ``tensor``, owned by no other initializer, under ``name`` or the first free ``name_1``, …"""
    value = ir.Value(
        name=free_name(graph, name),
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def shape_constant(graph: ir.Graph, entries: Sequence[int]) -> ir.Value:
    """The int64 vector ``entries``, one initializer for all nodes of the graph who ask for it."""
    name = "planish.shape." + "x".join(str(entry) for entry in entries)
    if not graph.opset_imports:  # a subgraph, which sees the names of the graphs around it
        name += f".{graph[0].outputs[0].name}"
    existing = graph.initializers.get(name)
    if existing is not None and integers(existing) == list(entries):
        return existing
    return add_initializer(graph, ir.tensor(np.array(entries, dtype=np.int64), name=name), name)


def free_name(graph: ir.Graph, name: str) -> str:
    """``name``, or ``name_1``, ``name_2``, … if initializers of ``graph`` already have it."""
    if name not in graph.initializers:
        return name
    suffix = 1
    while f"{name}_{suffix}" in graph.initializers:
        suffix += 1
    return f"{name}_{suffix}"


def can_replace(old: ir.Value, new: ir.Value) -> bool:
    """Whether :func:`replace_value` may put ``new`` in the place of ``old``.

    A graph output must be computed by a node of that graph and carry its own name, so it cannot become an
    input, an initializer, another output, or a value of an outer graph.
    """
    if not old.is_graph_output():
        return True
    return (
        new.producer() is not None
        and not new.is_graph_output()
        and new.graph is old.graph
        and not _captured(new)
    )


def _captured(value: ir.Value) -> bool:
    """Whether a subgraph reads the value; renaming it is then left alone."""
    return any(use.node.graph is not value.graph for use in value.uses())


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Let ``new`` be read wherever ``old`` was; a graph output keeps its name, type and position.

    Call only where :func:`can_replace` holds.
    """
    if new.shape is None:
        new.shape = old.shape
    if new.type is None:
        new.type = old.type
    if old.is_graph_output():
        name = old.name
        new.metadata_props.update(old.metadata_props)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name = None
        new.name = name
    else:
        old.replace_all_uses_with(new)


def bypass(node: ir.Node, value: ir.Value) -> bool:
    """Retire a node of one output whose result equals ``value``; False where a graph output forbids it."""
    if not can_replace(node.outputs[0], value):
        return False
    replace_value(node.outputs[0], value)
    retire(node)
    return True


def sweep(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes of a graph from inputs to outputs; those that are retired meanwhile are removed at the end.

    All at once, because removing a node costs onnx_ir a look at every output of the graph.
    """
    yield from graph
    graph.remove([node for node in graph if _RETIRED in node.meta], safe=True)


def retire(node: ir.Node) -> None:
    """Stop a node, whose outputs nobody reads any more, from reading its inputs; `sweep` removes it."""
    for index in range(len(node.inputs)):
        node.replace_input_with(index, None)
    node.meta[_RETIRED] = True


def replace_node(
    node: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    domain: str = "",
) -> ir.Node:
    """Put a new node in the place of ``node`` (of one output); name, metadata and output name are kept."""
    new = ir.node(
        op_type,
        inputs,
        attributes,
        domain=domain,
        name=node.name,
        metadata_props=dict(node.metadata_props),
    )
    take_over(node, new)
    return new


def take_over(node: ir.Node, new: ir.Node) -> None:
    """Insert ``new`` before ``node``, give the readers of ``node`` its first output, and retire ``node``."""
    assert node.graph is not None
    old_output, new_output = node.outputs[0], new.outputs[0]
    node.graph.insert_before(node, new)
    new_output.name = old_output.name
    new_output.shape = old_output.shape
    new_output.type = old_output.type
    new_output.metadata_props.update(old_output.metadata_props)
    old_output.replace_all_uses_with(new_output, replace_graph_outputs=True)
    retire(node)


def merge(*counts: Mapping[str, int]) -> dict[str, int]:
    """The sum of several statistics."""
    total: dict[str, int] = {}
    for count in counts:
        for key, n in count.items():
            total[key] = total.get(key, 0) + n
    return total
