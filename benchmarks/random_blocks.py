"""The parts that random networks are made of, each in the spellings that exporters and people use.

A block takes a tensor and gives one of the same meaning: tokens [batch, sequence, features], images
[batch, channels, height, width], or rows [batch, features]. Numbers stay of the order of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper
from random_graphs import FUNCTIONS, GraphMaker, Tensor

Block = Callable[[GraphMaker, Tensor], Tensor]

# Linears and activations.


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


def _scalar(m: GraphMaker, number: float) -> Tensor:
    shape = m.pick((), (), (1,))
    return m.constant(np.full(shape, number, np.float32), "scalar")


def _gelu(m: GraphMaker, x: Tensor) -> Tensor:
    if m.opset >= 20 and m.chance(0.4):
        return m.op("Gelu", x, approximate=m.pick("none", "tanh"))
    if m.chance(0.3):
        return _tanh_gelu(m, x)
    inner = m.pick(
        lambda: m.op("Div", x, _scalar(m, math.sqrt(2))),
        lambda: m.op("Mul", *m.either(x, _scalar(m, 1 / math.sqrt(2))), dims=x.dims),
    )()
    sum_ = m.op("Add", *m.either(m.op("Erf", inner), _scalar(m, 1.0)), dims=x.dims)
    if m.chance(0.5):
        half = m.op("Mul", *m.either(x, _scalar(m, 0.5)), dims=x.dims)
        return m.op("Mul", *m.either(half, sum_))
    product = m.op("Mul", *m.either(x, sum_))
    return m.op("Mul", *m.either(product, _scalar(m, 0.5)), dims=x.dims)


def _tanh_gelu(m: GraphMaker, x: Tensor) -> Tensor:
    cube = m.op("Pow", x, _scalar(m, 3.0)) if m.chance(0.5) else m.op("Mul", x, m.op("Mul", x, x))
    inner = m.op("Add", *m.either(x, m.op("Mul", cube, _scalar(m, 0.044715))))
    scaled = m.op("Mul", *m.either(inner, _scalar(m, math.sqrt(2 / math.pi))), dims=x.dims)
    sum_ = m.op("Add", *m.either(m.op("Tanh", scaled), _scalar(m, 1.0)), dims=x.dims)
    half = m.op("Mul", *m.either(x, _scalar(m, 0.5)), dims=x.dims)
    return m.op("Mul", *m.either(half, sum_))


def _silu(m: GraphMaker, x: Tensor) -> Tensor:
    factor = m.pick(1.0, 1.0, 1.702)
    inner = x if factor == 1.0 else m.op("Mul", x, _scalar(m, factor), dims=x.dims)
    return m.op("Mul", *m.either(x, m.op("Sigmoid", inner)))


def _hard_swish(m: GraphMaker, x: Tensor) -> Tensor:
    if m.chance(0.4):
        return m.op("HardSwish", x)
    if m.chance(0.5):
        return m.op("Mul", *m.either(x, m.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)))
    low, high = (m.constant(np.float32(bound), "bound") for bound in (0.0, 6.0))
    shifted = m.op("Add", x, _scalar(m, 3.0), dims=x.dims)
    clipped = m.op("Clip", shifted, low, high)
    return m.op("Div", m.op("Mul", *m.either(x, clipped)), _scalar(m, 6.0), dims=x.dims)


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
        return m.pick(_layer_norm, _spelled_layer_norm, _rms_norm, _rms_norm)(m, x)


def _layer_norm(m: GraphMaker, x: Tensor) -> Tensor:
    operands = [x, m.weight(x.size, name="scale", around=1.0, spread=0.2)]
    if m.chance(0.7):
        operands.append(m.weight(x.size, name="bias", spread=0.2))
    axis = m.pick(-1, len(x.dims) - 1)
    return m.op("LayerNormalization", *operands, axis=axis, epsilon=m.pick(1e-5, 1e-6, 1e-3))


def _square(m: GraphMaker, x: Tensor) -> Tensor:
    return m.op("Mul", x, x) if m.chance(0.4) else m.op("Pow", x, _scalar(m, 2.0), dims=x.dims)


def _divided_by_root(m: GraphMaker, x: Tensor, of: Tensor) -> Tensor:
    """x / √(mean(of²) + ε)"""
    mean = m.reduce("Mean", _square(m, of), len(x.dims) - 1 if m.chance(0.5) else -1)
    sum_ = m.op("Add", *m.either(mean, _scalar(m, m.pick(1e-5, 1e-6))), dims=mean.dims)
    if m.chance(0.2):
        return m.op("Mul", x, m.op("Pow", sum_, _scalar(m, -0.5), dims=sum_.dims))
    root = m.op("Sqrt", sum_)
    if m.chance(0.5):
        return m.op("Div", x, root)
    return m.op("Mul", *m.either(x, m.op("Reciprocal", root)), dims=x.dims)


def _scaled(m: GraphMaker, x: Tensor) -> Tensor:
    weight = m.weight(x.size, name="scale", around=1.0, spread=0.2)
    if m.chance(0.15):
        zero_centered = m.weight(x.size, name="scale", spread=0.2)
        weight = m.op("Add", zero_centered, _scalar(m, 1.0), dims=zero_centered.dims)
    return m.op("Mul", *m.either(x, weight), dims=x.dims)


def _spelled_layer_norm(m: GraphMaker, x: Tensor) -> Tensor:
    centered = m.op("Sub", x, m.reduce("Mean", x, -1))
    y = _scaled(m, _divided_by_root(m, centered, centered))
    if m.chance(0.7):
        y = m.op("Add", *m.either(y, m.weight(x.size, name="bias", spread=0.2)), dims=x.dims)
    return y


def _rms_norm(m: GraphMaker, x: Tensor) -> Tensor:
    if m.opset >= 23 and m.chance(0.4):
        weight = m.weight(x.size, name="scale", around=1.0, spread=0.2)
        return m.op("RMSNormalization", x, weight, axis=-1, epsilon=1e-5)
    return _scaled(m, _divided_by_root(m, x, x))


# Attention.


def attention(m: GraphMaker, x: Tensor) -> Tensor:
    """Attention of tokens to each other; with the model's cache where it has one."""
    heads, size = m.pick((1, 8), (2, 4), (2, 8), (4, 4), (4, 8), (3, 8), (2, 16))
    shared = (
        m.pick(*(divisor for divisor in (1, 2, 3, 4) if heads % divisor == 0)) if m.chance(0.5) else heads
    )
    layer = m.memory.get("layers", 0)
    if m.memory.get("has_cache"):
        m.memory["layers"] = layer + 1
    with m.scope("self_attn"):
        query, key, value = _projections(m, x, heads, shared, size)
        if m.chance(0.2):
            with m.scope("q_norm"):
                query = _rms_norm(m, query)
            with m.scope("k_norm"):
                key = _rms_norm(m, key)
        if m.memory.get("has_positions"):
            query, key = (_rotated(m, each) for each in (query, key))
        attend = _attend
        if m.opset >= 23 and m.chance(0.35):
            attend = _attention_op
        y = attend(m, x, query, key, value, layer)
        y = m.reshape(m.transpose(y, 0, 2, 1, 3), (*x.dims[:2], heads * size))
        return linear(m, y, x.size, name="o_proj")


