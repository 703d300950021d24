"""Eviction as a graph: scores against numpy, what stays, and what is made of it."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from evictions import (
    apply,
    gathered,
    kept_by,
    per_kv_head,
    random_caches,
    reference,
    rotated,
    run,
    softmax,
)
from planish.ir import ops, verify
from planish.ir.ops.definition import DOMAIN
from planish.passes.kv_cache import Evict, KVCache
from planish.passes.kv_cache.evict.rescoring import RESCORE
from planish.passes.kv_cache.evict.statistics import moments
from small_decoders import HEADS, KV_HEADS, LAYERS, SIZE


@pytest.mark.parametrize("policy", ["recent", "knorm", "keydiff", "snapkv", "tova", "h2o"])
def test_the_tokens_of_highest_score_stay(model, calibration, policy):
    length = 23
    window = {"snapkv": 6, "tova": 1, "h2o": length}.get(policy, 0)
    window_option = {"window": 6} if policy == "snapkv" else {}
    evict = apply(model, calibration, Evict(policy=policy, keep=0.4, sinks=2, recent=6, **window_option))
    verify(evict)
    rng = np.random.default_rng(1)
    caches = random_caches(rng, length, capacity=30)
    queries = {
        f"query.{layer}": rng.standard_normal((2, window, HEADS * SIZE)).astype(np.float32) * 2
        for layer in range(LAYERS if window else 0)
    }
    found = run(
        evict, {**caches, **queries, "cache_lengths": np.full(LAYERS, length), "seen": np.array(length)}
    )
    for layer in range(LAYERS):
        keys, values = (caches[f"past_key_values.{layer}.{part}"][:, :, :length] for part in ("key", "value"))
        heads = None
        if window:
            heads = queries[f"query.{layer}"].reshape(2, window, HEADS, SIZE).transpose(0, 2, 1, 3)
        scores = reference(policy, keys, values, heads, SIZE**-0.5)
        kept = kept_by(scores, 10, sinks=2, recent=6)  # ⌈0.4 · 23⌉
        np.testing.assert_array_equal(found[f"present.{layer}.key"], gathered(keys, kept))
        np.testing.assert_array_equal(found[f"present.{layer}.value"], gathered(values, kept))


def test_random_eviction_keeps_tokens_of_its_own_in_each_head(model, calibration):
    evict = apply(model, calibration, Evict(policy="random", keep=0.5, sinks=1, recent=1))
    caches = random_caches(np.random.default_rng(1), 20, capacity=20)
    found = run(evict, {**caches, "cache_lengths": np.full(LAYERS, 20), "seen": np.array(20)})
    keys, kept = caches["past_key_values.0.key"], found["present.0.key"]
    # Of each head, where its kept keys were.
    equal = (keys[:, :, None] == kept[:, :, :, None]).all(-1)
    assert (equal.sum(-1) == 1).all()
    positions = equal.argmax(-1).reshape(-1, 10)
    assert (np.diff(positions, axis=1) > 0).all()
    assert (positions[:, [0, -1]] == [0, 19]).all()
    assert len({tuple(head) for head in positions}) > 1


def test_expected_attention(model, calibration):
    future, length = 9, 21
    evict = apply(
        model, calibration, Evict(policy="expected-attention", keep=0.4, sinks=2, recent=3, future=future)
    )
    verify(evict)
    caches = random_caches(np.random.default_rng(2), length, capacity=24)
    seen = 40
    found = run(evict, {**caches, "cache_lengths": np.full(LAYERS, length), "seen": np.array(seen)})
    constants = {
        name.rsplit(".", 1)[-1]: value.const_value.numpy()[0].astype(np.float64)
        for name, value in evict.graph.initializers.items()
        if name in ("evict.1.mean", "evict.1.covariance")
    }
    mean, covariance = constants["mean"][:, 0], constants["covariance"]
    matrix = np.mean([rotated(np.eye(SIZE), seen + step).T for step in range(future)], axis=0)
    mean, covariance = mean @ matrix.T, matrix @ covariance @ matrix.T
    keys, values = (caches[f"past_key_values.1.{part}"][:, :, :length] for part in ("key", "value"))
    scale = SIZE**-0.5
    wide = keys.repeat(HEADS // KV_HEADS, axis=1).astype(np.float64)
    first = np.einsum("bhtd,hd->bht", wide, mean) * scale
    second = np.einsum("bhtd,hde,bhte->bht", wide, covariance, wide) * scale**2 / 2
    scores = per_kv_head(softmax(first + second)) * np.linalg.norm(values, axis=-1)
    kept = kept_by(scores, 16, sinks=2, recent=3)  # ⌈0.4 · 40⌉
    np.testing.assert_array_equal(found["present.1.key"], gathered(keys, kept))


def test_statistics_are_those_of_queries_before_their_rotation(fused, module, model, calibration):
    evict = apply(model, calibration, Evict(policy="expected-attention"))
    ids = torch.as_tensor(np.concatenate([feeds["input_ids"] for feeds in calibration]))
    seen = []
    hook = module.model.layers[1].self_attn.q_proj.register_forward_hook(
        lambda _module, _inputs, output: seen.append(output.detach().numpy())
    )
    with torch.no_grad():
        module(ids)
    hook.remove()
    rows = seen[0][:, 4:].reshape(-1, HEADS, SIZE).astype(np.float64)
    mean, covariance = (
        evict.graph.initializers[f"evict.1.{name}"].const_value.numpy()[0] for name in ("mean", "covariance")
    )
    np.testing.assert_allclose(mean[:, 0], rows.mean(0), atol=1e-5)
    for head in range(HEADS):
        np.testing.assert_allclose(covariance[head], np.cov(rows[:, head].T, bias=True), atol=1e-5)


def test_moments_of_nothing_are_nan():
    mean, _ = moments([np.zeros((0, 8), np.float32)], 2)
    assert np.isnan(mean).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_caches_are_scored_by_what_they_mean_and_kept_as_they_are(model, calibration, bits):
    evict = apply(model, calibration, KVCache(bits=bits), Evict(policy="knorm", keep=0.4, sinks=0, recent=0))
    dtype, size = (np.int8, SIZE) if bits == 8 else (np.uint8, SIZE // 2)
    caches = random_caches(np.random.default_rng(3), 20, 25, dtype, size)
    found = run(evict, {**caches, "cache_lengths": np.full(LAYERS, 20), "seen": np.array(20)})
    stored = caches["past_key_values.0.key"][:, :, :20]
    if bits == 8:
        numbers = stored.astype(np.float64)
    else:
        numbers = np.stack([stored & 15, stored >> 4], -1).reshape(2, KV_HEADS, 20, SIZE) - 8.0
    scale = model.graph.initializers["model.layers.0.attn.k_scale"].const_value.numpy()
    kept = kept_by(-np.linalg.norm(numbers * scale, axis=-1), 8, 0, 0)
    np.testing.assert_array_equal(found["present.0.key"], gathered(stored, kept))
    assert found["present.0.key"].dtype == dtype


def rescored_by_graphkv(scores, keys, kept):
    """As the paper says it: source after source, its nearest tokens lose what they have in common with it."""
    raised = scores - scores.min(-1, keepdims=True)
    result = raised.copy()
    unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    for batch, head in np.ndindex(scores.shape[:2]):
        for source in np.argsort(-raised[batch, head])[: int(np.ceil(0.3 * kept))]:
            cosine = unit[batch, head] @ unit[batch, head, source]
            cosine[source] = -1
            for token in np.argsort(-cosine)[:8]:
                result[batch, head, token] *= 1 - max(cosine[token], 0)
    return result


def kept_by_kvcrush(scores, kept):
    """Three quarters by score; the rest evenly spaced among the others, sorted by how unusual they are."""
    length = scores.shape[-1]
    middle = np.sort(scores, -1)[..., -(length // 2)]
    bits = scores >= middle[..., None]
    majority = bits.mean(-1) >= 0.5
    distance = (bits != majority[..., None]).sum(1)
    representatives = kept // 4
    positions = np.zeros((*scores.shape[:2], kept), int)
    for batch, head in np.ndindex(scores.shape[:2]):
        best = np.argsort(-scores[batch, head])[: kept - representatives]
        others = [token for token in range(length) if token not in best]
        others.sort(key=lambda token: (distance[batch, token], token))
        spread = [others[step * len(others) // representatives] for step in range(representatives)]
        positions[batch, head] = sorted([*best, *spread])
    return positions


def uniform(shape, seed):
    """The hash that stands for random numbers, as its docstring says it."""
    waves = np.sin(
        np.float32(12.9898) * np.arange(np.prod(shape), dtype=np.float64)
        + np.float32(78.233) * np.float32(seed)
    )
    return (np.float64(np.float32(43758.5453)) * waves % 1).reshape(shape)


def test_tokens_are_drawn_in_proportion_to_their_scores(model, calibration):
    length, kept = 40, 16
    options = Evict(policy="tova", keep=kept / length, sinks=0, recent=1, rescore="drawn")
    evict = apply(model, calibration, options)
    verify(evict)
    rng = np.random.default_rng(8)
    caches = random_caches(rng, length, length)
    queries = {
        f"query.{layer}": rng.standard_normal((2, 1, HEADS * SIZE)).astype(np.float32) for layer in (0, 1)
    }
    found = run(
        evict, {**caches, **queries, "cache_lengths": np.full(LAYERS, length), "seen": np.array(length)}
    )
    keys, values = caches["past_key_values.1.key"], caches["past_key_values.1.value"]
    heads = queries["query.1"].reshape(2, 1, HEADS, SIZE).transpose(0, 2, 1, 3)
    scores = reference("tova", keys, values, heads, SIZE**-0.5)
    seed = next(
        node.attributes["seed"].value for node in evict.graph if node.name.startswith("evict.1.Rescore")
    )
    drawn = kept_by(np.log(scores) - np.log(-np.log(uniform(keys.shape[:3], seed))), kept, 0, 1)
    np.testing.assert_array_equal(found["present.1.key"], gathered(keys, drawn))
    # The check can fail: by score alone other tokens stay.
    assert (drawn != kept_by(scores, kept, 0, 1)).any()


def test_a_token_is_drawn_as_often_as_its_score_is_large():
    """Of one token, over many heads: draws are shares of the score, up to 4 standard errors."""
    definition = RESCORE["drawn"]
    score = ir.val("score", dtype=ir.DataType.FLOAT, shape=[1, 40000, 4])
    keys = ir.val("keys", dtype=ir.DataType.FLOAT, shape=[1, 40000, 4, 1])
    kept = ir.val("kept", dtype=ir.DataType.INT64, shape=[1])
    node = ir.node(
        "Rescore", [score, keys, kept], {"seed": 3.0}, domain=DOMAIN, overload="drawn", name="node"
    )
    node.outputs[0].name = "rescored"
    graph = ir.Graph(
        [score, keys, kept], node.outputs, nodes=[node], opset_imports={"": 23, DOMAIN: 1}, name="g"
    )
    drawing = ir.Model(graph, ir_version=10)
    ops.define(drawing, definition)
    shares = np.array([0.1, 0.6, 0.05, 0.25], np.float32)
    feeds = {
        "score": np.broadcast_to(shares * 7, (1, 40000, 4)).copy(),
        "keys": np.zeros((1, 40000, 4, 1), np.float32),
        "kept": np.array([1]),
    }
    counts = np.bincount(run(drawing, feeds)["rescored"].argmax(-1).ravel(), minlength=4) / 40000
    np.testing.assert_array_less(abs(counts - shares), 4 * np.sqrt(shares * (1 - shares) / 40000))


@pytest.mark.parametrize("rescore", ["graphkv", "kvcrush"])
def test_rescoring(model, calibration, rescore):
    length, kept = 40, 16
    evict = apply(
        model, calibration, Evict(policy="knorm", keep=kept / length, sinks=0, recent=0, rescore=rescore)
    )
    verify(evict)
    caches = random_caches(np.random.default_rng(4), length, length)
    found = run(evict, {**caches, "cache_lengths": np.full(LAYERS, length), "seen": np.array(length)})
    keys = caches["past_key_values.0.key"]
    scores = reference("knorm", keys, None, None, 1)
    if rescore == "graphkv":
        positions = kept_by(rescored_by_graphkv(scores, keys, kept), kept, 0, 0)
    else:
        positions = kept_by_kvcrush(scores, kept)
    np.testing.assert_array_equal(found["present.0.key"], gathered(keys, positions))
    # The check can fail: by score alone other tokens stay.
    assert (positions != kept_by(scores, kept, 0, 0)).any()


def test_values_are_merged_into_the_most_similar_tokens_that_stay(model, calibration):
    length, count = 30, 10
    evict = apply(
        model, calibration, Evict(policy="knorm", keep=count / length, sinks=0, recent=0, merge=True)
    )
    verify(evict)
    rng = np.random.default_rng(7)
    caches = random_caches(rng, length, length)
    for name, array in caches.items():
        if name.endswith(".key"):
            array[:, :, 10:20] = array[:, :, :10] * 1.5 + 0.1 * rng.standard_normal(array[:, :, :10].shape)
    found = run(evict, {**caches, "cache_lengths": np.full(LAYERS, length), "seen": np.array(length)})
    keys, values = (caches[f"past_key_values.0.{part}"] for part in ("key", "value"))
    kept = kept_by(reference("knorm", keys, None, None, 1), count, 0, 0)
    np.testing.assert_array_equal(found["present.0.key"], gathered(keys, kept))
    unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    merged_more_than_one = 0
    for batch, head in np.ndindex(2, KV_HEADS):
        cosine = unit[batch, head] @ unit[batch, head, kept[batch, head]].T
        place = cosine.argmax(-1)
        for new in range(count):
            tokens = np.flatnonzero((place == new) & (cosine.max(-1) >= 0.5))
            merged_more_than_one += len(tokens) > 1
            expected = values[batch, head, tokens].mean(0)
            np.testing.assert_allclose(found["present.0.value"][batch, head, new], expected, atol=1e-5)
    assert merged_more_than_one


def test_renumbered_keys_are_turned_to_their_new_places(model, calibration):
    length = 20
    evict = apply(model, calibration, Evict(policy="knorm", keep=0.5, sinks=0, recent=0, renumber=True))
    verify(evict)
    caches = random_caches(np.random.default_rng(6), length, 24)
    found = run(evict, {**caches, "cache_lengths": np.full(LAYERS, length), "seen": np.array(length)})
    keys = caches["past_key_values.1.key"][:, :, :length]
    kept = kept_by(reference("knorm", keys, None, None, 1), 10, 0, 0)
    for batch, head, new in np.ndindex(2, KV_HEADS, 10):
        old = int(kept[batch, head, new])
        expected = rotated(keys[batch, head, old].astype(np.float64), new - old)
        # Angles in float32 at positions below 20.
        np.testing.assert_allclose(found["present.1.key"][batch, head, new], expected, atol=1e-5)
