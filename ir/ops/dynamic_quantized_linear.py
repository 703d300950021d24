"""``planish::DynamicQuantizedLinear``: integer weights times activations that are quantised at run time.

    Y[..., N] = (Xq · Wq)[..., N] · x_scale · scale[N] (+ bias[N]),   Wq = W[K, N] − zero_point[N]

The product is of integers, accumulated in 32 bits. The overload says how activations become integers:

- ``tensor``: one asymmetric uint8 grid for the whole of X (``DynamicQuantizeLinear``). Every runtime's fast
  kernel is this one.
- ``token``: one symmetric grid per token, x_scale[..., 1] = max|x| / 127 over the last axis. The integers are
  stored as uint8 around 128, which keeps the function and lets unsigned-by-signed kernels run it. One token's
  outlier no longer coarsens the others, and a sentence's result does not depend on the rest of its batch.

``_bias`` ends the names of the overloads that add a bias. X, scale, bias and Y are float32. W is int8 or
uint8, quantised per output channel.
"""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from .definition import DOMAIN, OpDefinition
from .quantized_linear import set_linear_output

OP_TYPE = "DynamicQuantizedLinear"

Granularity = Literal["tensor", "token"]

_TENSOR = """
  x_quantized, x_scale, x_zero_point = DynamicQuantizeLinear (X)
  accumulator = MatMulInteger (x_quantized, W, x_zero_point, zero_point)
  accumulated = Cast <to: int = 1> (accumulator)
  product_scale = Mul (x_scale, scale)
  product = Mul (accumulated, product_scale)
"""

# Columns are scaled first and tokens after: with one product of both scales, onnxruntime 1.31 takes the nodes
# for the ``tensor`` form, fuses them with the bias, and uses the first token's scale for all of them.
# 1.1754944e-38 is the smallest normal float32: a token of zeros divides by it instead of by zero.
_TOKEN = """
  last_axis = Constant <value_ints: ints = [-1]> ()
  levels = Constant <value_float: float = 127.0> ()
  tiny = Constant <value_float: float = 1.1754944e-38> ()
  middle = Constant <value_float: float = 128.0> ()
  magnitudes = Abs (X)
  largest = ReduceMax <keepdims: int = 1> (magnitudes, last_axis)
  largest_scaled = Div (largest, levels)
  x_scale = Max (largest_scaled, tiny)
  x_scaled = Div (X, x_scale)
  x_rounded = Round (x_scaled)
  x_shifted = Add (x_rounded, middle)
  x_quantized = Cast <to: int = 2> (x_shifted)
  x_zero_point = Cast <to: int = 2> (middle)
  accumulator = MatMulInteger (x_quantized, W, x_zero_point, zero_point)
  accumulated = Cast <to: int = 1> (accumulator)
  scaled_columns = Mul (accumulated, scale)
  product = Mul (scaled_columns, x_scale)
"""

DEFINITIONS = {
    overload: OpDefinition(
        OP_TYPE,
        overload,
        f"<bits> (X, W, scale, zero_point{', bias' if has_bias else ''}) => (Y)",
        body + "  Y = Add (product, bias)\n" if has_bias else body.replace("  product =", "  Y ="),
    )
    for granularity, body in (("tensor", _TENSOR), ("token", _TOKEN))
    for overload, has_bias in ((granularity, False), (f"{granularity}_bias", True))
}


def dynamic_quantized_linear(
    x: ir.Value,
    weight: ir.Value,
    scale: ir.Value,
    zero_point: ir.Value | None = None,
    bias: ir.Value | None = None,
    *,
    bits: int = 8,
    granularity: Granularity = "tensor",
    name: str | None = None,
) -> tuple[ir.Node, OpDefinition]:
    """A node of the op and the definition that its model must hold (see `define`).

    Args:
        x: [..., K] float32.
        weight: [K, N] int8 or uint8.
        scale: [N] float32.
        zero_point: [N], dtype of ``weight``; none means 0.
        bias: [N] float32.
        bits: how many bits of the container the weights use, 2 to 8.
        granularity: what shares a grid at run time: the whole tensor or each token.
        name: the node's name.
    """
    definition = DEFINITIONS[granularity if bias is None else f"{granularity}_bias"]
    node = ir.node(
        OP_TYPE,
        [x, weight, scale, zero_point] + ([] if bias is None else [bias]),
        {"bits": bits},
        domain=DOMAIN,
        overload=definition.overload,
        name=name,
    )
    set_linear_output(node.outputs[0], x, weight)
    return node, definition
