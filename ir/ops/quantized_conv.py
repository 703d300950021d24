"""``planish::QuantizedConv``: a convolution whose weight is stored as integers.

    Y = Conv(X, (W − zero_point) · scale, bias)

W is [O, I / group, …kernel], int4 / uint4 or int8 / uint8, with one scale per output channel: ``scale`` and
``zero_point`` are [O]. X, scale, bias and Y share one dtype. Padding is explicit. Inputs X, W, scale,
zero_point, bias; the last two may be omitted.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from .definition import DOMAIN, OpDefinition

OP_TYPE = "QuantizedConv"

CONV = OpDefinition(
    OP_TYPE,
    "",
    "<bits, strides, pads, dilations, group> (X, W, scale, zero_point, bias) => (Y)",
    """
  weight = DequantizeLinear <axis: int = 0> (W, scale, zero_point)
  Y = Conv <
    strides: ints = @strides, pads: ints = @pads, dilations: ints = @dilations, group: int = @group
  > (X, weight, bias)
""",
)
DEFINITIONS = {"": CONV}


def quantized_conv(
    x: ir.Value,
    weight: ir.Value,
    scale: ir.Value,
    zero_point: ir.Value | None = None,
    bias: ir.Value | None = None,
    *,
    bits: int,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    group: int = 1,
    name: str | None = None,
) -> tuple[ir.Node, OpDefinition]:
    """A node of the op and the definition that its model must hold (see `define`).

    The caller gives the output its shape, as `replace` does.

    Args:
        x: [batch, I, …] float.
        weight: [O, I / group, …kernel] int4, uint4, int8 or uint8.
        scale: [O], dtype of ``x``.
        zero_point: [O], dtype of ``weight``; none means 0.
        bias: [O], dtype of ``x``.
        bits: how many bits of the container the integers use, 2 to 8.
        strides: one per spatial axis.
        pads: the starts of all spatial axes, then their ends.
        dilations: one per spatial axis.
        group: groups of channels.
        name: the node's name.
    """
    node = ir.node(
        OP_TYPE,
        [x, weight, scale, zero_point, bias],
        {
            "bits": bits,
            "strides": list(strides),
            "pads": list(pads),
            "dilations": list(dilations),
            "group": group,
        },
        domain=DOMAIN,
        name=name,
    )
    if x.dtype is not None:
        node.outputs[0].dtype = x.dtype
    return node, CONV
