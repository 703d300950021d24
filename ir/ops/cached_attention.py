"""``planish::CachedAttention``: attention of new tokens to themselves and to a key-value cache.

    present_key = [past_key; K],  present_value = [past_value; V]
    Y = softmax(scale · Q · present_keyᵀ, masked) · present_value

Q, K, V and Y are [batch, sequence, heads · size], the cache is [batch, kv_heads, length, size]; heads of
queries share those of keys and values in groups. The mask is boolean (True: attend) or added,
[batch or 1, heads or 1, sequence, past + sequence], and hides the future itself.

The overload says how the cache is stored:

- plain: as floats, like K and V;
- ``int8``: q = round(x / scale) clamped to −128 … 127;
- ``int4``: two channels to a byte, q + 8 with q clamped to −8 … 7; the even channel has the low four bits.

A quantised cache has the scales ``key_scale`` and ``value_scale``, [1], or [1, kv_heads, 1, size] for one per
channel, in float32 whatever K and V are. New keys and values are quantised first and then attended to, like
those before them.

Where the attribute ``window`` is not 0, the mask hides all but the last so many tokens from a query, its own
among them. A kernel may then forget the others; the op itself forgets nothing.

This is what GroupQueryAttention of onnxruntime computes, which runs it in place, over a buffer that past and
present share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import onnx_ir as ir

from ..errors import ModelError
from .definition import DOMAIN, OpDefinition

OP_TYPE = "CachedAttention"

Bits = Literal[4, 8, 32]

_HEADS = """
  q_split = Constant <value_ints: ints = @q_shape> ()
  kv_split = Constant <value_ints: ints = @kv_shape> ()
  q_heads_last = Reshape (Q, q_split)
  k_heads_last = Reshape (K, kv_split)
  v_heads_last = Reshape (V, kv_split)
  q = Transpose <perm: ints = [0, 2, 1, 3]> (q_heads_last)
  k = Transpose <perm: ints = [0, 2, 1, 3]> (k_heads_last)
  v = Transpose <perm: ints = [0, 2, 1, 3]> (v_heads_last)
"""
_LIMITS = """
  lowest = Constant <value_float: float = {lowest}.0> ()
  highest = Constant <value_float: float = {highest}.0> ()
"""
_ROUND = """
  {x}_wide = Cast <to: int = 1> ({x})
  {x}_scaled = Div ({x}_wide, {name}_scale)
  {x}_nearest = Round ({x}_scaled)
  {x}_integers = Clip ({x}_nearest, lowest, highest)
"""
_INT8 = """
  {x}_new = Cast <to: int = 3> ({x}_integers)
  present_{name} = Concat <axis: int = 2> (past_{name}, {x}_new)
  {x}_present = Cast <to: int = 1> (present_{name})
  {x}_product = Mul ({x}_present, {name}_scale)
  {x}_all = CastLike ({x}_product, {x})
"""
# The low bits go before the shift: OpenVINO rounds what is shifted out.
_INT4_CONSTANTS = """
  eight = Constant <value_float: float = 8.0> ()
  fifteen_long = Constant <value_int: int = 15> ()
  fifteen = Cast <to: int = 2> (fifteen_long)
  high_bits_long = Constant <value_int: int = 240> ()
  high_bits = Cast <to: int = 2> (high_bits_long)
  four_long = Constant <value_int: int = 4> ()
  four = Cast <to: int = 2> (four_long)
  last_axis = Constant <value_ints: ints = [-1]> ()
  pairs_shape = Constant <value_ints: ints = @pairs_shape> ()
  channels_shape = Constant <value_ints: ints = @channels_shape> ()
  first = Constant <value_int: int = 0> ()
  second = Constant <value_int: int = 1> ()
"""
_INT4 = """
  {x}_shifted = Add ({x}_integers, eight)
  {x}_nibbles = Cast <to: int = 2> ({x}_shifted)
  {x}_pairs = Reshape ({x}_nibbles, pairs_shape)
  {x}_even = Gather <axis: int = -1> ({x}_pairs, first)
  {x}_odd = Gather <axis: int = -1> ({x}_pairs, second)
  {x}_odd_high = BitShift <direction: string = "LEFT"> ({x}_odd, four)
  {x}_new = BitwiseOr ({x}_even, {x}_odd_high)
  present_{name} = Concat <axis: int = 2> (past_{name}, {x}_new)
  {x}_low = BitwiseAnd (present_{name}, fifteen)
  {x}_high_alone = BitwiseAnd (present_{name}, high_bits)
  {x}_high = BitShift <direction: string = "RIGHT"> ({x}_high_alone, four)
  {x}_low_column = Unsqueeze ({x}_low, last_axis)
  {x}_high_column = Unsqueeze ({x}_high, last_axis)
  {x}_columns = Concat <axis: int = -1> ({x}_low_column, {x}_high_column)
  {x}_channels = Reshape ({x}_columns, channels_shape)
  {x}_float = Cast <to: int = 1> ({x}_channels)
  {x}_centred = Sub ({x}_float, eight)
  {x}_product = Mul ({x}_centred, {name}_scale)
  {x}_all = CastLike ({x}_product, {x})
