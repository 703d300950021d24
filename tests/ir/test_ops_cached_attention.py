"""``CachedAttention`` against attention in numpy, and its overloads' storage bit by bit."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from planish.ir import ops
from planish.ir.errors import ModelError
from planish.ir.ops.cached_attention import cached_attention

HEADS, KV_HEADS, SIZE = 4, 2, 8
STORED = {32: ir.DataType.FLOAT, 8: ir.DataType.INT8, 4: ir.DataType.UINT8}


def model_of(bits, scales=None, softcap=0.0, floats=ir.DataType.FLOAT):
    columns = SIZE // 2 if bits == 4 else SIZE

    def value(name, shape, dtype=floats):
        return ir.val(name, shape=shape, dtype=dtype)

    query = value("query", ["batch", "new", HEADS * SIZE])
    key, values = (value(name, ["batch", "new", KV_HEADS * SIZE]) for name in ("key", "value"))
    mask = value("mask", ["batch", 1, "new", "all"], ir.DataType.BOOL)
    past = tuple(
        value(name, ["batch", KV_HEADS, "past", columns], STORED[bits]) for name in ("past_key", "past_value")
    )
    constants = [
        ir.val(f"scale{index}", shape=scale.shape, dtype=ir.DataType.FLOAT, const_value=ir.tensor(scale))
        for index, scale in enumerate(scales or ())
    ]
    node, definition = cached_attention(
        query,
        key,
        values,
        mask,
        past,
        q_num_heads=HEADS,
        kv_num_heads=KV_HEADS,
        scale=0.25,
        softcap=softcap,
        scales=tuple(constants) or None,
        bits=bits,
        name="attention",
    )
    for output, name in zip(node.outputs, ("y", "present_key", "present_value"), strict=True):
        output.name = name
    graph = ir.Graph(
        [query, key, values, mask, *past],
        node.outputs,
        nodes=[node],
        initializers=constants,
        opset_imports={"": 23},
        name="graph",
    )
    model = ir.Model(graph, ir_version=11)
    ops.define(model, definition)
    return model


def run(model, feeds):
    ops.inline(model)
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(["y", "present_key", "present_value"], feeds)


def made_up(bits, batch=2, new=3, past=5):
    rng = np.random.default_rng(bits)
    floats = {
        name: rng.standard_normal((batch, new, heads * SIZE)).astype(np.float32)
        for name, heads in (("query", HEADS), ("key", KV_HEADS), ("value", KV_HEADS))
    }
    shape = (batch, KV_HEADS, past, SIZE // 2 if bits == 4 else SIZE)
    if bits == 32:
        caches = [rng.standard_normal(shape).astype(np.float32) for _ in range(2)]
    else:
        low, high = (-128, 128) if bits == 8 else (0, 256)
        caches = [rng.integers(low, high, shape).astype(STORED[bits].numpy()) for _ in range(2)]
    mask = np.arange(past + new) <= past + np.arange(new)[:, None]
    mask = np.broadcast_to(mask, (batch, 1, new, past + new)).copy()
    mask[0, ..., :2] = False
    return {**floats, "mask": mask, "past_key": caches[0], "past_value": caches[1]}


def heads_first(array, heads):
    batch, new, _ = array.shape
    return array.reshape(batch, new, heads, SIZE).transpose(0, 2, 1, 3)


def stored(past, new, scale, bits):
    """The present as it is stored and as the numbers that it stands for."""
    if bits == 32:
        present = np.concatenate([past, new], axis=2)
        return present, present
    rounded = np.round(new / scale)
    if bits == 8:
        present = np.concatenate([past, rounded.clip(-128, 127).astype(np.int8)], axis=2)
        return present, present * scale
    nibbles = (rounded.clip(-8, 7) + 8).astype(np.uint8)
    present = np.concatenate([past, nibbles[..., ::2] + 16 * nibbles[..., 1::2]], axis=2)
    apart = np.stack([present % 16, present // 16], axis=-1).reshape(*present.shape[:3], SIZE)
    return present, (apart.astype(np.float32) - 8) * scale


def attention(query, keys, values, mask, softcap):
    keys, values = (np.repeat(array, HEADS // KV_HEADS, axis=1) for array in (keys, values))
    scores = 0.25 * query @ keys.swapaxes(2, 3)
    scores = softcap * np.tanh(scores / softcap) if softcap else scores
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    y = weights / weights.sum(axis=-1, keepdims=True) @ values
    return y.transpose(0, 2, 1, 3).reshape(len(y), y.shape[2], -1)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("scale_shape", [(1,), (1, KV_HEADS, 1, SIZE)])
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_what_it_computes_and_stores(bits, scale_shape, softcap):
    rng = np.random.default_rng(0)
    scales = (
        None if bits == 32 else [rng.uniform(0.05, 0.2, scale_shape).astype(np.float32) for _ in range(2)]
    )
    feeds = made_up(bits)
    y, present_key, present_value = run(model_of(bits, scales, softcap), feeds)
    key_scale, value_scale = scales or (1, 1)
    stored_key, keys = stored(feeds["past_key"], heads_first(feeds["key"], KV_HEADS), key_scale, bits)
    stored_value, values = stored(
        feeds["past_value"], heads_first(feeds["value"], KV_HEADS), value_scale, bits
    )
    np.testing.assert_array_equal(present_key, stored_key)
    np.testing.assert_array_equal(present_value, stored_value)
    expected = attention(heads_first(feeds["query"], HEADS), keys, values, feeds["mask"], softcap)
    # Sums of eight float32 products, and dequantised values up to 25.
    np.testing.assert_allclose(y, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_sixteen_bits_are_quantised_by_the_same_scales(bits):
    scales = [np.array([0.1], np.float32), np.array([0.15], np.float32)]
    half = {
        name: array.astype(np.float16) if array.dtype == np.float32 else array
        for name, array in made_up(bits).items()
    }
    wide = {
        name: array.astype(np.float32) if array.dtype == np.float16 else array for name, array in half.items()
    }
    y, *present = run(model_of(bits, scales, floats=ir.DataType.FLOAT16), half)
    expected, *expected_present = run(model_of(bits, scales), wide)
    for found, same in zip(present, expected_present, strict=True):
        np.testing.assert_array_equal(found, same)
    assert y.dtype == np.float16
    # The numbers of the cache and of the softmax are rounded to 11 bits on the way.
    np.testing.assert_allclose(y, expected, rtol=0, atol=8 * 2**-11 * np.abs(expected).max())


def test_scales_and_bits_must_fit():
    with pytest.raises(ModelError, match="8 bits has"):
        model_of(8)


def test_four_bits_need_pairs_of_channels():
    x = ir.val("x", shape=["batch", "new", 6], dtype=ir.DataType.FLOAT)
    with pytest.raises(ModelError, match="even head size"):
        cached_attention(
            x, x, x, x, (x, x), q_num_heads=2, kv_num_heads=2, scale=1.0, scales=(x, x), bits=4, name="a"
        )
