"""The convolutions of a model: constant weights that slide over the input, and their bias."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from ..ops import DOMAIN, operand
from .linears import stored_weight_owner
from .values import input_at, integer, is_constant, static_shape


@dataclasses.dataclass(frozen=True)
class Convolution:
    """``output = Conv(input[batch, in, …], weight[out, in / groups, …kernel]) (+ bias[out])``.

    Attributes:
        name: the module's path: the weight's name without ``.weight`` or ``.weight_quantized``.
        node: the Conv or ``planish::QuantizedConv``.
        input: [batch, in, …spatial].
        weight: [out, in / groups, …kernel], a constant.
        bias: [out], a constant, if there is one.
        output: the result, bias included.
        groups: groups of channels that are convolved apart.
        strides: one per spatial axis.
        dilations: one per spatial axis.
        pads: the starts of all spatial axes, then their ends; None where ``auto_pad`` leaves them to the size
            of the input.
    """

    name: str
    node: ir.Node
    input: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    output: ir.Value
    groups: int
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...] | None

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is stored in few bits, with scales."""
        return self.node.domain == DOMAIN

    @property
    def bits(self) -> int | None:
        """Of a quantised weight: how many bits an element has, containers apart; None for float weights."""
        return integer(self.node, "bits") if self.is_quantized else None


def convolutions(model: ir.Model) -> list[Convolution]:
    """The convolutions of the model's graph whose weight and bias are constant, in its order."""
    found = (as_convolution(node) for node in model.graph)
    return [convolution for convolution in found if convolution is not None]


def as_convolution(node: ir.Node) -> Convolution | None:
    """The convolution that ``node`` is, if it is one."""
    if node.domain == "" and node.op_type == "Conv":
        bias = input_at(node, 2)
    elif node.domain == DOMAIN and node.op_type == "QuantizedConv":
        bias = operand(node, "bias")
    else:
        return None
    value, weight = input_at(node, 0), input_at(node, 1)
    shape = static_shape(weight)
    if value is None or weight is None or shape is None or len(shape) < 3 or not is_constant(weight):
        return None
    if bias is not None and not is_constant(bias):
        return None
    axes = len(shape) - 2
    return Convolution(
        name=stored_weight_owner(weight) or node.name or "",
        node=node,
        input=value,
        weight=weight,
        bias=bias,
        output=node.outputs[0],
        groups=integer(node, "group") or 1,
        strides=_integers(node, "strides", axes * (1,)),
        dilations=_integers(node, "dilations", axes * (1,)),
        pads=_pads(node, axes),
    )


def _pads(node: ir.Node, axes: int) -> tuple[int, ...] | None:
    auto_pad = node.attributes.get_string("auto_pad", "NOTSET")
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        return None
    none = 2 * axes * (0,)
    return none if auto_pad == "VALID" else _integers(node, "pads", none)


def _integers(node: ir.Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(node.attributes.get_ints(name, default))
