"""The linear layers of a model: products of activations with a constant matrix, and their bias."""

from __future__ import annotations

import dataclasses
import re

import onnx_ir as ir

from ..ops import DOMAIN, LINEAR_OPS, operand
from .values import input_at, integer, is_constant, number, only_reader, static_shape

_STORED_WEIGHT = re.compile(r"\.weight(_quantized(_\d+)?)?$")
"""How the names of weights end, before and after quantisation."""


@dataclasses.dataclass(frozen=True)
class Linear:
    """``output[..., out] = input[..., in] · weight (+ bias[out])``.

    Attributes:
        name: the module's path: the weight's name without ``.weight`` or ``.weight_quantized``. Layers that
            share a weight share it.
        node: the MatMul, Gemm or planish op.
        input: the activations.
        weight: [in, out], or [out, in] where ``transposed``; a constant.
        bias: [out], a constant, if the layer has one.
        bias_node: the node that adds the bias: an Add after a MatMul, else ``node`` itself.
        output: the result, bias included.
        in_features: length of the input's last dimension.
        out_features: length of the output's last dimension.
        transposed: the weight is stored [out, in] (Gemm with ``transB``).
    """

    name: str
    node: ir.Node
    input: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    bias_node: ir.Node | None
    output: ir.Value
    in_features: int
    out_features: int
    transposed: bool = False

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is stored in few bits, with scales."""
        return self.node.domain == DOMAIN

    @property
    def bits(self) -> int | None:
        """Of a quantised weight: how many bits an element has, containers apart; None for float weights."""
        return integer(self.node, "bits") if self.is_quantized else None


def linears(model: ir.Model) -> list[Linear]:
    """The linears of the model's graph, in its order."""
    found = (as_linear(node) for node in model.graph)
    return [linear for linear in found if linear is not None]


def as_linear(node: ir.Node) -> Linear | None:
    """The linear that ``node`` computes the product of, if it is one."""
    if node.domain == "" and node.op_type == "MatMul":
        return _from_matmul(node)
    if node.domain == "" and node.op_type == "Gemm":
        return _from_gemm(node)
    if node.domain == DOMAIN and node.op_type in LINEAR_OPS:
        return _linear(node, bias=operand(node, "bias"))
    return None


def stored_weight_owner(weight: ir.Value) -> str:
    """``blocks.0.fc.weight`` and ``blocks.0.fc.weight_quantized`` → ``blocks.0.fc``."""
    return _STORED_WEIGHT.sub("", weight.name or "")


def _from_matmul(node: ir.Node) -> Linear | None:
    linear = _linear(node, bias=None)
    reader = only_reader(node.outputs[0])
    if linear is None or reader is None or reader.op_type != "Add" or reader.domain != "":
        return linear
    bias = reader.inputs[1] if reader.inputs[0] is node.outputs[0] else reader.inputs[0]
    if not is_constant(bias) or static_shape(bias) != (linear.out_features,):
        return linear
    return dataclasses.replace(linear, bias=bias, bias_node=reader, output=reader.outputs[0])


def _from_gemm(node: ir.Node) -> Linear | None:
    plain = number(node, "alpha", 1.0) == 1.0 and number(node, "beta", 1.0) == 1.0
    if not plain or integer(node, "transA"):
        return None
    linear = _linear(node, bias=input_at(node, 2), transposed=bool(integer(node, "transB")))
    if linear is None or linear.bias is None:
        return linear
    # Gemm may add any matrix that broadcasts: that is a residual, and not a bias.
    is_bias = is_constant(linear.bias) and static_shape(linear.bias) == (linear.out_features,)
    return linear if is_bias else None


def _linear(node: ir.Node, *, bias: ir.Value | None, transposed: bool = False) -> Linear | None:
    value, weight = input_at(node, 0), input_at(node, 1)
    shape = static_shape(weight)
    if value is None or weight is None or shape is None or len(shape) != 2 or not is_constant(weight):
        return None
    return Linear(
        name=stored_weight_owner(weight) or node.name or "",
        node=node,
        input=value,
        weight=weight,
        bias=bias,
        bias_node=None if bias is None else node,
        output=node.outputs[0],
        in_features=shape[1] if transposed else shape[0],
        out_features=shape[0] if transposed else shape[1],
        transposed=transposed,
    )
