"""``planish::QuantizedLinear``: a linear layer whose weight is stored as integers.

    Y[..., N] = X[..., K] · dequantise(W[K, N]) (+ bias[N]),   dequantise(w) = (w − zero_point) · scale

Weights are int4 / uint4 or int8 / uint8 (opset 21 containers); narrower and odd widths live in the next wider
container and say so in ``bits``. Two layouts, both of ``DequantizeLinear``:

- blocked: ``block_size`` B divides K, ``axis`` 0, ``scale`` and ``zero_point`` are [K / B, N];
- per channel: ``block_size`` 0, ``axis`` 1, ``scale`` and ``zero_point`` are [N].

X, scale, bias and Y share one dtype (float32, float16 or bfloat16). A signed weight without zero point is
symmetric. [K, N] with axis 0 is the layout that onnxruntime itself fuses into its low-bit matrix product.
"""

from __future__ import annotations

import onnx_ir as ir

from .definition import DOMAIN, OpDefinition

OP_TYPE = "QuantizedLinear"

_DEQUANTIZE = """
  weight = DequantizeLinear <axis: int = @axis, block_size: int = @block_size> (W, scale, zero_point)
"""

PLAIN = OpDefinition(
    OP_TYPE,
    "",
    "<bits, axis, block_size> (X, W, scale, zero_point) => (Y)",
    _DEQUANTIZE + "  Y = MatMul (X, weight)\n",
)
BIAS = OpDefinition(
    OP_TYPE,
    "bias",
    "<bits, axis, block_size> (X, W, scale, zero_point, bias) => (Y)",
    _DEQUANTIZE + "  product = MatMul (X, weight)\n  Y = Add (product, bias)\n",
)


def quantized_linear(
    x: ir.Value,
    weight: ir.Value,
    scale: ir.Value,
    zero_point: ir.Value | None = None,
    bias: ir.Value | None = None,
    *,
    bits: int,
    block_size: int = 0,
    name: str | None = None,
) -> tuple[ir.Node, OpDefinition]:
    """A node of the op and the definition that its model must hold (see `define`).

    Args:
        x: [..., K] float.
        weight: [K, N] int4, uint4, int8 or uint8.
        scale: [K / block_size, N], or [N] when ``block_size`` is 0; dtype of ``x``.
        zero_point: shape of ``scale``, dtype of ``weight``; none means 0.
        bias: [N], dtype of ``x``.
        bits: how many bits of the container the integers use, 2 to 8.
        block_size: rows of the weight that share a scale; 0 for one scale per output channel.
        name: the node's name.
    """
    definition = PLAIN if bias is None else BIAS
    node = ir.node(
        OP_TYPE,
        [x, weight, scale, zero_point] + ([] if bias is None else [bias]),
        {"bits": bits, "axis": 0 if block_size else 1, "block_size": block_size},
        domain=DOMAIN,
        overload=definition.overload,
        name=name,
    )
    set_linear_output(node.outputs[0], x, weight)
    return node, definition


def set_linear_output(output: ir.Value, x: ir.Value, weight: ir.Value) -> None:
    """Give ``output`` the dtype of ``x`` and the shape [..., N], as far as they are known."""
    if x.dtype is not None:
        output.dtype = x.dtype
    if x.shape is not None and weight.shape is not None:
        output.shape = ir.Shape([*x.shape[:-1], weight.shape[1]])
