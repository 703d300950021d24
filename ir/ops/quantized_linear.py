"""``planish::QuantizedLinear``: a linear layer whose weight is stored in few bits.

    Y[..., N] = X[..., K] · dequantise(W[K, N]) (+ bias[N])

The overload says what ``dequantise`` is. In all of them a block of B rows of one column shares a scale: B
divides K and ``scale`` is [K / B, N], or ``block_size`` is 0 and ``scale`` is [N], one per output channel.

- plain: (w − zero_point) · scale, by ``DequantizeLinear``. W is int4 / uint4 or int8 / uint8 (opset 21
  containers; narrower and odd widths live in the next wider one and say so in ``bits``), with ``zero_point``
  shaped like ``scale``; a signed weight without zero point is symmetric. Or W is FLOAT8E4M3FN or FLOAT8E5M2,
  without zero point. Inputs X, W, scale, zero_point.
- ``codebook``: codebook[w] · scale, W unsigned indices into ``codebook`` [2^bits] float32. Scales are floats
  or FLOAT8E4M3FN. NF4 and FP4 are code books; NVFP4 is the FP4 code book times the tensor's float32 scale,
  with FLOAT8E4M3FN scales per 16 rows. Inputs X, W, scale, codebook.
- ``codebook_exponent``: the same with scales 2^(scale − 127), ``scale`` uint8: the bits of FLOAT8E8M0, which
  onnxruntime 1.31 has no kernel for. MXFP4 is the FP4 code book with such scales per 32 rows.
- ``bilevel``: (w − z) · s, where s and z are small integers with a grid of their own, as in SpQR
  (https://arxiv.org/abs/2306.03078): s = (scale − scale_zero) · scale_scale and
  z = (zero_point − zero_zero) · zero_scale. ``scale`` and ``zero_point`` are uint4 or uint8; C neighbouring
  columns share a second-level grid, four float tensors [K / B, ⌈N / C⌉], C in ``second_block_size``. Inputs
  X, W, scale, zero_point, scale_scale, scale_zero, zero_scale, zero_zero.

``_outliers`` names overloads in which some weights are kept as they were: ``outlier_values`` [nnz] replace
the dequantised weights at the positions CumSum(``outlier_gaps`` [nnz]) of W flattened. Gaps between sorted
positions fit 16 bits, where positions need 32. ``_bias`` names overloads with a bias, always the last input.

X, bias and Y share one dtype (float32, float16 or bfloat16), and so does the plain overload's scale. [K, N]
with blocks along axis 0 is the layout that onnxruntime itself fuses into its low-bit matrix product. The
bodies but the plain one are constant expressions of the weight, which onnxruntime evaluates when it loads.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..errors import ModelError
from .definition import DOMAIN, OpDefinition

OP_TYPE = "QuantizedLinear"

_PLAIN = """
  dequantized = DequantizeLinear <axis: int = @axis, block_size: int = @block_size> (W, scale, zero_point)
"""

# [K, N] values in blocks [K / B, B, N]; scales, [N] or [K / B, N], in [K / B, 1, N].
_BLOCKS = """
  any_size = Constant <value_ints: ints = [-1]> ()
  one_row = Constant <value_ints: ints = [1]> ()
  columns = Shape <start: int = 1, end: int = 2> (values)
  one_row_each = Concat <axis: int = 0> (any_size, one_row, columns)
  scales = Reshape (scale_values, one_row_each)
  blocks = Shape <start: int = 0, end: int = 1> (scales)
  block_shape = Concat <axis: int = 0> (blocks, any_size, columns)
  grouped = Reshape (values, block_shape)
"""
_UNBLOCK = """
  weight_shape = Shape (values)
  unblocked = Reshape (scaled, weight_shape)
  dequantized = Cast <to: int = @dtype> (unblocked)
"""
_SCALE_BLOCKS = _BLOCKS + "  scaled = Mul (grouped, scales)\n" + _UNBLOCK

_CODEBOOK = """
  indices = Cast <to: int = 6> (W)
  values = Gather <axis: int = 0> (codebook, indices)
"""
_FLOAT_SCALES = "  scale_values = Cast <to: int = 1> (scale)\n"
_EXPONENT_SCALES = """
  biased_exponents = Cast <to: int = 1> (scale)
  exponent_bias = Constant <value_float: float = 127.0> ()
  two = Constant <value_float: float = 2.0> ()
  exponents = Sub (biased_exponents, exponent_bias)
  scale_values = Pow (two, exponents)
