"""Linears, activations and norms of random networks, each in the spellings that exporters and people use."""

from __future__ import annotations

import math

import numpy as np
from onnx import TensorProto
from random_graphs import GraphMaker, Tensor

# Linears.


def linear(
    m: GraphMaker, x: Tensor, features: int, *, name: str = "proj", bias: bool | None = None
) -> Tensor:
    """x · W + b over the last axis."""
    with m.scope(name):
        has_bias = m.chance(0.6) if bias is None else bias
        spellings = [_matmul, _matmul, _matmul, _matmul_of_transposed, _gemm, _half_weight]
        if len(x.dims) == 3:
            spellings += [_flattened, _einsum]
        return m.pick(*spellings)(m, x, features, has_bias)


def _with_bias(m: GraphMaker, x: Tensor, has_bias: bool) -> Tensor:
    if not has_bias:
        return x
    dims = m.pick((x.size,), (x.size,), (x.size,), (1, x.size))
    return m.op("Add", *m.either(x, m.weight(*dims, name="bias", spread=0.3)), dims=x.dims)


def _matmul(m: GraphMaker, x: Tensor, features: int, has_bias: bool) -> Tensor:
    y = m.op("MatMul", x, m.weight(x.size, features), dims=(*x.dims[:-1], features))
    return _with_bias(m, y, has_bias)


def _matmul_of_transposed(m: GraphMaker, x: Tensor, features: int, has_bias: bool) -> Tensor:
    weight = m.weight(features, x.size, spread=1 / math.sqrt(x.size))
    y = m.op("MatMul", x, m.transpose(weight, 1, 0), dims=(*x.dims[:-1], features))
    return _with_bias(m, y, has_bias)


def _half_weight(m: GraphMaker, x: Tensor, features: int, has_bias: bool) -> Tensor:
    """A weight that is stored as float16."""
    array = (m.rng.standard_normal((x.size, features)) / np.sqrt(x.size)).astype(np.float16)
    weight = m.cast(m.constant(array, "weight"), TensorProto.FLOAT)
    return _with_bias(m, m.op("MatMul", x, weight, dims=(*x.dims[:-1], features)), has_bias)


def _gemm(m: GraphMaker, x: Tensor, features: int, has_bias: bool) -> Tensor:
    if len(x.dims) != 2:
        return _flattened(m, x, features, has_bias)
    flip = m.chance(0.7)
    dims = (features, x.size) if flip else (x.size, features)
    weight = m.weight(*dims, spread=1 / math.sqrt(x.size))
    attributes = {"transB": 1} if flip else {}
    if m.chance(0.15):
        attributes |= {"alpha": 0.5}
    operands = [x, weight]
    if has_bias:
        shape = m.pick((features,), (features,), (features,), (1, features), (1,))
        operands.append(m.weight(*shape, name="bias", spread=0.3))
        if m.chance(0.1):
            attributes |= {"beta": 2.0}
    return m.op("Gemm", *operands, dims=(*x.dims[:-1], features), **attributes)


def _flattened(m: GraphMaker, x: Tensor, features: int, has_bias: bool) -> Tensor:
    """GPT-2's Conv1D: the leading axes are flattened around the product."""
    if len(x.dims) == 2:
        return _gemm(m, x, features, has_bias)
    shape = m.constant(np.array([-1, x.size], np.int64), "shape")
    flat = m.op("Reshape", x, shape, dims=("rows", x.size))
    y = m.pick(_gemm, _matmul)(m, flat, features, has_bias)
    dims = (*x.dims[:-1], features)
    return m.op("Reshape", y, m.shape_of(x, dims), dims=dims)


def _einsum(m: GraphMaker, x: Tensor, features: int, has_bias: bool) -> Tensor:
    weight = m.weight(x.size, features)
    y = m.op("Einsum", x, weight, dims=(*x.dims[:-1], features), equation="bsk,kn->bsn")
    return _with_bias(m, y, has_bias)


# Activations.


def scalar(m: GraphMaker, number: float) -> Tensor:
    shape = m.pick((), (), (1,))
    return m.constant(np.full(shape, number, np.float32), "scalar")


def _gelu(m: GraphMaker, x: Tensor) -> Tensor:
    if m.opset >= 20 and m.chance(0.4):
        return m.op("Gelu", x, approximate=m.pick("none", "tanh"))
    if m.chance(0.3):
        return _tanh_gelu(m, x)
    inner = m.pick(
        lambda: m.op("Div", x, scalar(m, math.sqrt(2))),
        lambda: m.op("Mul", *m.either(x, scalar(m, 1 / math.sqrt(2))), dims=x.dims),
    )()
    sum_ = m.op("Add", *m.either(m.op("Erf", inner), scalar(m, 1.0)), dims=x.dims)
    if m.chance(0.5):
        half = m.op("Mul", *m.either(x, scalar(m, 0.5)), dims=x.dims)
        return m.op("Mul", *m.either(half, sum_))
    product = m.op("Mul", *m.either(x, sum_))
    return m.op("Mul", *m.either(product, scalar(m, 0.5)), dims=x.dims)


def _tanh_gelu(m: GraphMaker, x: Tensor) -> Tensor:
    cube = m.op("Pow", x, scalar(m, 3.0)) if m.chance(0.5) else m.op("Mul", x, m.op("Mul", x, x))
    inner = m.op("Add", *m.either(x, m.op("Mul", cube, scalar(m, 0.044715))))
    scaled = m.op("Mul", *m.either(inner, scalar(m, math.sqrt(2 / math.pi))), dims=x.dims)
    sum_ = m.op("Add", *m.either(m.op("Tanh", scaled), scalar(m, 1.0)), dims=x.dims)
    half = m.op("Mul", *m.either(x, scalar(m, 0.5)), dims=x.dims)
    return m.op("Mul", *m.either(half, sum_))


