"""``planish::StaticQuantizedLinear``: integer weights times activations on one fixed 8-bit grid.

    Y[..., N] = x̂[..., K] · ((W[K, N] − zero_point[N]) · scale[N]) (+ bias[N])
    x̂ = (clamp(round(x / x_scale) + x_zero_point) − x_zero_point) · x_scale

The grid of the activations, ``x_scale`` (float32 scalar) and ``x_zero_point`` (uint8 or int8 scalar, whose
range is the clamp's), was chosen on calibration data and is the same for all inputs. The body is the QDQ form
QuantizeLinear → DequantizeLinear → MatMul, which runtimes fuse into one product of integers.

Weights are int8 or uint8, or int4 or uint4, one scale per output channel. X, scales, bias and Y are float32.
``bias`` names the overload with a bias. Inputs X, W, scale, zero_point, x_scale, x_zero_point, bias.
"""

from __future__ import annotations

import onnx_ir as ir

from .definition import DOMAIN, OpDefinition
from .quantized_linear import set_linear_output

OP_TYPE = "StaticQuantizedLinear"

_INPUTS = "X, W, scale, zero_point, x_scale, x_zero_point"
_OPERANDS = """
  x_quantized = QuantizeLinear (X, x_scale, x_zero_point)
  x_dequantized = DequantizeLinear (x_quantized, x_scale, x_zero_point)
  weight = DequantizeLinear <axis: int = 1> (W, scale, zero_point)
"""
PLAIN = OpDefinition(
    OP_TYPE, "", f"<bits> ({_INPUTS}) => (Y)", _OPERANDS + "  Y = MatMul (x_dequantized, weight)\n"
)
BIAS = OpDefinition(
    OP_TYPE,
    "bias",
    f"<bits> ({_INPUTS}, bias) => (Y)",
    _OPERANDS + "  product = MatMul (x_dequantized, weight)\n  Y = Add (product, bias)\n",
)
DEFINITIONS = {definition.overload: definition for definition in (PLAIN, BIAS)}


def static_quantized_linear(
    x: ir.Value,
    weight: ir.Value,
    scale: ir.Value,
    x_scale: ir.Value,
    x_zero_point: ir.Value,
    zero_point: ir.Value | None = None,
    bias: ir.Value | None = None,
    *,
    bits: int = 8,
    name: str | None = None,
) -> tuple[ir.Node, OpDefinition]:
    """A node of the op and the definition that its model must hold (see `define`).

    Args:
        x: [..., K] float32.
        weight: [K, N] int8, uint8, int4 or uint4.
        scale: [N] float32.
        x_scale: scalar float32.
        x_zero_point: scalar uint8 or int8.
        zero_point: [N], dtype of ``weight``; none means 0.
        bias: [N] float32.
        bits: how many bits of the container the weights use, 2 to 8.
        name: the node's name.
    """
    definition = PLAIN if bias is None else BIAS
    node = ir.node(
        OP_TYPE,
        [x, weight, scale, zero_point, x_scale, x_zero_point] + ([] if bias is None else [bias]),
        {"bits": bits},
        domain=DOMAIN,
        overload=definition.overload,
        name=name,
    )
    set_linear_output(node.outputs[0], x, weight)
    return node, definition