"""

_SECOND_LEVEL_COLUMNS = """
  first = Constant <value_int: int = 0> ()
  step = Constant <value_int: int = 1> ()
  second_block = Constant <value_int: int = @second_block_size> ()
  column_axis = Constant <value_ints: ints = [0]> ()
  column_count = Shape <start: int = 1, end: int = 2> (values)
  last = Squeeze (column_count, column_axis)
  column = Range (first, last, step)
  second_level = Div (column, second_block)
"""


def _second_level(result: str, integers: str, scale: str, zero: str) -> str:
    """Lines that dequantise small integers [K / B, N] by grids that neighbouring columns share."""
    return f"""
  {scale}_float = Cast <to: int = 1> ({scale})
  {scale}_columns = Gather <axis: int = 1> ({scale}_float, second_level)
  {zero}_float = Cast <to: int = 1> ({zero})
  {zero}_columns = Gather <axis: int = 1> ({zero}_float, second_level)
  {integers}_float = Cast <to: int = 1> ({integers})
  {integers}_centred = Sub ({integers}_float, {zero}_columns)
  {result} = Mul ({integers}_centred, {scale}_columns)
"""


_BILEVEL = (
    "  values = Cast <to: int = 1> (W)\n"
    + _SECOND_LEVEL_COLUMNS
    + _second_level("scale_values", "scale", "scale_scale", "scale_zero")
    + _second_level("zero_values", "zero_point", "zero_scale", "zero_zero")
    + _BLOCKS
    + """
  zeros = Reshape (zero_values, one_row_each)
  centred = Sub (grouped, zeros)
  scaled = Mul (centred, scales)
"""
    + _UNBLOCK
)

_OUTLIERS = """
  flat = Constant <value_ints: ints = [-1]> ()
  position_axis = Constant <value_int: int = 0> ()
  gaps = Cast <to: int = 7> (outlier_gaps)
  positions = CumSum (gaps, position_axis)
  outliers = Cast <to: int = @dtype> (outlier_values)
  dequantized_flat = Reshape (dequantized, flat)
  mixed = ScatterElements <axis: int = 0> (dequantized_flat, positions, outliers)
  dequantized_shape = Shape (dequantized)
  weight = Reshape (mixed, dequantized_shape)
"""


@dataclasses.dataclass(frozen=True)
class _Encoding:
    """One meaning of the stored weight: its own attributes, its operands beside X, W and scale, its lines."""

    attributes: tuple[str, ...]
    operands: str
    lines: str


_ENCODINGS = {
    "": _Encoding(("axis",), "zero_point", _PLAIN),
    "codebook": _Encoding((), "codebook", _CODEBOOK + _FLOAT_SCALES + _SCALE_BLOCKS),
    "codebook_exponent": _Encoding((), "codebook", _CODEBOOK + _EXPONENT_SCALES + _SCALE_BLOCKS),
    "bilevel": _Encoding(
        ("second_block_size",),
        "zero_point, scale_scale, scale_zero, zero_scale, zero_zero",
        _BILEVEL,
    ),
}


def _overload(encoding: str, has_outliers: bool, has_bias: bool) -> str:
    parts = (encoding, "outliers" if has_outliers else "", "bias" if has_bias else "")
    return "_".join(part for part in parts if part)


def _define(encoding: str, has_outliers: bool, has_bias: bool) -> OpDefinition:
    meaning = _ENCODINGS[encoding]
    operands = ["X", "W", "scale", meaning.operands]
    attributes = ["bits", "block_size", *meaning.attributes]
    lines, weight = meaning.lines, "dequantized"
    if encoding or has_outliers:
        attributes.append("dtype")
    if has_outliers:
        operands.append("outlier_gaps, outlier_values")
        lines, weight = lines + _OUTLIERS, "weight"
    if has_bias:
        operands.append("bias")
        lines += f"  product = MatMul (X, {weight})\n  Y = Add (product, bias)\n"
    else:
        lines += f"  Y = MatMul (X, {weight})\n"
    signature = f"<{', '.join(attributes)}> ({', '.join(operands)}) => (Y)"
    return OpDefinition(OP_TYPE, _overload(encoding, has_outliers, has_bias), signature, lines)


DEFINITIONS = {
    _overload(*variant): _define(*variant)
    for variant in itertools.product(_ENCODINGS, (False, True), (False, True))
}


@dataclasses.dataclass(frozen=True)
class SecondLevel:
    """The grids of bilevel scales and zero points: float tensors [K / B, ⌈N / block_size⌉].

    Attributes:
        scale_scale: step of the scales.
        scale_zero: what is subtracted from the scales' integers; need not be an integer.
        zero_scale: step of the zero points.
        zero_zero: what is subtracted from the zero points' integers.
        block_size: neighbouring columns that share a grid.
    """

    scale_scale: ir.Value
    scale_zero: ir.Value
    zero_scale: ir.Value
    zero_zero: ir.Value
    block_size: int = 16


@dataclasses.dataclass(frozen=True)
class Outliers:
    """Weights that are kept as they are.

    Attributes:
        gaps: [nnz] uint16 or another integer type, see `outlier_gaps`.
        values: [nnz] float16 or another float type.
    """

    gaps: ir.Value
    values: ir.Value


def outlier_gaps(positions: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Gaps between ascending positions of a flattened [K, N] weight, the first from 0.

    They are uint16 where they fit, as they do unless two outliers lie 65,536 weights apart; else uint32.

    Raises:
        ValueError: the positions are not strictly ascending from 0 or more.
    """
    gaps = np.diff(positions.astype(np.int64), prepend=0)
    if positions.ndim != 1 or (gaps[1:] <= 0).any() or (gaps[:1] < 0).any():
        raise ValueError("positions of outliers must be one ascending list, each once")
    return gaps.astype(np.uint16 if gaps.max(initial=0) < 1 << 16 else np.uint32)


