"""``planish::DynamicQuantizedLinear``: integer weights times activations that are quantised at run time.

    Y[..., N] = (Xq · Wq)[..., N] · x_scale · scale[N] (+ bias[N]),   Wq = W[K, N] − zero_point[N]

The product is of integers, accumulated in 32 bits. The overload says how activations become integers:

- ``tensor``: one asymmetric uint8 grid for the whole of X (``DynamicQuantizeLinear``). Every runtime's fast
  kernel is this one.
- ``token``: one symmetric grid per token, x_scale[..., 1] = max|x| / 127 over the last axis. The integers are
  stored as uint8 around 128, which keeps the function and lets unsigned-by-signed kernels run it. One token's
  outlier no longer coarsens the others, and a sentence's result does not depend on the rest of its batch.
- ``token_narrow``: the same with activations of ``activation_bits`` b = 2 … 8 and weights of any width:
  x_scale = activation_clip · max|x| / (2^(b−1) − 1), Xq = round(x / x_scale) clamped to
  [−2^(b−1), 2^(b−1) − 1] and stored as uint8 around 2^(b−1). Weights in 4-bit containers are widened to
  int8; their zero points are int8.
- ``token_block``: activations as in ``token_narrow``; blocks of B rows of a column share a scale, as in
  ``QuantizedLinear``: Y = (Xq · x_scale) · ((W − zero_point) · scale), ``scale`` [K / B, N], in float.

``_bias`` ends the names of the overloads that add a bias. X, scale, bias and Y are float32. W is int8 or
uint8, or int4 or uint4 in the last two, quantised per output channel or in blocks. Inputs X, W, scale,
zero_point, bias.
"""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from ..errors import ModelError
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

# 1.1754944e-38 is the smallest normal float32: a token of zeros divides by it instead of by zero.
_TOKEN_CONSTANTS = """
  last_axis = Constant <value_ints: ints = [-1]> ()
  tiny = Constant <value_float: float = 1.1754944e-38> ()
"""
_TOKEN_GRID = """
  levels = Constant <value_float: float = 127.0> ()
  middle = Constant <value_float: float = 128.0> ()
  magnitudes = Abs (X)
  largest = ReduceMax <keepdims: int = 1> (magnitudes, last_axis)
  largest_scaled = Div (largest, levels)
  x_scale = Max (largest_scaled, tiny)
  x_scaled = Div (X, x_scale)
  x_rounded = Round (x_scaled)
"""
_NARROW_GRID = """
  bits = Constant <value_int: int = @activation_bits> ()
  bits_float = Cast <to: int = 1> (bits)
  one = Constant <value_float: float = 1.0> ()
  two = Constant <value_float: float = 2.0> ()
  clip = Constant <value_float: float = @activation_clip> ()
  magnitude_bits = Sub (bits_float, one)
  middle = Pow (two, magnitude_bits)
  lowest = Neg (middle)
  levels = Sub (middle, one)
  magnitudes = Abs (X)
  largest = ReduceMax <keepdims: int = 1> (magnitudes, last_axis)
  covered = Mul (largest, clip)
  covered_scaled = Div (covered, levels)
  x_scale = Max (covered_scaled, tiny)
  x_scaled = Div (X, x_scale)
  x_nearest = Round (x_scaled)
  x_rounded = Clip (x_nearest, lowest, levels)
"""
# Columns are scaled first and tokens after: with one product of both scales, onnxruntime 1.31 takes the nodes
# for the ``tensor`` form, fuses them with the bias, and uses the first token's scale for all of them.
_TOKEN_PRODUCT = """
  x_shifted = Add (x_rounded, middle)
  x_quantized = Cast <to: int = 2> (x_shifted)
  x_zero_point = Cast <to: int = 2> (middle)
  accumulator = MatMulInteger (x_quantized, WEIGHT, x_zero_point, zero_point)
  accumulated = Cast <to: int = 1> (accumulator)
  scaled_columns = Mul (accumulated, scale)
  product = Mul (scaled_columns, x_scale)
"""
_WIDENED = "  widened = Cast <to: int = @integer_dtype> (W)\n"
_BLOCK_PRODUCT = """
  x_dequantized = Mul (x_rounded, x_scale)
  weight = DequantizeLinear <axis: int = 0, block_size: int = @block_size> (W, scale, zero_point)
  product = MatMul (x_dequantized, weight)
"""