def _silu(m: GraphMaker, x: Tensor) -> Tensor:
    factor = m.pick(1.0, 1.0, 1.702)
    inner = x if factor == 1.0 else m.op("Mul", x, scalar(m, factor), dims=x.dims)
    return m.op("Mul", *m.either(x, m.op("Sigmoid", inner)))


def _hard_swish(m: GraphMaker, x: Tensor) -> Tensor:
    if m.chance(0.4):
        return m.op("HardSwish", x)
    if m.chance(0.5):
        return m.op("Mul", *m.either(x, m.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)))
    low, high = (m.constant(np.float32(bound), "bound") for bound in (0.0, 6.0))
    shifted = m.op("Add", x, scalar(m, 3.0), dims=x.dims)
    clipped = m.op("Clip", shifted, low, high)
    return m.op("Div", m.op("Mul", *m.either(x, clipped)), scalar(m, 6.0), dims=x.dims)


def _mish(m: GraphMaker, x: Tensor) -> Tensor:
    return m.op("Mul", x, m.op("Tanh", m.op("Softplus", x)))


def activation(m: GraphMaker, x: Tensor) -> Tensor:
    """A function of each number."""
    simple = m.pick("Relu", "Tanh", "Sigmoid", "LeakyRelu", "Elu", "Softplus", "Selu", "Softsign")
    return m.pick(
        _gelu,
        _gelu,
        _silu,
        _silu,
        _hard_swish,
        _mish,
        lambda m, x: m.op("Relu", x),
        lambda m, x: m.op(simple, x),
    )(m, x)


def multilayer(m: GraphMaker, x: Tensor) -> Tensor:
    """down(act(up(x))), or with a gate: down(act(gate(x)) · up(x))."""
    inner = m.pick(16, 24, 32, 48, 64)
    with m.scope("mlp"):
        if m.chance(0.5):
            return linear(m, activation(m, linear(m, x, inner, name="up_proj")), x.size, name="down_proj")
        bias = m.chance(0.4)
        if m.chance(0.4):
            both = linear(m, x, 2 * inner, name="gate_up_proj", bias=bias)
            gate, up = m.split(both, (inner, inner))
        else:
            gate = linear(m, x, inner, name="gate_proj", bias=bias)
            up = linear(m, x, inner, name="up_proj", bias=bias)
        act = m.pick(_silu, _gelu, activation)
        return linear(m, m.op("Mul", *m.either(act(m, gate), up)), x.size, name="down_proj")


# Norms.


def norm(m: GraphMaker, x: Tensor) -> Tensor:
    """A norm over the last axis, with random parameters."""
    with m.scope("norm"):
        return m.pick(_layer_norm, _spelled_layer_norm, rms_norm, rms_norm)(m, x)


def _layer_norm(m: GraphMaker, x: Tensor) -> Tensor:
    operands = [x, m.weight(x.size, name="scale", around=1.0, spread=0.2)]
    if m.chance(0.7):
        operands.append(m.weight(x.size, name="bias", spread=0.2))
    axis = m.pick(-1, len(x.dims) - 1)
    return m.op("LayerNormalization", *operands, axis=axis, epsilon=m.pick(1e-5, 1e-6, 1e-3))


def _square(m: GraphMaker, x: Tensor) -> Tensor:
    return m.op("Mul", x, x) if m.chance(0.4) else m.op("Pow", x, scalar(m, 2.0), dims=x.dims)


def _divided_by_root(m: GraphMaker, x: Tensor, of: Tensor) -> Tensor:
    """x / √(mean(of²) + ε)"""
    mean = m.reduce("Mean", _square(m, of), len(x.dims) - 1 if m.chance(0.5) else -1)
    sum_ = m.op("Add", *m.either(mean, scalar(m, m.pick(1e-5, 1e-6))), dims=mean.dims)
    if m.chance(0.2):
        return m.op("Mul", x, m.op("Pow", sum_, scalar(m, -0.5), dims=sum_.dims))
    root = m.op("Sqrt", sum_)
    if m.chance(0.5):
        return m.op("Div", x, root)
    return m.op("Mul", *m.either(x, m.op("Reciprocal", root)), dims=x.dims)


def _scaled(m: GraphMaker, x: Tensor) -> Tensor:
    weight = m.weight(x.size, name="scale", around=1.0, spread=0.2)
    if m.chance(0.15):
        zero_centered = m.weight(x.size, name="scale", spread=0.2)
        weight = m.op("Add", zero_centered, scalar(m, 1.0), dims=zero_centered.dims)
    return m.op("Mul", *m.either(x, weight), dims=x.dims)


def _spelled_layer_norm(m: GraphMaker, x: Tensor) -> Tensor:
    centered = m.op("Sub", x, m.reduce("Mean", x, -1))
    y = _scaled(m, _divided_by_root(m, centered, centered))
    if m.chance(0.7):
        y = m.op("Add", *m.either(y, m.weight(x.size, name="bias", spread=0.2)), dims=x.dims)
    return y


def rms_norm(m: GraphMaker, x: Tensor) -> Tensor:
    if m.opset >= 23 and m.chance(0.4):
        weight = m.weight(x.size, name="scale", around=1.0, spread=0.2)
        return m.op("RMSNormalization", x, weight, axis=-1, epsilon=1e-5)
    return _scaled(m, _divided_by_root(m, x, x))
