"""``QuantizedConv``: the weight becomes floats once, when onnxruntime loads the model.

    weight[O, I / group, …kernel] = (Cast(W) − Cast(zero_point)) · scale,  one scale per output channel

The body's ``DequantizeLinear`` would run at every call. onnxruntime's integer convolutions need quantised
activations, which the op does not have, so there is nothing to measure.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...ir import ops
from ...ir.errors import TargetError
from .float_weights import emit_cast
from .graph_builder import GraphBuilder
from .linear_op import constant_of

CONV_KERNEL = "Conv of weights dequantised at load"
CONV_REASON = "the only kernel of float activations; the body would dequantise at every run"
_FORM = ("strides", "pads", "dilations", "group")


def emit_conv(build: GraphBuilder, node: ir.Node) -> ir.Value:
    """Append the nodes for ``node``, a ``QuantizedConv``.

    Raises:
        TargetError: the weight or its scale is missing or not constant.
    """
    x, weight, scale = node.inputs[:3]
    if x is None or weight is None or scale is None:
        raise TargetError(f"node {node.name!r}: {node.op_type} lacks its input, weight or scale")
    zero_point, bias = ops.operand(node, "zero_point"), ops.operand(node, "bias")
    rank = len(constant_of(weight).shape)
    dtype = constant_of(scale).dtype
    by_channel = build.constant(np.array([-1] + (rank - 1) * [1], np.int64), "by_channel")

    def per_channel(value: ir.Value) -> ir.Value:
        return build.op("Reshape", emit_cast(build, value, ir.DataType.FLOAT), by_channel)

    values = emit_cast(build, weight, ir.DataType.FLOAT)
    if zero_point is not None:
        values = build.op("Sub", values, per_channel(zero_point))
    scaled = build.op("Mul", values, per_channel(scale))
    scaled.dtype = ir.DataType.FLOAT
    form = {name: node.attributes[name].value for name in _FORM}
    return build.op("Conv", x, emit_cast(build, scaled, dtype), bias, **form)