def quantized_linear(
    x: ir.Value,
    weight: ir.Value,
    scale: ir.Value,
    zero_point: ir.Value | None = None,
    bias: ir.Value | None = None,
    *,
    bits: int,
    block_size: int = 0,
    codebook: ir.Value | None = None,
    second_level: SecondLevel | None = None,
    outliers: Outliers | None = None,
    name: str | None = None,
) -> tuple[ir.Node, OpDefinition]:
    """A node of the op and the definition that its model must hold (see `define`).

    Args:
        x: [..., K] float.
        weight: [K, N] int4, uint4, int8, uint8 or float8; with a code book uint4 or uint8.
        scale: [K / block_size, N], or [N] when ``block_size`` is 0. Plain: dtype of ``x``. With a code book:
            any float, FLOAT8E4M3FN, or uint8 for powers of two. With a second level: uint4 or uint8.
        zero_point: shape of ``scale``. Plain: dtype of ``weight``, none means 0. With a second level: uint4
            or uint8, required.
        bias: [N], dtype of ``x``.
        bits: how many bits of the container a weight uses, 2 to 8.
        block_size: rows of the weight that share a scale; 0 for one scale per output channel.
        codebook: [2^bits] float32: what the integers stand for.
        second_level: what the integers of ``scale`` and ``zero_point`` stand for.
        outliers: weights kept as they were.
        name: the node's name.

    Raises:
        ModelError: operands that no overload takes together, or a dtype that must be known is not.
    """
    encoding = _encoding_of(scale, zero_point, codebook, second_level, name)
    attributes: dict[str, int] = {"bits": bits, "block_size": block_size}
    inputs = [x, weight, scale, zero_point if codebook is None else codebook]
    if second_level is not None:
        attributes["second_block_size"] = second_level.block_size
        inputs += [second_level.scale_scale, second_level.scale_zero]
        inputs += [second_level.zero_scale, second_level.zero_zero]
    if not encoding:
        attributes["axis"] = 0 if block_size else 1
    if encoding or outliers is not None:
        if x.dtype is None:
            raise ModelError(f"QuantizedLinear {name!r}: the dtype of its activations must be known")
        attributes["dtype"] = int(x.dtype)
    if outliers is not None:
        inputs += [outliers.gaps, outliers.values]
    if bias is not None:
        inputs.append(bias)
    definition = DEFINITIONS[_overload(encoding, outliers is not None, bias is not None)]
    node = ir.node(OP_TYPE, inputs, attributes, domain=DOMAIN, overload=definition.overload, name=name)
    set_linear_output(node.outputs[0], x, weight)
    return node, definition


def _encoding_of(
    scale: ir.Value,
    zero_point: ir.Value | None,
    codebook: ir.Value | None,
    second_level: SecondLevel | None,
    name: str | None,
) -> str:
    if codebook is not None and (zero_point is not None or second_level is not None):
        raise ModelError(f"QuantizedLinear {name!r}: a code book takes no zero point and no second level")
    if second_level is not None and zero_point is None:
        raise ModelError(f"QuantizedLinear {name!r}: a second level needs zero points")
    if codebook is not None:
        return "codebook_exponent" if scale.dtype == ir.DataType.UINT8 else "codebook"
    return "bilevel" if second_level is not None else ""


def set_linear_output(output: ir.Value, x: ir.Value, weight: ir.Value) -> None:
    """Give ``output`` the dtype of ``x`` and the shape [..., N], as far as they are known."""
    if x.dtype is not None:
        output.dtype = x.dtype
    if x.shape is not None and weight.shape is not None:
        output.shape = ir.Shape([*x.shape[:-1], weight.shape[1]])
