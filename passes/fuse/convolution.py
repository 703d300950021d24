"""Fold what scales and shifts the channels of a convolution into its weight and bias.

    BatchNormalization(W * x + b)  →  (s W) * x + (b − μ) s + β        with s = γ / √(σ² + ε)
    (W * x + b) · c                →  (c W) * x + b c                   also ÷ c
    (W * x + b) + c                →  W * x + (b + c)                   also − c

The new weights are computed in float64 and rounded once.

Preconditions: Conv, or ConvTranspose of one group; the weight and every factor are constants; a factor is one
number or one per output channel; nothing else reads the result of the convolution; normalisation at
inference (``training_mode`` 0); the result fits the weight's type.

Source: Jacob et al., Quantization and Training of Neural Networks, 2018, section 3.2 (arXiv:1712.05877).
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from ..canonicalize.graph_edits import constant_tensor, integer, number, only_use, producer
from ..infrastructure.rewriter import Replacement, Rule, missed
from .weights import Array, scaled, set_weight


class FoldBatchNormalization(Rule):
    """BatchNormalization(Conv(x)) → Conv(x)."""

    name = "fold-batch-normalization"
    roots = ("BatchNormalization",)

    def apply(self, node: ir.Node) -> bool:
        """Fold one normalisation into the convolution before it."""
        convolution = _convolution(node.inputs[0])
        if convolution is None:
            return False
        if integer(node, "training_mode", 0) or any(output.uses() for output in node.outputs[1:]):
            return missed(node, "it trains: its statistics are not constants")
        parameters = [_float64(value) for value in node.inputs[1:5]]
        gamma, beta, mean, variance = parameters
        if gamma is None or beta is None or mean is None or variance is None:
            return missed(node, "its parameters are not constants")
        scale = gamma / np.sqrt(variance + number(node, "epsilon", 1e-5))
        return _fold(node, convolution, scale, beta - mean * scale)


class FoldConvolutionScale(Rule):
    """Conv(x) · c → Conv(x), and likewise ÷, +, −."""

    name = "fold-convolution-scale"
    roots = ("Mul", "Div", "Add", "Sub")

    def apply(self, node: ir.Node) -> bool:
        """Fold one arithmetic op with a constant into the convolution before it."""
        left, right = node.inputs[:2]
        if node.op_type in {"Mul", "Add"} and _convolution(left) is None:
            left, right = right, left
        convolution = _convolution(left)
        if convolution is None or constant_tensor(right) is None or right is None:
            return False
        factor = _per_channel(right, convolution)
        if factor is None:
            return missed(node, "the other operand is not a constant per channel")
        one, zero = np.ones_like(factor), np.zeros_like(factor)
        if node.op_type in {"Mul", "Div"}:
            if node.op_type == "Div" and not factor.all():
                return missed(node, "division by zero")
            return _fold(node, convolution, factor if node.op_type == "Mul" else 1 / factor, zero)
        return _fold(node, convolution, one, factor if node.op_type == "Add" else -factor)


def _convolution(value: ir.Value | None) -> ir.Node | None:
    """The convolution with a constant weight that makes ``value`` for one reader."""
    node = producer(value, "Conv", "ConvTranspose")
    if node is None or value is None or not only_use(value):
        return None
    if node.op_type == "ConvTranspose" and integer(node, "group", 1) != 1:
        return None
    weight = constant_tensor(node.inputs[1])
    if weight is None or not weight.dtype.is_floating_point():
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return node if bias is None or constant_tensor(bias) is not None else None


def _channel_axis(convolution: ir.Node) -> int:
    return 0 if convolution.op_type == "Conv" else 1


def _channels(convolution: ir.Node) -> int:
    weight = constant_tensor(convolution.inputs[1])
    assert weight is not None
    return int(weight.shape.numpy()[_channel_axis(convolution)])


def _float64(value: ir.Value | None) -> Array | None:
    tensor = constant_tensor(value)
    return None if tensor is None else tensor.numpy().astype(np.float64)


def _per_channel(value: ir.Value, convolution: ir.Node) -> Array | None:
    """The constant as one number per output channel; None if it varies along any other axis."""
    tensor = constant_tensor(value)
    weight = constant_tensor(convolution.inputs[1])
    channels = _channels(convolution)
    if tensor is None or weight is None or tensor.size not in (1, channels):
        return None
    shape, result_rank = list(tensor.shape.numpy()), len(weight.shape)
    if len(shape) > result_rank:
        return None
    aligned = [1] * (result_rank - len(shape)) + shape
    if aligned[1] != channels and math.prod(aligned) != 1:
        return None
    return np.broadcast_to(tensor.numpy().astype(np.float64).reshape(-1), (channels,))


def _fold(node: ir.Node, convolution: ir.Node, scale: Array, shift: Array) -> bool:
    """Give the convolution the weight scale·W and the bias scale·b + shift, and drop ``node``."""
    tensor = constant_tensor(convolution.inputs[1])
    assert tensor is not None
    along = [1] * len(tensor.shape)
    along[_channel_axis(convolution)] = -1
    bias = _float64(convolution.inputs[2]) if len(convolution.inputs) > 2 else None
    weight = scaled(tensor.numpy(), scale.reshape(along), 0.0, tensor.dtype)
    shifted = scaled(np.zeros_like(shift) if bias is None else bias, scale, shift, tensor.dtype)
    if weight is None or shifted is None:
        return missed(node, f"the folded weight does not fit {tensor.dtype.name}")
    replacement = Replacement(node)
    if not np.all(scale == 1):
        set_weight(replacement, convolution, 1, weight)
    if bias is not None or np.any(shift != 0):
        set_weight(replacement, convolution, 2, shifted)
    return replacement.finish(convolution.outputs[0])