def _projections(
    m: GraphMaker, x: Tensor, heads: int, shared: int, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as [batch, heads, sequence, size]."""
    bias = m.chance(0.5)
    if m.chance(0.3):
        sizes = (heads * size, shared * size, shared * size)
        joined = linear(m, x, sum(sizes), name="qkv_proj", bias=bias)
        if heads == shared and m.chance(0.4):
            parts = m.reshape(joined, (*x.dims[:2], 3, heads, size))
            turned = m.transpose(parts, 2, 0, 3, 1, 4)
            rows = [m.constant(np.array(index, np.int64), "index") for index in range(3)]
            query, key, value = (m.op("Gather", turned, row, dims=turned.dims[1:], axis=0) for row in rows)
            return query, key, value
        flat = m.split(joined, sizes)
    else:
        flat = (
            linear(m, x, heads * size, name="q_proj", bias=bias),
            linear(m, x, shared * size, name="k_proj", bias=bias),
            linear(m, x, shared * size, name="v_proj", bias=bias),
        )
    query, key, value = (
        m.transpose(m.reshape(each, (*x.dims[:2], count, size)), 0, 2, 1, 3)
        for each, count in zip(flat, (heads, shared, shared), strict=True)
    )
    return query, key, value


def _positions(m: GraphMaker, x: Tensor) -> Tensor:
    """Position ids [batch, sequence] or [1, sequence]."""
    given = m.find_input("position_ids")
    if given is not None:
        return given
    if "positions" not in m.memory:
        m.memory["positions"] = m.unsqueeze(_counted(m, m.dim(x, x.dims.index("sequence")), "sequence"), 0)
    positions: Tensor = m.memory["positions"]
    return positions


def _counted(m: GraphMaker, length: Tensor, symbol: str) -> Tensor:
    """0, 1, …, length − 1."""
    scalar = m.op("Squeeze", length, m.constant(np.array([0], np.int64), "axes"), dims=())
    zero, one = (m.constant(np.array(number, np.int64), "number") for number in (0, 1))
    return m.op("Range", zero, scalar, one, dims=(symbol,), dtype=TensorProto.INT64)


def _rotated(m: GraphMaker, x: Tensor) -> Tensor:
    """Rotary position embeddings of [batch, heads, sequence, size], in the half-split layout."""
    size = x.size
    turned = size // 2 if m.memory.setdefault("is_partial", m.chance(0.15)) and size >= 8 else size
    cosine, sine = _angles(m, x, turned)
    if turned != size:
        part, rest = m.split(x, (turned, size - turned))
        return m.op("Concat", _turned(m, part, cosine, sine), rest, dims=x.dims, axis=-1)
    return _turned(m, x, cosine, sine)


def _turned(m: GraphMaker, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = m.split(x, (x.size // 2, x.size // 2))
    half = m.op("Concat", m.op("Neg", second), first, dims=x.dims, axis=-1)
    direct = m.op("Mul", *m.either(x, cosine), dims=x.dims)
    return m.op("Add", *m.either(direct, m.op("Mul", *m.either(half, sine), dims=x.dims)))


def _angles(m: GraphMaker, x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine [batch, 1, sequence, size], shared by all layers of this size."""
    key = f"angles {size}"
    if key in m.memory:
        found: tuple[Tensor, Tensor] = m.memory[key]
        return found
    positions = _positions(m, x)
    frequencies = (100.0 ** -(np.arange(0, size, 2) / size)).astype(np.float32)
    dims = (*positions.dims, size)
    if m.memory.setdefault("has_table", m.chance(0.3)):
        angles = np.arange(64)[:, None] * np.concatenate([frequencies, frequencies])
        tables = [m.constant(part(angles).astype(np.float32), "table") for part in (np.cos, np.sin)]
        rows = [m.op("Gather", table, positions, dims=dims, axis=0) for table in tables]
    else:
        wide = m.unsqueeze(m.cast(positions, TensorProto.FLOAT), 2)
        steps = m.constant(frequencies[None, None, :], "inv_freq")
        half = m.op(m.pick("Mul", "MatMul"), wide, steps, dims=(*positions.dims, size // 2))
        both = m.op("Concat", half, half, dims=dims, axis=-1)
        rows = [m.op(function, both) for function in ("Cos", "Sin")]
    cosine, sine = (m.unsqueeze(each, 1) for each in rows)
    m.memory[key] = cosine, sine
    return cosine, sine


def _cached(m: GraphMaker, new: Tensor, layer: int, kind: str) -> tuple[Tensor, Tensor]:
    """The past of a layer, a graph input, and past and new together, a graph output."""
    heads, size = new.dims[1], new.dims[3]
    past = m.input(f"past_key_values.{layer}.{kind}", ("batch", heads, "past", size), "past")
    both = m.op("Concat", past, new, dims=("batch", heads, "total", size), axis=2)
    return past, both


def _attend(m: GraphMaker, x: Tensor, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
    """Softmax(s · q kᵀ + mask) v, spelled out."""
    if m.memory.get("has_cache"):
        key, value = (_kept(m, each, layer, kind) for each, kind in ((key, "key"), (value, "value")))
    heads, size = query.dims[1], query.size
    assert isinstance(heads, int)
    key, value = (_repeated(m, each, heads) for each in (key, value))
    turned, scale = m.transpose(key, 0, 1, 3, 2), 1 / math.sqrt(size)
    where = m.pick("scores", "scores", "query", "both", "division")
    if where == "query":
        query = m.op("Mul", query, _scalar(m, scale), dims=query.dims)
    if where == "both":
        query, turned = (
            m.op("Mul", each, _scalar(m, math.sqrt(scale)), dims=each.dims) for each in (query, turned)
        )
    scores = m.op("MatMul", query, turned, dims=(*query.dims[:3], key.dims[2]))
    if where == "scores":
        scores = m.op("Mul", scores, _scalar(m, scale), dims=scores.dims)
    if where == "division":
        scores = m.op("Div", scores, _scalar(m, math.sqrt(size)), dims=scores.dims)
    if m.chance(0.1):
        capped = m.op("Tanh", m.op("Div", scores, _scalar(m, 5.0), dims=scores.dims))
        scores = m.op("Mul", capped, _scalar(m, 5.0), dims=scores.dims)
    weights = m.op("Softmax", _masked(m, x, scores), axis=m.pick(-1, 3))
    if m.chance(0.1):
        zero = m.constant(np.float32(0), "zero")
        weights = m.op("Where", m.op("IsNaN", weights, dtype=TensorProto.BOOL), zero, weights,
                       dims=weights.dims, dtype=TensorProto.FLOAT)  # fmt: skip
    return m.op("MatMul", weights, value, dims=query.dims)


def _kept(m: GraphMaker, new: Tensor, layer: int, kind: str) -> Tensor:
    _, both = _cached(m, new, layer, kind)
    present = m.op("Identity", both)
    m.memory.setdefault("presents", []).append((f"present.{layer}.{kind}", present))
    return both


def _repeated(m: GraphMaker, x: Tensor, heads: int) -> Tensor:
    """Each head of keys or values for all queries that share it."""
    shared = x.dims[1]
    assert isinstance(shared, int)
    if shared == heads:
        return x
    dims = (x.dims[0], shared, heads // shared, *x.dims[2:])
    wide = m.unsqueeze(x, 2)
    expanded = m.op("Expand", wide, m.shape_of(x, dims), dims=dims)
    return m.reshape(expanded, (x.dims[0], heads, *x.dims[2:]))


def _attention_op(m: GraphMaker, x: Tensor, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
    """The op of opset 23."""
    attributes = {} if m.chance(0.5) else {"scale": 0.3}
    if m.memory.get("has_cache"):
        pasts = [_past(m, each, layer, kind) for each, kind in ((key, "key"), (value, "value"))]
        dims = [(*each.dims[:2], "total", each.size) for each in (key, value)]
        mask = _causal(m, x)
        y, *presents = m.ops(
            "Attention", query, key, value, mask, *pasts, dims=[query.dims, *dims], **attributes
        )
        names = [f"present.{layer}.{kind}" for kind in ("key", "value")]
        m.memory.setdefault("presents", []).extend(zip(names, presents, strict=True))
        return y
    if m.memory.get("is_causal"):
        return m.op("Attention", query, key, value, is_causal=1, **attributes)
    operands = [query, key, value]
    if m.find_input("attention_mask") is not None:
        mask = _padding(m, x)
        shape = m.shape_of(query, (query.dims[0], 1, query.dims[2], query.dims[2]))
        operands.append(m.op("Expand", mask, shape, dims=(query.dims[0], 1, query.dims[2], query.dims[2])))
    return m.op("Attention", *operands, **attributes)


def _past(m: GraphMaker, new: Tensor, layer: int, kind: str) -> Tensor:
    return m.input(f"past_key_values.{layer}.{kind}", ("batch", new.dims[1], "past", new.size), "past")


def _masked(m: GraphMaker, x: Tensor, scores: Tensor) -> Tensor:
    """Scores with what must not be seen made very small, by adding or by choosing."""
    masks = []
    if m.memory.get("is_causal") or m.memory.get("has_cache"):
        masks.append(_causal(m, x))
    elif m.find_input("attention_mask") is not None:
        masks.append(_padding(m, x))
    for mask in masks:
        low = m.pick(-np.inf, float(np.finfo(np.float32).min), -1e9, -1e4)
        if m.chance(0.5):
            filled = m.constant(np.float32(low), "low")
            scores = m.op("Where", mask, scores, filled, dims=scores.dims, dtype=TensorProto.FLOAT)
        else:
            numbers = (m.constant(np.float32(number), "number") for number in (0.0, low))
            added = m.op("Where", mask, *numbers, dims=mask.dims, dtype=TensorProto.FLOAT)
            scores = m.op("Add", *m.either(scores, added), dims=scores.dims)
    return scores


def _padding(m: GraphMaker, x: Tensor) -> Tensor:
    """True for real keys, [batch, 1, 1, keys]."""
    if "padding" not in m.memory:
        mask = m.find_input("attention_mask")
        assert mask is not None
        m.memory["padding"] = m.cast(m.unsqueeze(mask, 1, 2), TensorProto.BOOL)
    found: Tensor = m.memory["padding"]
    return found


def _causal(m: GraphMaker, x: Tensor) -> Tensor:
    """True where a key is not after its query, [1 or batch, 1, queries, keys], real keys only."""
    if "causal" not in m.memory:
        m.memory["causal"] = _made_causal(m, x)
    found: Tensor = m.memory["causal"]
    return found


def _made_causal(m: GraphMaker, x: Tensor) -> Tensor:
    sequence = m.dim(x, 1)
    past = m.find_input("past_key_values.0.key")
    if past is None and m.chance(0.3):
        square = m.op("Concat", sequence, sequence, dims=(2,), axis=0)
        ones = m.op("ConstantOfShape", square, dims=(x.dims[1], x.dims[1]), dtype=TensorProto.FLOAT,
                    value=helper.make_tensor("value", TensorProto.FLOAT, [1], [1.0]))  # fmt: skip
        lower = m.cast(m.op("Trilu", ones, upper=0), TensorProto.BOOL)
        return m.unsqueeze(lower, 0, 1)
    total = sequence if past is None else m.op("Add", m.dim(past, 2), sequence)
    keys = _counted(m, total, str(x.dims[1]) if past is None else "total")
    queries = _counted(m, sequence, str(x.dims[1]))
    if past is not None:
        queries = m.op("Add", queries, m.dim(past, 2))
    row, column = m.unsqueeze(keys, 0), m.unsqueeze(queries, 1)
    dims = (*column.dims[:1], row.dims[1])
    seen = m.pick(
        lambda: m.op("LessOrEqual", row, column, dims=dims, dtype=TensorProto.BOOL),
        lambda: m.op("GreaterOrEqual", column, row, dims=dims, dtype=TensorProto.BOOL),
    )()
    causal = m.unsqueeze(seen, 0, 1)
    if m.find_input("attention_mask") is None:
        return causal
    padding = _padding(m, x)
    return m.op("And", *m.either(causal, padding), dims=(padding.dims[0], 1, *causal.dims[2:]))


# Moving tokens and features around.


def shuffle(m: GraphMaker, x: Tensor) -> Tensor:
    """Moves numbers without changing their meaning much: slices, concatenations, gathers, transposes."""
    return m.pick(_rolled, _permuted, _halves_swapped, _turned_twice, _shifted_tokens, _reversed)(m, x)


def _rolled(m: GraphMaker, x: Tensor) -> Tensor:
    cut = int(m.rng.integers(1, x.size))
    first, second = m.split(x, (cut, x.size - cut))
    return m.op("Concat", second, first, dims=x.dims, axis=m.pick(-1, len(x.dims) - 1))


def _permuted(m: GraphMaker, x: Tensor) -> Tensor:
    order = m.constant(m.rng.permutation(x.size).astype(np.int64), "order")
    return m.op("Gather", x, order, axis=m.pick(-1, len(x.dims) - 1))


def _halves_swapped(m: GraphMaker, x: Tensor) -> Tensor:
    if x.size % 2:
        return _rolled(m, x)
    pairs = m.reshape(x, (*x.dims[:-1], 2, x.size // 2))
    order = list(range(len(x.dims) + 1))
    order[-1], order[-2] = order[-2], order[-1]
    return m.reshape(m.transpose(pairs, *order), x.dims)


def _turned_twice(m: GraphMaker, x: Tensor) -> Tensor:
    order = [0, *range(len(x.dims) - 1, 0, -1)]
    turned = m.transpose(x, *order)
    return m.transpose(m.pick(activation, lambda m, x: x)(m, turned), *order)


def _shifted_tokens(m: GraphMaker, x: Tensor) -> Tensor:
    """Each token gets a part of the one before it."""
    if len(x.dims) != 3 or x.dims[1] != "sequence" or "has_cache" in m.memory:
        return _rolled(m, x)
    pads = m.constant(np.array([0, 1, 0, 0, -1, 0], np.int64), "pads")
    before = m.op("Pad", x, pads)
    return m.op("Add", x, m.op("Mul", before, _scalar(m, 0.5), dims=x.dims))


def _reversed(m: GraphMaker, x: Tensor) -> Tensor:
    low = int(np.iinfo(np.int64).min)
    numbers = ([-1], [low + 1], [len(x.dims) - 1], [-1])
    bounds = [m.constant(np.array(number, np.int64), "bound") for number in numbers]
    return m.op("Slice", x, *bounds)


def mixing(m: GraphMaker, x: Tensor) -> Tensor:
    """A convolution over tokens, or their mean."""
    with m.scope("mixing"):
        if m.chance(0.5):
            weight = m.weight(x.size, 1, 3, spread=0.5)
            turned = m.transpose(x, 0, 2, 1)
            mixed = m.op("Conv", turned, weight, pads=[1, 1], kernel_shape=[3], group=x.size)
            return m.transpose(mixed, 0, 2, 1)
        return m.op("Add", *m.either(x, m.reduce("Mean", x, 1)), dims=x.dims)


def no_op(m: GraphMaker, x: Tensor) -> Tensor:
    """Something that does nothing."""
    match m.pick(
        "identity", "dropout", "cast", "times one", "plus zero", "reshape", "concat", "pow", "slice"
    ):
        case "identity":
            return m.op("Identity", x)
        case "dropout":
            return m.op("Dropout", x)
        case "cast":
            return m.cast(x, x.dtype)
        case "times one":
            return m.op("Mul", x, m.constant(np.ones(m.pick((), (1,), (x.size,)), np.float32), "ones"))
        case "plus zero":
            return m.op("Add", x, m.constant(np.zeros(m.pick((), (1,), (x.size,)), np.float32), "zeros"))
        case "reshape":
            return m.reshape(x, x.dims)
        case "concat":
            return m.op("Concat", x, axis=-1)
        case "pow":
            return m.op("Pow", x, _scalar(m, 1.0), dims=x.dims)
    return m.slice(x, len(x.dims) - 1, 0, x.size)


def in_half(m: GraphMaker, x: Tensor) -> Tensor:
    """A part that is computed in float16."""
    half = m.cast(x, TensorProto.FLOAT16)
    scale = m.constant(np.float16(0.5), "scale")
    y = m.op("Mul", m.op(m.pick("Tanh", "Relu", "Sigmoid"), half), scale)
    if m.chance(0.5):
        array = (m.rng.standard_normal((x.size, x.size)) / np.sqrt(x.size)).astype(np.float16)
        y = m.op("MatMul", y, m.constant(array, "weight"))
    m.memory["has_half"] = True
    return m.cast(y, TensorProto.FLOAT)


def dead(m: GraphMaker, x: Tensor) -> Tensor:
    """Computes what nobody reads."""
    m.op("Exp", linear(m, x, 8, name="unused"))
    m.weight(3, name="unused")
    return x


def hidden_output(m: GraphMaker, x: Tensor) -> Tensor:
    """What is here is an output of the model, too."""
    m.outputs.append(m.op("Identity", x) if m.chance(0.5) else x)
    return x


# Control flow and functions.


def branches(m: GraphMaker, x: Tensor) -> Tensor:
    """An If whose condition is a constant, or follows from a shape."""
    if m.chance(0.4):
        condition = m.constant(np.array(m.chance(0.5)), "condition")
    else:
        length = m.op("Squeeze", m.dim(x, 0), m.constant(np.array([0], np.int64), "axes"), dims=())
        bound = m.constant(np.array(2, np.int64), "bound")
        condition = m.op(m.pick("Less", "Greater"), length, bound, dtype=TensorProto.BOOL)
    bodies = [_subgraph(m, x, f"branch_{index}") for index in range(2)]
    return m.op("If", condition, dims=x.dims, dtype=x.dtype, then_branch=bodies[0], else_branch=bodies[1])


def _subgraph(m: GraphMaker, x: Tensor, name: str) -> onnx.GraphProto:
    """A graph without inputs that reads ``x`` from outside."""
    with m.scope(name), m.body() as nodes:
        y = m.pick(_simple, activation, no_op)(m, x)
        if y == x:
            y = m.op("Identity", x)
    return helper.make_graph(nodes, m.new_name(name), [], [_typed(y)])


def _simple(m: GraphMaker, x: Tensor) -> Tensor:
    return activation(m, linear(m, x, x.size))


def _typed(tensor: Tensor) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, tensor.dtype, list(tensor.dims))


def loop(m: GraphMaker, x: Tensor) -> Tensor:
    """The same layer two or three times."""
    count = m.constant(np.array(m.pick(1, 2, 3), np.int64), "count")
    go_on = m.constant(np.array(True), "go_on")
    with m.scope("loop"), m.body() as nodes:
        number = Tensor(m.new_name("number"), (), TensorProto.INT64)
        before = Tensor(m.new_name("before"), (), TensorProto.BOOL)
        state = Tensor(m.new_name("state"), x.dims)
        after = m.op("Identity", before)
        result = m.op("Tanh", m.op("Add", linear(m, state, x.size), x, dims=x.dims))
    inputs, outputs = (number, before, state), (after, result)
    body = helper.make_graph(
        nodes, m.new_name("body"), [_typed(t) for t in inputs], [_typed(t) for t in outputs]
    )
    return m.op("Loop", count, go_on, x, dims=x.dims, dtype=x.dtype, body=body)


def function(m: GraphMaker, x: Tensor) -> Tensor:
    """A call of a function of the model: the same layer at one or two places."""
    known: dict[tuple[int, int], str] = m.memory.setdefault("functions", {})
    key = (x.size, len(x.dims))
    if key not in known:
        known[key] = f"Layer_{len(known)}"
        with m.body(of_function=True) as nodes:
            given = Tensor("given", x.dims)
            result = m.pick(_simple, norm, multilayer)(m, given)
        proto = helper.make_function(
            FUNCTIONS, known[key], ["given"], [result.name], nodes, [helper.make_opsetid("", m.opset)]
        )
        m.functions.append(proto)
    return m.op(known[key], x, domain=FUNCTIONS)


# Images.


def convolution(m: GraphMaker, x: Tensor) -> Tensor:
    """A convolution, mostly with batch norm and activation behind it."""
    with m.scope("conv"):
        y = _conv(m, x, m.pick(4, 6, 8, 12, 16), m.pick(1, 3, 3, 5), m.pick(1, 1, 2))
        if m.chance(0.5):
            y = _batch_norm(m, y)
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


def _batch_norm(m: GraphMaker, x: Tensor) -> Tensor:
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
        inner = activation(m, _batch_norm(m, _conv(m, x, m.pick(4, 8, 12), 3)))
        y = _batch_norm(m, _conv(m, inner, out, 3, group=1))
        with m.scope("shortcut"):
            shortcut = x if out == channels else _conv(m, x, out, 1, group=1)
        y = m.op("Add", *m.either(y, shortcut))
        return m.op("Relu", y) if m.chance(0.5) else y


def inverted_residual(m: GraphMaker, x: Tensor) -> Tensor:
    """Wide in the middle, with a depthwise convolution and a gate of channels (MobileNet)."""
    with m.scope("inverted"):
        channels, wide = int(x.dims[1]), 2 * int(x.dims[1])
        y = activation(m, _batch_norm(m, _conv(m, x, wide, 1, group=1)))
        y = activation(m, _batch_norm(m, _conv(m, y, wide, 3, group=wide)))
        if m.chance(0.6):
            y = _channel_gate(m, y)
        return m.op("Add", *m.either(x, _batch_norm(m, _conv(m, y, channels, 1, group=1))))


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


# Rows.


def row_block(m: GraphMaker, x: Tensor) -> Tensor:
    """A layer with a norm of its batch or of its features."""
    with m.scope("layer"):
        y = linear(m, x, m.pick(8, 12, 16, 24, 32))
        y = m.pick(_batch_norm, norm, activation, lambda m, y: y)(m, y)
        return activation(m, y) if m.chance(0.5) else y


def row_products(m: GraphMaker, x: Tensor) -> Tensor:
    """Features that gate each other, or are weighed by a softmax."""
    with m.scope("gating"):
        if m.chance(0.5):
            weights = m.op("Softmax", linear(m, x, x.size, name="weights"), axis=m.pick(-1, 1))
            return m.op("Mul", *m.either(x, m.op("Mul", weights, _scalar(m, float(x.size)), dims=x.dims)))
        parts = [linear(m, x, x.size // 2 + 1, name=f"part_{index}") for index in range(2)]
        return m.op("Concat", *parts, dims=(x.dims[0], 2 * (x.size // 2 + 1)), axis=1)


# Residual blocks.


def residual(m: GraphMaker, x: Tensor) -> Tensor:
    """x + f(norm(x)), or norm(x + f(x))."""
    parts: tuple[Block, ...] = (multilayer, multilayer)
    if len(x.dims) == 3:
        # What is cached are keys and values: nothing else may look at other tokens then.
        parts += (attention, attention, attention, attention if "has_cache" in m.memory else mixing)
    part = m.pick(*parts)
    if m.chance(0.75):
        return m.op("Add", *m.either(x, part(m, norm(m, x))))
    return norm(m, m.op("Add", *m.either(x, part(m, x))))
