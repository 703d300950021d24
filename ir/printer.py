"""A model as text for people: one line per node, weights summarised, nodes under their modules."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from .walk import subgraphs_of

SCOPES_KEY = "pkg.torch.onnx.name_scopes"
"""Node metadata of torch's exporter: the module path of a node, as the text of a Python list."""

_MAX_ELEMENTS = 6


def format_model(model: ir.Model, *, max_nodes: int | None = None) -> str:
    """Describe ``model``: versions, inputs, outputs, weights, nodes and functions.

    Args:
        model: what to describe; not changed.
        max_nodes: write at most this many nodes of each graph and say how many were left out.
    """
    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in model.opset_imports.items())
    lines = [f"model '{model.graph.name or ''}'  IR {model.ir_version}  opset {opsets}"]
    lines += [f"  {key}: {_shorten(text)}" for key, text in model.metadata_props.items()]
    lines += _graph_lines(model.graph, indent="", max_nodes=max_nodes)
    for function in model.functions.values():
        inputs = ", ".join(_value_name(value) for value in function.inputs)
        outputs = ", ".join(_value_name(value) for value in function.outputs)
        lines.append(f"function {function.domain}::{function.name}({inputs}) -> ({outputs})")
        lines += _node_lines(function.graph, indent="  ", max_nodes=max_nodes)
    return "\n".join(lines)


def format_node(node: ir.Node) -> str:
    """One line: ``y: FLOAT[batch,64] = MatMul(x, w) {…}  # name``; subgraphs are only counted."""
    outputs = ", ".join(format_value(value) for value in node.outputs)
    inputs = ", ".join(_value_name(value) for value in node.inputs)
    op = node.op_type if not node.domain else f"{node.domain}::{node.op_type}"
    attributes = ", ".join(f"{name}={_format_attribute(a)}" for name, a in node.attributes.items())
    text = f"{outputs} = {op}({inputs})" + (f" {{{attributes}}}" if attributes else "")
    return text + (f"  # {node.name}" if node.name else "")


def format_value(value: ir.Value | None) -> str:
    """``name: FLOAT[batch,64]``, as much of it as is known."""
    if value is None:
        return "∅"
    return f"{_value_name(value)}: {format_type(value)}"


def format_type(value: ir.Value) -> str:
    """``FLOAT[batch,64]``; ``?`` stands for what is not known."""
    if value.type is not None and not isinstance(value.type, ir.TensorType):
        return str(value.type)
    dtype = value.dtype.name if value.dtype is not None else "?"
    if value.shape is None:
        return f"{dtype}[…]"
    return f"{dtype}[{','.join(str(dim) if str(dim) != 'None' else '?' for dim in value.shape)}]"


def module_scope(node: ir.Node) -> str | None:
    """The path of the torch module that ``node`` came from, such as ``model.layers.0.mlp``, if known."""
    text = node.metadata_props.get(SCOPES_KEY)
    if not text:
        return None
    # The text is a list of nested scopes, outermost first; the last entry names the operation itself.
    names = [part.strip().strip("'\"") for part in text.strip("[]").split(",")]
    return names[-2] if len(names) > 1 else None


def _graph_lines(graph: ir.Graph, *, indent: str, max_nodes: int | None) -> Iterator[str]:
    yield from (f"{indent}input  {format_value(value)}" for value in graph.inputs)
    yield from (f"{indent}weight {_format_weight(value)}" for value in graph.initializers.values())
    yield from _node_lines(graph, indent=indent + "  ", max_nodes=max_nodes)
    yield from (f"{indent}output {format_value(value)}" for value in graph.outputs)


def _node_lines(graph: ir.Graph, *, indent: str, max_nodes: int | None) -> Iterator[str]:
    scope: str | None = None
    for index, node in enumerate(graph):
        if max_nodes is not None and index >= max_nodes:
            yield f"{indent}… {len(graph) - index} more nodes"
            return
        here = module_scope(node)
        if here is not None and here != scope:
            yield f"{indent}# {here}"
            scope = here
        yield indent + format_node(node)
        for subgraph in subgraphs_of(node):
            yield f"{indent}  graph '{subgraph.name or ''}'"
            yield from _graph_lines(subgraph, indent=indent + "    ", max_nodes=max_nodes)


def _format_weight(value: ir.Value) -> str:
    tensor = value.const_value
    if tensor is None:
        return f"{format_value(value)}  (no data)"
    head = f"{_value_name(value)}: {tensor.dtype.name}[{','.join(map(str, tensor.shape))}]"
    if tensor.size <= _MAX_ELEMENTS:
        return f"{head} = {tensor.numpy().tolist()}"
    return f"{head}  ({format_bytes(tensor.nbytes)})" if tensor.dtype != ir.DataType.STRING else head


def format_bytes(count: int) -> str:
    """``1234567`` → ``1.2 MB`` (powers of 1000)."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def _format_attribute(attribute: ir.Attr) -> str:
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return "<graph>"
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.value
        if tensor.size <= _MAX_ELEMENTS:
            return str(tensor.numpy().tolist())
        return f"{tensor.dtype.name}[{','.join(map(str, tensor.shape))}]"
    return _shorten(str(attribute.value))


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _value_name(value: ir.Value | None) -> str:
    return "∅" if value is None else (value.name or "_")
