"""What the tests of eviction share: scores and choices in numpy, and caches to choose from."""

import numpy as np
import planish
from planish.codegen.target import BoundModel
from planish.ir.companions import EVICTION, companions_of
from planish.passes import Pipeline
from planish.passes.infrastructure.driver import run_pipeline
from planish.runtime.session import Session
from small_decoders import HEADS, KV_HEADS, LAYERS, SIZE

TARGET = planish.get_target("onnxruntime-cpu", threads=1)


def apply(model, calibration, *passes):
    run_pipeline(model, Pipeline(list(passes)), target=TARGET, calibration=calibration)
    return companions_of(model)[EVICTION]


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def attention(keys, queries, scale):
    """[batch, heads, queries, tokens], the last query being at the last token."""
    keys = keys.repeat(HEADS // KV_HEADS, axis=1)
    products = queries @ keys.transpose(0, 1, 3, 2) * scale
    count, length = products.shape[-2:]
    hidden = np.arange(length) > np.arange(length - count, length)[:, None]
    return softmax(np.where(hidden, -np.inf, products))


def per_kv_head(scores):
    """Mean over the query heads of a group, which lie side by side."""
    return scores.reshape(scores.shape[0], KV_HEADS, HEADS // KV_HEADS, -1).mean(2)


def pooled(scores, kernel):
    padded = np.pad(scores, ((0, 0), (0, 0), (kernel // 2, kernel // 2)))
    return np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=-1).mean(-1)


def reference(policy, keys, values, queries, scale, kernel=5):
    if policy == "knorm":
        return -np.linalg.norm(keys, axis=-1)
    if policy == "keydiff":
        unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
        anchor = unit.mean(2, keepdims=True)
        return -(unit * anchor / np.linalg.norm(anchor, axis=-1, keepdims=True)).sum(-1)
    if policy == "recent":
        return np.broadcast_to(np.arange(keys.shape[2]), keys.shape[:3])
    weights = attention(keys, queries, scale)
    if policy == "snapkv":
        return pooled(per_kv_head(weights.mean(2)), kernel)
    if policy == "h2o":
        return per_kv_head(weights.sum(2))
    assert policy == "tova"
    return np.broadcast_to(weights[:, :, -1].mean(1, keepdims=True), keys.shape[:3])


def kept_by(scores, count, sinks, recent):
    """[batch, kv_heads, count] positions, in order."""
    ranked = np.array(scores, np.float64)
    ranked[..., :sinks] = np.inf
    ranked[..., ranked.shape[-1] - recent :] = np.inf
    return np.sort(np.argsort(-ranked, axis=-1, kind="stable")[..., :count], axis=-1)


def gathered(array, kept):
    return np.take_along_axis(array, kept[..., None], axis=2)


def rotated(vectors, position):
    """Llama's rotation of [..., size] by a position, in float64."""
    angles = position * 10000.0 ** (-np.arange(0, SIZE, 2) / SIZE)
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = vectors[..., : SIZE // 2], vectors[..., SIZE // 2 :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def run(model, feeds):
    return Session(BoundModel(model=model), target=TARGET).run(feeds)


def random_caches(rng, length, capacity, dtype=np.float32, size=SIZE):
    """Buffers whose ends hold nothing that may be read."""
    caches = {}
    for layer in range(LAYERS):
        for part in ("key", "value"):
            array = np.full((2, KV_HEADS, capacity, size), np.nan if dtype is np.float32 else 77, dtype)
            shape = (2, KV_HEADS, length, size)
            array[:, :, :length] = (
                rng.standard_normal(shape) if dtype is np.float32 else rng.integers(0, 127, shape)
            )
            caches[f"past_key_values.{layer}.{part}"] = array
    return caches
