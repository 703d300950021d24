"""Parts of random networks that take images [batch, channels, height, width]."""

from __future__ import annotations

import math

import numpy as np
from random_graphs import GraphMaker, Tensor
from random_layers import activation


def convolution(m: GraphMaker, x: Tensor) -> Tensor:
    """A convolution, mostly with batch norm and activation behind it."""
    with m.scope("conv"):
        y = _conv(m, x, m.pick(4, 6, 8, 12, 16), m.pick(1, 3, 3, 5), m.pick(1, 1, 2))
        if m.chance(0.5):
            y = batch_norm(m, y)
        if m.chance(0.15):
            y = m.op("Mul", y, m.weight(int(y.dims[1]), 1, 1, name="gain", around=1.0, spread=0.2))
        return activation(m, y) if m.chance(0.7) else y


def _conv(m: GraphMaker, x: Tensor, out: int, size: int, stride: int = 1, group: int | None = None) -> Tensor:
    channels, height, width = (int(dim) for dim in x.dims[1:])
    if group is None:
        group = m.pick(1, 1, 1, 2, channels)
    if channels % group or out % group:
        group = 1
    weight = m.weight(
        out, channels // group, size, size, spread=1 / math.sqrt(channels // group * size * size)
    )
    operands = [x, weight]
    if m.chance(0.5):
        operands.append(m.weight(out, name="bias", spread=0.3))
    dilation = 2 if size == 3 and stride == 1 and min(height, width) > 4 and m.chance(0.15) else 1
    pad = dilation * (size - 1) // 2
    attributes = {"strides": [stride, stride], "group": group, "dilations": [dilation, dilation]}
    if dilation == 1 and m.chance(0.15):
        attributes["auto_pad"] = m.pick("SAME_UPPER", "SAME_LOWER")
        sizes = [-(-each // stride) for each in (height, width)]
    else:
        attributes["pads"] = [pad] * 4
        sizes = [(each + 2 * pad - dilation * (size - 1) - 1) // stride + 1 for each in (height, width)]
    if m.chance(0.6):
        attributes["kernel_shape"] = [size, size]
    return m.op("Conv", *operands, dims=(x.dims[0], out, *sizes), **attributes)


def batch_norm(m: GraphMaker, x: Tensor) -> Tensor:
    channels = int(x.dims[1])
    with m.scope("bn"):
        if m.chance(0.2):
            shape = (channels, *([1] * (len(x.dims) - 2)))
            scaled = m.op(
                "Mul", *m.either(x, m.weight(*shape, name="scale", around=1.0, spread=0.2)), dims=x.dims
            )
            return m.op("Add", *m.either(scaled, m.weight(*shape, name="bias", spread=0.2)), dims=x.dims)
        parameters = [m.weight(channels, name=name, around=around, spread=0.2)
                      for name, around in (("scale", 1.0), ("bias", 0.0), ("running_mean", 0.0))]  # fmt: skip
        variance = m.constant(m.rng.uniform(0.5, 2, channels).astype(np.float32), "running_var")
        return m.op("BatchNormalization", x, *parameters, variance, epsilon=m.pick(1e-5, 1e-3))


def convolutional_residual(m: GraphMaker, x: Tensor) -> Tensor:
    """x + f(x), with a convolution in the shortcut where the number of channels changes."""
    with m.scope("block"):
        channels = int(x.dims[1])
        out = m.pick(channels, channels, 8)
        inner = activation(m, batch_norm(m, _conv(m, x, m.pick(4, 8, 12), 3)))
        y = batch_norm(m, _conv(m, inner, out, 3, group=1))
        with m.scope("shortcut"):
            shortcut = x if out == channels else _conv(m, x, out, 1, group=1)
        y = m.op("Add", *m.either(y, shortcut))
        return m.op("Relu", y) if m.chance(0.5) else y


def inverted_residual(m: GraphMaker, x: Tensor) -> Tensor:
    """Wide in the middle, with a depthwise convolution and a gate of channels (MobileNet)."""
    with m.scope("inverted"):
        channels, wide = int(x.dims[1]), 2 * int(x.dims[1])
        y = activation(m, batch_norm(m, _conv(m, x, wide, 1, group=1)))
        y = activation(m, batch_norm(m, _conv(m, y, wide, 3, group=wide)))
        if m.chance(0.6):
            y = _channel_gate(m, y)
        return m.op("Add", *m.either(x, batch_norm(m, _conv(m, y, channels, 1, group=1))))


def _channel_gate(m: GraphMaker, x: Tensor) -> Tensor:
    with m.scope("se"):
        channels = int(x.dims[1])
        pooled = _pooled(m, x)
        small = m.op("Relu", _conv(m, pooled, 4, 1, group=1))
        gate = m.op(m.pick("Sigmoid", "HardSigmoid"), _conv(m, small, channels, 1, group=1))
        return m.op("Mul", *m.either(x, gate), dims=x.dims)


def _pooled(m: GraphMaker, x: Tensor) -> Tensor:
    """[batch, channels, 1, 1]"""
    if m.chance(0.6):
        return m.op("GlobalAveragePool", x, dims=(*x.dims[:2], 1, 1))
    return m.reduce("Mean", m.reduce("Mean", x, 2), 3)


def pooling(m: GraphMaker, x: Tensor) -> Tensor:
    """Halves an image, if there is something to halve."""
    height, width = int(x.dims[2]), int(x.dims[3])
    if min(height, width) < 4:
        return x
    dims = (*x.dims[:2], height // 2, width // 2)
    attributes = {"kernel_shape": [2, 2], "strides": [2, 2]}
    if m.chance(0.5):
        return m.op("MaxPool", x, dims=dims, **attributes)
    return m.op("AveragePool", x, dims=dims, **attributes)


def enlarging(m: GraphMaker, x: Tensor) -> Tensor:
    """Doubles a small image."""
    channels, height, width = (int(dim) for dim in x.dims[1:])
    if max(height, width) > 8:
        return x
    dims = (*x.dims[:2], 2 * height, 2 * width)
    if m.chance(0.5):
        scales = m.constant(np.array([1, 1, 2, 2], np.float32), "scales")
        mode = m.pick("nearest", "linear")
        return m.op("Resize", x, None, scales, dims=dims, mode=mode)
    with m.scope("deconv"):
        weight = m.weight(channels, channels, 2, 2, spread=1 / math.sqrt(channels))
        return m.op("ConvTranspose", x, weight, dims=dims, kernel_shape=[2, 2], strides=[2, 2])


def channels_moved(m: GraphMaker, x: Tensor) -> Tensor:
    """Channels shuffled, joined or normalised."""
    channels = int(x.dims[1])
    match m.pick("shuffle", "double", "instance norm", "pad"):
        case "shuffle" if channels % 2 == 0:
            apart = m.reshape(x, (x.dims[0], 2, channels // 2, *x.dims[2:]))
            return m.reshape(m.transpose(apart, 0, 2, 1, 3, 4), x.dims)
        case "double" if channels <= 8:
            return m.op("Concat", x, m.op("Neg", x), dims=(x.dims[0], 2 * channels, *x.dims[2:]), axis=1)
        case "instance norm" if min(int(x.dims[2]), int(x.dims[3])) > 1:
            parameters = [m.weight(channels, name=name, around=around, spread=0.2)
                          for name, around in (("scale", 1.0), ("bias", 0.0))]  # fmt: skip
            return m.op("InstanceNormalization", x, *parameters, epsilon=1e-3)
    pads = m.constant(np.array([0, 0, 1, 0, 0, 0, 0, 1], np.int64), "pads")
    return m.op("Pad", x, pads, dims=(*x.dims[:2], int(x.dims[2]) + 1, int(x.dims[3]) + 1))


def image_to_rows(m: GraphMaker, x: Tensor) -> Tensor:
    """[batch, features] of an image: its mean, or all of a small one."""
    channels, height, width = (int(dim) for dim in x.dims[1:])
    if channels * height * width <= 128 and m.chance(0.5):
        return m.op("Flatten", x, dims=(x.dims[0], channels * height * width), axis=1)
    pooled = _pooled(m, x)
    if m.chance(0.5):
        return m.op("Flatten", pooled, dims=x.dims[:2], axis=1)
    return m.reshape(pooled, x.dims[:2])


def image_to_tokens(m: GraphMaker, x: Tensor) -> Tensor:
    """[batch, height · width, channels]"""
    channels, height, width = (int(dim) for dim in x.dims[1:])
    return m.transpose(m.reshape(x, (x.dims[0], channels, height * width)), 0, 2, 1)
