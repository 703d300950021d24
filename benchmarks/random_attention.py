"""Attention of random networks: spelled out or as one node, with rotary positions, masks and caches."""

from __future__ import annotations

import math

import numpy as np
from onnx import TensorProto, helper
from random_graphs import GraphMaker, Tensor
from random_layers import linear, rms_norm, scalar


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
                query = rms_norm(m, query)
            with m.scope("k_norm"):
                key = rms_norm(m, key)
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
        query = m.op("Mul", query, scalar(m, scale), dims=query.dims)
    if where == "both":
        query, turned = (
            m.op("Mul", each, scalar(m, math.sqrt(scale)), dims=each.dims) for each in (query, turned)
        )
    scores = m.op("MatMul", query, turned, dims=(*query.dims[:3], key.dims[2]))
    if where == "scores":
        scores = m.op("Mul", scores, scalar(m, scale), dims=scores.dims)
    if where == "division":
        scores = m.op("Div", scores, scalar(m, math.sqrt(size)), dims=scores.dims)
    if m.chance(0.1):
        capped = m.op("Tanh", m.op("Div", scores, scalar(m, 5.0), dims=scores.dims))
        scores = m.op("Mul", capped, scalar(m, 5.0), dims=scores.dims)
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
