"""Biases: adding a constant vector to what a linear gives, and constants in the dtype of others."""

from __future__ import annotations

import onnx_ir as ir

from ...ir.views.linears import as_linear
from ..canonicalize.graph_edits import add_initializer
from .vectors import Vectors, read_array


def shift_output(node: ir.Node, shift: Vectors, graph: ir.Graph) -> None:
    """Add ``shift`` [out] to the bias of a linear, which gets one if it has none."""
    linear = as_linear(node)
    assert linear is not None
    if linear.bias is not None and linear.bias_node is not None:
        shifted = read_array(linear.bias) + shift
        index = linear.bias_node.inputs.index(linear.bias)
        set_constant(linear.bias_node, index, tensor_like(shifted, linear.weight, linear.bias.name), graph)
        return
    name = f"{linear.name}.bias"
    bias = add_initializer(graph, tensor_like(shift, linear.weight, name), name)
    if node.op_type == "Gemm":
        node.resize_inputs(3)
        node.replace_input_with(2, bias)
        return
    product = node.outputs[0]
    # Named after the value: nodes need no names, and onnxruntime wants those that there are to be different.
    add = ir.node(
        "Add", [product, bias], name=f"{product.name}.bias", metadata_props=dict(node.metadata_props)
    )
    output = add.outputs[0]
    output.type, output.shape = product.type, product.shape
    ir.convenience.replace_all_uses_with(product, output, replace_graph_outputs=True)
    add.replace_input_with(0, product)
    # The graph's output keeps its name, and every other value a name of its own.
    output.name, product.name = product.name, f"{product.name}.product"
    graph.insert_after(node, add)


def tensor_like(array: Vectors, like: ir.Value, name: str | None) -> ir.TensorProtocol:
    """An array as a tensor of the dtype of another value."""
    assert like.dtype is not None
    return ir.Tensor(array.astype(like.dtype.numpy()), dtype=like.dtype, name=name)


def set_constant(node: ir.Node, index: int, tensor: ir.TensorProtocol, graph: ir.Graph) -> None:
    """Let the node read ``tensor``: under the old name, unless others read that constant too."""
    value = node.inputs[index]
    assert value is not None
    if value.is_initializer() and len(value.uses()) == 1 and not value.is_graph_output():
        value.const_value = tensor
    else:
        node.replace_input_with(index, add_initializer(graph, tensor, str(value.name)))
