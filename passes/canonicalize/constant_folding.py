"""Constants become initializers, and what depends only on constants is computed now.

    Constant → initializer,    f(c₁, c₂, …) → initializer,    Shape(x) with static dimensions → initializer

A folded initializer has the name of the value it replaces. Large tensors are neither computed nor copied:
results above ``limit`` elements, and sizeable results larger than what they are computed from, stay nodes, so
that nothing compressed (an int8 weight behind Cast or DequantizeLinear) is expanded. Equal small constants
become one initializer. Constants that are graph outputs stay nodes: an output must be computed by a node.
"""

from __future__ import annotations

import onnx_ir as ir

from ...ir.walk import graphs
from .evaluate import NATIVE, can_evaluate, evaluate, static_shape
from .graph_edits import (
    Array,
    add_initializer,
    constant_tensor,
    is_op,
    opset,
    retire,
    sweep,
)

OLDEST_OPSET = 13
"""Before it, axes are attributes and some ops do not broadcast; such models are left alone."""

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})

SIZEABLE = 1 << 16
"""Bytes above which a result must not be larger than its operands."""

POOLED = 64
"""Elements up to which equal constants are made one."""


def fold_constants(model: ir.Model, *, limit: int) -> dict[str, int]:
    """Lift and fold the constants of every graph. ``limit``: elements of the largest result computed."""
    statistics = {"constants-lifted": 0, "constants-folded": 0}
    if opset(model) < OLDEST_OPSET:
        return statistics
    for graph in graphs(model):
        pool: dict[tuple[object, ...], ir.Value] = {}
        for node in sweep(graph):
            if len(node.outputs) != 1 or node.outputs[0].is_graph_output():
                continue
            if is_op(node, "Constant"):
                tensor = ir.convenience.get_const_tensor(node.outputs[0])
                statistics["constants-lifted"] += tensor is not None and _replace(node, tensor, pool)
            elif (array := _evaluate(node, limit)) is not None:
                tensor = ir.tensor(array, name=node.outputs[0].name)
                statistics["constants-folded"] += _replace(node, tensor, pool)
    return statistics


def _evaluate(node: ir.Node, limit: int) -> Array | None:
    """The constant result of a node, if all it depends on is constant."""
    if is_op(node, "Shape", "Size"):
        return static_shape(node)
    if not can_evaluate(node):
        return None
    if node.op_type == "Transpose" and node.inputs[0] is not None and node.inputs[0].dtype in FLOATS:
        return None  # weights: folded without a copy, and only where nothing else reads them
    # CastLike reads only the type of its second input.
    read = node.inputs[:1] if node.op_type == "CastLike" else node.inputs
    operands: list[Array | None] = []
    for value in read:
        tensor = constant_tensor(value)
        if value is not None and (tensor is None or tensor.dtype not in NATIVE or tensor.size > limit):
            return None
        operands.append(None if tensor is None else tensor.numpy())
    result = evaluate(node, operands, limit)
    if result is None or result.nbytes > max(SIZEABLE, sum(o.nbytes for o in operands if o is not None)):
        return None
    return result


def _replace(node: ir.Node, tensor: ir.TensorProtocol, pool: dict[tuple[object, ...], ir.Value]) -> bool:
    """Put an initializer, or an equal one of this graph, in the place of ``node``."""
    assert isinstance(node.graph, ir.Graph)
    output = node.outputs[0]
    key = None
    if tensor.dtype in NATIVE and tensor.size <= POOLED:
        key = (tensor.dtype, tuple(tensor.shape), tensor.tobytes())
    value = pool.get(key) if key is not None else None
    if value is None:
        assert output.name is not None
        value = add_initializer(node.graph, tensor, output.name)
        value.metadata_props.update(output.metadata_props)
        if key is not None:
            pool[key] = value
    output.replace_all_uses_with(value)
    retire(node)
    return True