"""
_ATTEND = """
  y = Attention <scale: float = @scale, softcap: float = @softcap> (q, {keys}, {values}, mask)
"""
_MERGE = """
  y_heads_last = Transpose <perm: ints = [0, 2, 1, 3]> (y)
  y_merged = Constant <value_ints: ints = [0, 0, -1]> ()
  Y = Reshape (y_heads_last, y_merged)
"""
_FLOAT = """
  y, present_key, present_value = Attention <scale: float = @scale, softcap: float = @softcap>
    (q, k, v, mask, past_key, past_value)
"""


def _both(text: str) -> str:
    return text.format(x="k", name="key") + text.format(x="v", name="value")


_QUANTIZED = _ATTEND.format(keys="k_all", values="v_all") + _MERGE
_OPERANDS = "Q, K, V, mask, past_key, past_value"
_RESULTS = "(Y, present_key, present_value)"
_ATTRIBUTES = "q_num_heads, kv_num_heads, q_shape, kv_shape, scale, softcap, window"
DEFINITIONS = {
    "": OpDefinition(OP_TYPE, "", f"<{_ATTRIBUTES}> ({_OPERANDS}) => {_RESULTS}", _HEADS + _FLOAT + _MERGE),
    "int8": OpDefinition(
        OP_TYPE,
        "int8",
        f"<{_ATTRIBUTES}> ({_OPERANDS}, key_scale, value_scale) => {_RESULTS}",
        _HEADS + _LIMITS.format(lowest=-128, highest=127) + _both(_ROUND + _INT8) + _QUANTIZED,
    ),
    "int4": OpDefinition(
        OP_TYPE,
        "int4",
        f"<{_ATTRIBUTES}, pairs_shape, channels_shape> ({_OPERANDS}, key_scale, value_scale) => {_RESULTS}",
        _HEADS + _INT4_CONSTANTS + _LIMITS.format(lowest=-8, highest=7) + _both(_ROUND + _INT4) + _QUANTIZED,
    ),
}
BITS: Mapping[str, Bits] = {"": 32, "int8": 8, "int4": 4}
"""Of a cached number, by overload."""


def cached_attention(
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    mask: ir.Value,
    past: tuple[ir.Value, ir.Value],
    *,
    q_num_heads: int,
    kv_num_heads: int,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    scales: tuple[ir.Value, ir.Value] | None = None,
    bits: Bits = 32,
    name: str | None = None,
) -> tuple[ir.Node, OpDefinition]:
    """A node of the op and the definition that its model must hold (see `define`).

    Args:
        query: [batch, sequence, q_num_heads · size] float32.
        key, value: [batch, sequence, kv_num_heads · size] float32, rotated.
        mask: see the module's docstring.
        past: keys and values, [batch, kv_num_heads, past, size]; half as many columns, uint8, for 4 bits.
        q_num_heads, kv_num_heads: heads of queries, and of keys and values.
        scale: of the products of queries and keys.
        softcap: 0 for none.
        window: see the module's docstring; 0 for none.
        scales: of keys and values, [1] or [1, kv_num_heads, 1, size] float32; for 8 and 4 bits.
        bits: of a cached number.
        name: the node's name.

    Raises:
        ModelError: scales and bits do not fit together, or an odd head size is to have 4 bits.
    """
    if (scales is None) != (bits == 32):
        raise ModelError(
            f"{OP_TYPE} {name!r}: a cache of {bits} bits has {'no' if bits == 32 else 'two'} scales"
        )
    overload = next(form for form, width in BITS.items() if width == bits)
    attributes: dict[str, int | float | list[int]] = {
        "q_num_heads": q_num_heads,
        "kv_num_heads": kv_num_heads,
        "q_shape": [0, 0, q_num_heads, -1],
        "kv_shape": [0, 0, kv_num_heads, -1],
        "scale": float(scale),
        "softcap": float(softcap),
        "window": window,
    }
    if bits == 4:
        width = key.shape[-1] if key.shape is not None else None
        if not isinstance(width, int) or width // kv_num_heads % 2:
            raise ModelError(f"{OP_TYPE} {name!r}: 4 bits need an even head size, found keys {key.shape}")
        attributes["pairs_shape"] = [0, 0, 0, -1, 2]
        attributes["channels_shape"] = [0, 0, 0, -1]
    definition = DEFINITIONS[overload]
    node = ir.node(
        OP_TYPE,
        [query, key, value, mask, *past, *(scales or ())],
        attributes,
        domain=DOMAIN,
        overload=overload,
        num_outputs=3,
        name=name,
    )
    node.outputs[0].type, node.outputs[0].shape = query.type, query.shape
    for output, before in zip(node.outputs[1:], past, strict=True):
        output.type = before.type
    return node, definition