_NARROW = "bits, activation_bits, activation_clip"
_BODIES = {
    "tensor": ("bits", _TENSOR),
    "token": ("bits", _TOKEN_CONSTANTS + _TOKEN_GRID + _TOKEN_PRODUCT.replace("WEIGHT", "W")),
    "token_narrow": (
        f"{_NARROW}, integer_dtype",
        _TOKEN_CONSTANTS + _NARROW_GRID + _WIDENED + _TOKEN_PRODUCT.replace("WEIGHT", "widened"),
    ),
    "token_block": (f"{_NARROW}, block_size", _TOKEN_CONSTANTS + _NARROW_GRID + _BLOCK_PRODUCT),
}

DEFINITIONS = {
    overload: OpDefinition(
        OP_TYPE,
        overload,
        f"<{attributes}> (X, W, scale, zero_point{', bias' if has_bias else ''}) => (Y)",
        body + "  Y = Add (product, bias)\n" if has_bias else body.replace("  product =", "  Y ="),
    )
    for form, (attributes, body) in _BODIES.items()
    for overload, has_bias in ((form, False), (f"{form}_bias", True))
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
    activation_bits: int = 8,
    activation_clip: float = 1.0,
    block_size: int = 0,
    name: str | None = None,
) -> tuple[ir.Node, OpDefinition]:
    """A node of the op and the definition that its model must hold (see `define`).

    The overload is the plainest one that says what is asked for.

    Args:
        x: [..., K] float32.
        weight: [K, N] int8 or uint8; int4 or uint4 for granularity ``token``.
        scale: [N] float32, or [K / block_size, N].
        zero_point: shape of ``scale``; none means 0. Its dtype is that of ``weight``, but int8 where a
            4-bit weight has one scale per channel.
        bias: [N] float32.
        bits: how many bits of the container the weights use, 2 to 8.
        granularity: what shares a grid at run time: the whole tensor or each token.
        activation_bits: of the activations' grid, 2 to 8; 8 for granularity ``tensor``.
        activation_clip: the part of a token's largest magnitude that its grid covers, in (0, 1].
        block_size: rows of the weight that share a scale; 0 for one scale per output channel.
        name: the node's name.

    Raises:
        ModelError: a combination that no overload has.
    """
    if not 2 <= activation_bits <= 8 or not 0 < activation_clip <= 1:
        raise ModelError(
            f"DynamicQuantizedLinear {name!r}: expected activations of 2 to 8 bits and a clip in (0, 1], "
            f"found {activation_bits} and {activation_clip:g}"
        )
    narrow = _is_4_bit(weight) or activation_bits < 8 or activation_clip < 1
    if granularity == "tensor" and (narrow or block_size):
        raise ModelError(
            f"DynamicQuantizedLinear {name!r}: one grid for the whole tensor takes 8-bit weights per channel "
            f"and 8-bit activations",
            hint='use granularity "token"',
        )
    form = "token_block" if block_size else "token_narrow" if narrow else granularity
    attributes: dict[str, int | float] = {"bits": bits}
    if block_size or narrow:
        attributes |= {"activation_bits": activation_bits, "activation_clip": float(activation_clip)}
    if block_size:
        attributes["block_size"] = block_size
    elif narrow:
        unsigned = weight.dtype == ir.DataType.UINT8
        attributes["integer_dtype"] = int(ir.DataType.UINT8 if unsigned else ir.DataType.INT8)
    definition = DEFINITIONS[form if bias is None else f"{form}_bias"]
    node = ir.node(
        OP_TYPE,
        [x, weight, scale, zero_point] + ([] if bias is None else [bias]),
        attributes,
        domain=DOMAIN,
        overload=definition.overload,
        name=name,
    )
    set_linear_output(node.outputs[0], x, weight)
    return node, definition


def _is_4_bit(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.INT4, ir.DataType.UINT4)
