"""What the ops that appear in shape arithmetic and small constants compute, in numpy.

Only ops whose numpy result is the one that ONNX prescribes are listed; where the two differ for some operands
(division of negative integers, casts out of range), the entry refuses them. A node that is not listed, or
that is refused, simply stays in the graph. Quantised weights (DequantizeLinear) and random ops are left out
on purpose: folding those would undo a compression or freeze a random number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from .graph_edits import Array, integer, is_op

Operands = list[Array | None]
Evaluator = Callable[[ir.Node, Operands, int], Array | None]

NATIVE = frozenset(
    {
        ir.DataType.BOOL,
        ir.DataType.INT8,
        ir.DataType.INT16,
        ir.DataType.INT32,
        ir.DataType.INT64,
        ir.DataType.UINT8,
        ir.DataType.UINT16,
        ir.DataType.UINT32,
        ir.DataType.UINT64,
        ir.DataType.FLOAT16,
        ir.DataType.BFLOAT16,
        ir.DataType.FLOAT,
        ir.DataType.DOUBLE,
    }
)
"""Element types whose arithmetic in numpy is that of ONNX: computed, then rounded to nearest even."""


def evaluate(node: ir.Node, operands: Operands, limit: int) -> Array | None:
    """The only output of ``node``, or ``None`` if it is not known or has more than ``limit`` elements."""
    if not can_evaluate(node):
        return None
    try:
        with np.errstate(all="ignore"):  # the runtime does not warn about overflow either
            result = EVALUATORS[node.op_type](node, operands, limit)
    except (ValueError, IndexError):
        # Operands that do not fit fail when the node runs, which may be never: a branch that is not taken.
        return None
    return None if result is None or result.size > limit else np.asarray(result)


def can_evaluate(node: ir.Node) -> bool:
    """Whether :func:`evaluate` knows the op."""
    return node.op_type in EVALUATORS and is_op(node, node.op_type) and len(node.outputs) == 1


def _elementwise(function: Callable[..., Any]) -> Evaluator:
    def run(node: ir.Node, operands: Operands, limit: int) -> Array | None:
        del node
        if any(operand is None for operand in operands):
            return None
        arrays = [operand for operand in operands if operand is not None]
        if math.prod(np.broadcast_shapes(*(array.shape for array in arrays))) > limit:
            return None
        result = function(*arrays)
        return None if result is None else np.asarray(result)

    return run


def _variadic(function: Callable[..., Any]) -> Evaluator:
    def fold(*arrays: Array) -> Any:
        result = arrays[0]
        for array in arrays[1:]:
            result = function(result, array)
        return result

    return _elementwise(fold)


def _divide(left: Array, right: Array) -> Any:
    if left.dtype.kind not in "iu":
        return np.divide(left, right)
    if np.any(right == 0):
        return None
    # ONNX divides integers towards zero, numpy towards minus infinity.
    quotient = np.floor_divide(left, right)
    return (quotient + ((quotient < 0) & (quotient * right != left))).astype(left.dtype)


def _power(base: Array, exponent: Array) -> Any:
    if base.dtype.kind in "iu":
        return None  # runtimes disagree about integer powers
    return np.power(base, exponent).astype(base.dtype)


def _modulo(node: ir.Node, operands: Operands, limit: int) -> Array | None:
    left, right = operands[0], operands[1]
    if left is None or right is None or left.dtype.kind not in "iu" or np.any(right == 0):
        return None
    return _elementwise(np.fmod if integer(node, "fmod", 0) else np.mod)(node, operands, limit)


def convert(array: Array, target: ir.DataType) -> Array | None:
    """Cast to another element type; ``None`` where ONNX leaves the result to the runtime."""
    if target not in NATIVE:
        return None
    dtype = target.numpy()
    to_integer = np.dtype(dtype).kind in "iu"
    if to_integer and array.dtype.kind not in "iub":
        information = np.iinfo(dtype)
        wide = array.astype(np.float64)
        if not np.all(np.isfinite(wide)) or np.any((wide < information.min) | (wide > information.max)):
            return None
    return array.astype(dtype)


def _cast(node: ir.Node, operands: Operands, limit: int) -> Array | None:
    del limit
    return None if operands[0] is None else convert(operands[0], ir.DataType(integer(node, "to", 0)))


def _cast_like(node: ir.Node, operands: Operands, limit: int) -> Array | None:
    del limit
    like = node.inputs[1]
    if operands[0] is None or like is None or like.dtype is None:
        return None
    return convert(operands[0], like.dtype)


def _reshape(node: ir.Node, operands: Operands, limit: int) -> Array | None:
    del limit
    data, shape = operands[0], operands[1]
    if data is None or shape is None:
        return None
    target = [int(dim) for dim in shape]
    if not integer(node, "allowzero", 0):
        if any(dim == 0 and axis >= data.ndim for axis, dim in enumerate(target)):
            return None
        target = [data.shape[axis] if dim == 0 else dim for axis, dim in enumerate(target)]
    if -1 in target and 0 in target:
        return None
    return data.reshape(target)


def _axes(node: ir.Node, operands: Operands) -> list[int] | None:
    """Axes: an attribute before opset 13, an input since; ``None`` if neither is there or known."""
    if "axes" in node.attributes:
        return list(node.attributes["axes"].as_ints())
    if len(operands) > 1 and operands[1] is not None:
        return [int(axis) for axis in operands[1].reshape(-1)]
    return None


def _squeeze(node: ir.Node, operands: Operands, limit: int) -> Array | None:
    del limit
    if operands[0] is None:
        return None
    axes = _axes(node, operands)
    return np.squeeze(operands[0], None if axes is None else tuple(axes))


def _unsqueeze(node: ir.Node, operands: Operands, limit: int) -> Array | None:
    del limit
    axes = _axes(node, operands)
    return None if operands[0] is None or axes is None else np.expand_dims(operands[0], tuple(axes))


def _transpose(node: ir.Node, operands: Operands, limit: int) -> Array | None:
    data = operands[0]
    if data is None or data.size > limit:
        return None
    permutation = node.attributes.get("perm")
    return np.asarray(data.transpose(None if permutation is None else permutation.as_ints()), order="C")


def _concat(node: ir.Node, operands: Operands, limit: int) -> Array | None:
    arrays = [operand for operand in operands if operand is not None]
    if len(arrays) != len(operands) or sum(array.size for array in arrays) > limit:
        return None
    return np.concatenate(arrays, axis=integer(node, "axis", 0))


def _slice(node: ir.Node, operands: Operands, limit: int) -> Array | None:
    data = operands[0]
    if data is None or len(operands) < 3 or operands[1] is None or operands[2] is None:
        return None
    starts, ends = operands[1].reshape(-1).tolist(), operands[2].reshape(-1).tolist()
    given_axes = operands[3] if len(operands) > 3 else None
    given_steps = operands[4] if len(operands) > 4 else None
    axes = list(range(len(starts))) if given_axes is None else given_axes.reshape(-1).tolist()
    steps = [1] * len(starts) if given_steps is None else given_steps.reshape(-1).tolist()
    if any(step < 1 for step in steps):
        return None  # a negative end means something else when walking backwards
    index = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[axis] = slice(start, end, step)
    view = data[tuple(index)]
    return None if view.size > limit else np.asarray(view, order="C")


def _gather(node: ir.Node, operands: Operands, limit: int) -> Array | None:
    data, indices = operands[0], operands[1]
    axis = integer(node, "axis", 0)
    if data is None or indices is None or data.ndim == 0:
        return None
    extent = data.shape[axis]
    if extent == 0 or indices.size * (data.size // extent) > limit:
        return None
    if np.any((indices < -extent) | (indices >= extent)):
        return None
    return np.take(data, indices, axis=axis)


def _expand(node: ir.Node, operands: Operands, limit: int) -> Array | None:
    del node
    data, shape = operands[0], operands[1]
    if data is None or shape is None:
        return None
    target = np.broadcast_shapes(data.shape, tuple(int(dim) for dim in shape))
    return None if math.prod(target) > limit else np.asarray(np.broadcast_to(data, target), order="C")


def _tile(node: ir.Node, operands: Operands, limit: int) -> Array | None:
    del node
    data, repeats = operands[0], operands[1]
    if data is None or repeats is None or data.size * math.prod(int(n) for n in repeats) > limit:
        return None
    return np.tile(data, [int(n) for n in repeats])


def _range(node: ir.Node, operands: Operands, limit: int) -> Array | None:
    del node
    start, stop, step = operands
    if start is None or stop is None or step is None or start.dtype.kind not in "iu":
        return None  # float ranges accumulate differently in different runtimes
    first, last, stride = int(start.reshape(())), int(stop.reshape(())), int(step.reshape(()))
    if stride == 0 or len(range(first, last, stride)) > limit:
        return None
    return np.arange(first, last, stride, dtype=start.dtype)


def _constant_of_shape(node: ir.Node, operands: Operands, limit: int) -> Array | None:
    shape = operands[0]
    if shape is None or math.prod(int(dim) for dim in shape) > limit:
        return None
    value = node.attributes.get("value")
    fill = np.zeros(1, np.float32) if value is None else value.as_tensor().numpy()
    return np.full([int(dim) for dim in shape], fill.reshape(()), dtype=fill.dtype)


def _shape_slice(node: ir.Node, extent: int) -> slice:
    """Which dimensions ``Shape`` returns; ``start`` and ``end`` clamp like a Python slice."""
    end = node.attributes.get("end")
    return slice(*slice(integer(node, "start", 0), None if end is None else end.as_int()).indices(extent))


def static_shape(node: ir.Node) -> Array | None:
    """What a ``Shape`` or ``Size`` node returns when every dimension that it asks for is a known integer."""
    value = node.inputs[0]
    if value is None or value.shape is None:
        return None
    dims = list(value.shape)
    if node.op_type == "Shape":
        dims = dims[_shape_slice(node, len(dims))]
    known = [dim for dim in dims if isinstance(dim, int)]
    if len(known) != len(dims):
        return None
    return np.array(known if node.op_type == "Shape" else math.prod(known), dtype=np.int64)


def _reduce(function: Callable[..., Any]) -> Evaluator:
    def run(node: ir.Node, operands: Operands, limit: int) -> Array | None:
        del limit
        data = operands[0]
        if data is None or data.dtype.kind not in "iu" or data.size == 0:
            return None  # sums of floats depend on the order
        axes = _axes(node, operands)
        if not axes and integer(node, "noop_with_empty_axes", 0):
            return data
        keep = bool(integer(node, "keepdims", 1))
        result = function(data, axis=tuple(axes) if axes else None, keepdims=keep, dtype=data.dtype)
        return np.asarray(result)

    return run


def _where(condition: Array, left: Array, right: Array) -> Any:
    return np.where(condition, left, right)


EVALUATORS: dict[str, Evaluator] = {
    "Abs": _elementwise(np.abs),
    "Add": _elementwise(np.add),
    "And": _elementwise(np.logical_and),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Ceil": _elementwise(np.ceil),
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Cos": _elementwise(np.cos),
    "Div": _elementwise(_divide),
    "Equal": _elementwise(np.equal),
    "Exp": _elementwise(np.exp),
    "Expand": _expand,
    "Floor": _elementwise(np.floor),
    "Gather": _gather,
    "Greater": _elementwise(np.greater),
    "GreaterOrEqual": _elementwise(np.greater_equal),
    "Identity": _elementwise(lambda array: array),
    "Less": _elementwise(np.less),
    "LessOrEqual": _elementwise(np.less_equal),
    "Log": _elementwise(np.log),
    "Max": _variadic(np.maximum),
    "Min": _variadic(np.minimum),
    "Mod": _modulo,
    "Mul": _elementwise(np.multiply),
    "Neg": _elementwise(np.negative),
    "Not": _elementwise(np.logical_not),
    "Or": _elementwise(np.logical_or),
    "Pow": _elementwise(_power),
    "Range": _range,
    "Reciprocal": _elementwise(lambda array: (1 / array).astype(array.dtype)),
    "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum),
    "Reshape": _reshape,
    "Sin": _elementwise(np.sin),
    "Slice": _slice,
    "Sqrt": _elementwise(np.sqrt),
    "Squeeze": _squeeze,
    "Sub": _elementwise(np.subtract),
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _elementwise(_where),
    "Xor": _elementwise(np.logical_xor),
}
"""Evaluators by op type: (node, operands, most elements of the result) to the result."""

__all__ = ["EVALUATORS", "NATIVE", "can_evaluate", "convert", "evaluate", "static_shape"]
