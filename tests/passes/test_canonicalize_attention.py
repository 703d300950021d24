"""Decomposed attention, grouped heads and the key/value cache, against softmax(q kᵀ) v in numpy float64."""

import itertools

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from planish.codegen import get_target
from planish.ir import clone
from planish.passes.canonicalize import Canonicalize
from planish.passes.infrastructure.base import PassContext
from planish.runtime.reference import run_model

BATCH, HEADS, QUERIES, KEYS, SIZE = 2, 4, 3, 5, 8
RNG = np.random.default_rng(0)
Q = RNG.standard_normal((BATCH, HEADS, QUERIES, SIZE)).astype(np.float32)
K = RNG.standard_normal((BATCH, HEADS, KEYS, SIZE)).astype(np.float32)
V = RNG.standard_normal((BATCH, HEADS, KEYS, SIZE)).astype(np.float32)
KEPT = RNG.random((BATCH, 1, QUERIES, KEYS)) < 0.6
KEPT[..., 0] = True

# float32 sums of at most eight products and five exponentials of order 1, in another order.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}
SCALE = SIZE**-0.5


def model_of(text: str, opset: int = 23) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> {text}'))


def decomposed(body: str, *, inputs: str = "", outputs: str = "y", opset: int = 23) -> ir.Model:
    return model_of(
        f"""g (float[b,{HEADS},q,{SIZE}] q, float[b,{HEADS},k,{SIZE}] k, float[b,{HEADS},k,{SIZE}] v{inputs})
        => ({outputs})
        <float scale = {{{SCALE}}}, float root = {{{SCALE**0.5}}}, float divisor = {{{1 / SCALE}}},
        float low = {{-3.4028234663852886e+38}}, float ten = {{-10}}, float zero = {{0}},
        float cap = {{2}}> {{ {body} }}""",
        opset,
    )


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def canonicalize(model: ir.Model) -> dict[str, int]:
    return dict(Canonicalize().run(model, PassContext(target=get_target("portable"))).statistics)


def attention(q, k, v, *, scale=SCALE, mask=0.0, cap=None):
    """softmax(scale · q kᵀ + mask) v in float64; rows that are wholly −∞ are zero."""
    q, k, v = (array.astype(np.float64) for array in (q, k, v))
    scores = scale * q @ k.swapaxes(-1, -2)
    scores = scores if cap is None else cap * np.tanh(scores / cap)
    scores = scores + mask
    highest = scores.max(-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isinf(highest), 0, highest))
    total = weights.sum(-1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0) @ v


def assert_attention(model: ir.Model, expected: np.ndarray, **feeds: np.ndarray) -> None:
    assert canonicalize(model)["attention"] == 1
    assert ops(model).count("Attention") == 1
    assert not {"Softmax", "MatMul"} & set(ops(model))
    found = run_model(model, {"q": Q, "k": K, "v": V, **feeds})["y"]
    np.testing.assert_allclose(found, expected, **CLOSE)


T = "t = Transpose<perm = [0, 1, 3, 2]>(k) "
END = " p = Softmax<axis = -1>(m) y = MatMul(p, v)"
SCALED = {
    "on the scores": T + "m0 = MatMul(q, t) m = Mul(m0, scale)" + END,
    "as a divisor": T + "m0 = MatMul(q, t) m = Div(m0, divisor)" + END,
    "on the queries": T + "a = Mul(q, scale) m = MatMul(a, t)" + END,
    "on the transposed keys": T + "a = Mul(scale, t) m = MatMul(q, a)" + END,
    "on the keys": "a = Mul(k, scale) t = Transpose<perm = [0, 1, 3, 2]>(a) m = MatMul(q, t)" + END,
    "its root on both": T + "a = Mul(q, root) c = Mul(t, root) m = MatMul(a, c)" + END,
}


@pytest.mark.parametrize("body", SCALED.values(), ids=SCALED)
def test_the_scale_is_found_wherever_it_is(body):
    assert_attention(decomposed(body), attention(Q, K, V))


def test_no_scale_is_scale_one():
    """T5; the node's default would be 1/√head_size."""
    assert_attention(decomposed(T + "m = MatMul(q, t)" + END), attention(Q, K, V, scale=1.0))


def test_keys_that_were_transposed_once_from_the_projection():
    body = "t = Transpose<perm = [0, 2, 3, 1]>(kp) m0 = MatMul(q, t) m = Mul(m0, scale)" + END
    model = decomposed(body, inputs=f", float[b,k,{HEADS},{SIZE}] kp")
    assert_attention(model, attention(Q, K, V), kp=np.ascontiguousarray(K.transpose(0, 2, 1, 3)))


def test_soft_capped_scores():
    body = T + "m0 = MatMul(q, t) m1 = Mul(m0, scale) m2 = Div(m1, cap) m3 = Tanh(m2) m = Mul(m3, cap)" + END
    assert_attention(decomposed(body), attention(Q, K, V, cap=2.0))


def test_the_guard_against_wholly_masked_rows_goes():
    body = (
        T
        + """m0 = MatMul(q, t) m1 = Mul(m0, scale) m = Add(m1, mask) p0 = Softmax<axis = -1>(m)
        n = IsNaN(p0) p = Where(n, zero, p0) y = MatMul(p, v)"""
    )
    kept = KEPT.copy()
    kept[0, 0, 1] = False
    mask = np.where(kept, 0, -np.inf).astype(np.float32)
    model = decomposed(body, inputs=", float[b,1,q,k] mask")
    assert_attention(model, attention(Q, K, V, mask=mask), mask=mask)
    assert not np.any(run_model(model, {"q": Q, "k": K, "v": V, "mask": mask})["y"][0, :, 1])


MASK_SHAPES = ["b,1,q,k", f"b,{HEADS},q,k", "1,1,q,k", "q,k", f"1,{HEADS},q,k", "b,1,1,k", "1,1,1,k"]


def random_mask(shape: str) -> np.ndarray:
    sizes = {"b": BATCH, "q": QUERIES, "k": KEYS}
    kept = RNG.random([sizes.get(dim) or int(dim) for dim in shape.split(",")]) < 0.6
    kept[..., 0] = True
    return kept


@pytest.mark.parametrize("shape", MASK_SHAPES)
def test_additive_masks_of_every_shape(shape):
    """One row for all queries included, which onnxruntime wants expanded."""
    body = T + "m0 = MatMul(q, t) m1 = Mul(m0, scale) m = Add(mask, m1)" + END
    mask = RNG.standard_normal(random_mask(shape).shape).astype(np.float32)
    assert_attention(
        decomposed(body, inputs=f", float[{shape}] mask"), attention(Q, K, V, mask=mask), mask=mask
    )


@pytest.mark.parametrize(("shape", "kept_first"), list(itertools.product(MASK_SHAPES, (True, False))))
def test_masks_by_where(shape, kept_first):
    operands = "m1, low" if kept_first else "low, m1"
    body = T + f"m0 = MatMul(q, t) m1 = Mul(m0, scale) m = Where(mask, {operands})" + END
    kept = random_mask(shape)
    expected = attention(Q, K, V, mask=np.where(kept, 0, -np.inf))
    assert_attention(
        decomposed(body, inputs=f", bool[{shape}] mask"), expected, mask=kept if kept_first else ~kept
    )


def test_several_masks_become_one():
    body = (
        T
        + """m0 = MatMul(q, t) m1 = Mul(m0, scale) m2 = Add(m1, bias) m3 = Where(mask, m2, low)
        m = Add(m3, row)"""
        + END
    )
    bias = RNG.standard_normal((1, HEADS, QUERIES, KEYS)).astype(np.float32)
    row = RNG.standard_normal((BATCH, 1, 1, KEYS)).astype(np.float32)
    inputs = f", float[1,{HEADS},q,k] bias, bool[b,1,q,k] mask, float[b,1,1,k] row"
    expected = attention(Q, K, V, mask=np.where(KEPT, bias + row, -np.inf))
    assert_attention(decomposed(body, inputs=inputs), expected, bias=bias, mask=KEPT, row=row)


NO_ATTENTION = {
    "softmax over the queries": T + "m = MatMul(q, t) p = Softmax<axis = 2>(m) y = MatMul(p, v)",
    "scores that are read elsewhere": T + "m = MatMul(q, t) p = Softmax<axis = -1>(m) z = MatMul(p, v) "
    "w = ReduceSum<keepdims = 0>(m) y = Add(z, w)",
    "probabilities that are an output": T + "m = MatMul(q, t) probabilities = Softmax<axis = -1>(m) "
    "y = MatMul(probabilities, v)",
    "a fill that still counts": T + "m0 = MatMul(q, t) m = Where(mask, m0, ten)" + END,
    "a mask that is scaled too": T + "m0 = MatMul(q, t) m1 = Add(m0, added) m = Mul(m1, scale)" + END,
    "keys that are not transposed": "m = MatMul(q, square)" + END,
    "a mask that enlarges the scores": T + "m0 = MatMul(q, t) m = Add(m0, large)" + END,
    "a guard that puts in something else": T + "m = MatMul(q, t) p0 = Softmax<axis = -1>(m) n = IsNaN(p0) "
    "p = Where(n, cap, p0) y = MatMul(p, v)",
}


@pytest.mark.parametrize("body", NO_ATTENTION.values(), ids=NO_ATTENTION)
def test_what_is_not_attention_stays(body):
    inputs = f""", bool[b,1,q,k] mask, float[b,1,q,k] added, float[b,{HEADS},{SIZE},k] square,
        float[2,b,{HEADS},q,k] large"""
    outputs = "y, probabilities" if "probabilities" in body else "y"
    before = decomposed(body, inputs=inputs, outputs=outputs)
    after = clone(before)
    canonicalize(after)
    assert "Attention" not in ops(after)
    feeds = {
        "q": Q,
        "k": K,
        "v": V,
        "mask": KEPT,
        "added": KEPT.astype(np.float32),
        "square": np.ascontiguousarray(K.swapaxes(2, 3)),
        "large": RNG.standard_normal((2, BATCH, HEADS, QUERIES, KEYS)).astype(np.float32),
    }
    np.testing.assert_array_equal(run_model(after, feeds)["y"], run_model(before, feeds)["y"])


def test_unknown_or_different_batches_are_left_alone():
    """Attention does not broadcast keys over the batch as MatMul does."""
    text = f"""g
        (float[b,{HEADS},q,{SIZE}] q, float[c,{HEADS},k,{SIZE}] k, float[c,{HEADS},k,{SIZE}] v) => (y)
        {{ {T} m = MatMul(q, t){END} }}"""
    before = model_of(text)
    after = clone(before)
    canonicalize(after)
    assert "Attention" not in ops(after)
    feeds = {"q": Q, "k": K[:1], "v": V[:1]}
    np.testing.assert_array_equal(run_model(after, feeds)["y"], run_model(before, feeds)["y"])


def test_a_mask_with_more_batches_than_the_scores_is_left_alone():
    """Add repeats the scores for every batch of the mask; Attention has the batch of its queries."""
    before = model_of(f"""g
        (float[1,{HEADS},q,{SIZE}] q, float[1,{HEADS},k,{SIZE}] k, float[1,{HEADS},k,{SIZE}] v,
         float[b,1,q,k] mask) => (y) {{ {T} m0 = MatMul(q, t) m = Add(m0, mask){END} }}""")
    after = clone(before)
    canonicalize(after)
    assert "Attention" not in ops(after)
    feeds = {"q": Q[:1], "k": K[:1], "v": V[:1], "mask": KEPT.astype(np.float32)}
    np.testing.assert_array_equal(run_model(after, feeds)["y"], run_model(before, feeds)["y"])


def test_opset_22_has_no_attention():
    model = decomposed(SCALED["on the scores"], opset=22)
    canonicalize(model)
    assert "Attention" not in ops(model)


def repeat(name: str, times: int, heads: int = 2, axis: str = "two") -> str:
    """The exporter's repeat_kv of ``name``, to ``name``_r."""
    return f"""
        {name}_u = Unsqueeze({name}, {axis}) {name}_b = Shape<start = 0, end = 1>({name})
        {name}_l = Shape<start = 2, end = 3>({name})
        {name}_es = Concat<axis = 0>({name}_b, kv, n{times}, {name}_l, size)
        {name}_e = Expand({name}_u, {name}_es)
        {name}_rs = Concat<axis = 0>({name}_b, n{times * heads}, {name}_l, size)
        {name}_r = Reshape({name}_e, {name}_rs) """


def grouped(body: str, *, inputs: str = "", outputs: str = "y", kv: int = 2) -> ir.Model:
    return model_of(f"""g (float[b,4,q,{SIZE}] q, float[b,{kv},k,{SIZE}] k, float[b,{kv},k,{SIZE}] v{inputs})
        => ({outputs})
        <int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] kv = {{{kv}}}, int64[1] n2 = {{2}},
         int64[1] n4 = {{4}}, int64[1] size = {{{SIZE}}}> {{ {body} }}""")


def test_repeated_heads_are_left_to_attention():
    before = grouped(repeat("k", 2) + repeat("v", 2) + "y = Attention(q, k_r, v_r)")
    after = clone(before)
    assert canonicalize(after)["grouped-heads"] == 1
    assert ops(after) == ["Attention"]
    k, v = K[:, :2], V[:, :2]
    found = run_model(after, {"q": Q, "k": k, "v": v})["y"]
    np.testing.assert_allclose(found, attention(Q, k.repeat(2, 1), v.repeat(2, 1)), **CLOSE)


def test_heads_that_are_tiled_instead_of_repeated_stay():
    """Unsqueeze in front of the heads: head i of the result is head i mod 2, not i div 2."""
    body = f"""ku = Unsqueeze(k, one) kb = Shape<start = 0, end = 1>(k) kl = Shape<start = 2, end = 3>(k)
        ks = Concat<axis = 0>(kb, n2, kv, kl, size) ke = Expand(ku, ks)
        kr = Concat<axis = 0>(kb, n4, kl, size) k_r = Reshape(ke, kr)
        {repeat("v", 2)} y = Attention(q, k_r, v_r)"""
    before = grouped(body)
    after = clone(before)
    canonicalize(after)
    assert "Expand" in ops(after)
    feeds = {"q": Q, "k": K[:, :2], "v": V[:, :2]}
    np.testing.assert_array_equal(run_model(after, feeds)["y"], run_model(before, feeds)["y"])


def test_repeated_keys_with_values_that_are_not_repeated_stay():
    before = grouped(repeat("k", 2) + "y = Attention(q, k_r, w)", inputs=f", float[b,4,k,{SIZE}] w")
    after = clone(before)
    canonicalize(after)
    assert "Expand" in ops(after)
    feeds = {"q": Q, "k": K[:, :2], "v": V[:, :2], "w": V}
    np.testing.assert_array_equal(run_model(after, feeds)["y"], run_model(before, feeds)["y"])


PAST_INPUTS = f", float[b,2,p,{SIZE}] pk, float[b,2,p,{SIZE}] pv, bool[b,1,q,t] mask"
CONCATS = "ck = Concat<axis = -2>(pk, k) cv = Concat<axis = 2>(pv, v) "


def cache_feeds(past: int, batch: int = BATCH) -> dict[str, np.ndarray]:
    mask = RNG.random((batch, 1, QUERIES, past + KEYS)) < 0.7
    mask[..., 0] = True
    shape = (batch, 2, past, SIZE)
    return {
        "q": Q[:batch],
        "k": K[:batch, :2],
        "v": V[:batch, :2],
        "pk": RNG.standard_normal(shape).astype(np.float32),
        "pv": RNG.standard_normal(shape).astype(np.float32),
        "mask": mask,
    }


@pytest.mark.parametrize(
    ("past", "batch", "repeated"), [(3, 2, True), (0, 2, True), (7, 1, False), (0, 1, False)]
)
def test_the_cache_becomes_past_inputs_and_present_outputs(past, batch, repeated):
    expanded = repeat("ck", 2) + repeat("cv", 2) + "y = Attention(q, ck_r, cv_r, mask)"
    body = CONCATS + (expanded if repeated else "y = Attention(q, ck, cv, mask)")
    before = grouped(body, inputs=PAST_INPUTS, outputs="y, ck, cv")
    after = clone(before)
    assert canonicalize(after)["cache-in-attention"] == 1
    assert ops(after) == ["Attention"]
    node = after.graph[0]
    assert [value.name for value in node.inputs] == ["q", "k", "v", "mask", "pk", "pv"]
    assert [value.name for value in node.outputs] == ["y", "ck", "cv"]
    feeds = cache_feeds(past, batch)
    found = run_model(after, feeds)
    keys, values = (np.concatenate([feeds[p], feeds[n]], 2) for p, n in (("pk", "k"), ("pv", "v")))
    np.testing.assert_array_equal(found["ck"], keys)
    np.testing.assert_array_equal(found["cv"], values)
    mask = np.where(feeds["mask"], 0, -np.inf)
    expected = attention(feeds["q"], keys.repeat(2, 1), values.repeat(2, 1), mask=mask)
    np.testing.assert_allclose(found["y"], expected, **CLOSE)


def test_a_cache_that_is_no_output_is_raised_too():
    before = grouped(CONCATS + "y = Attention(q, ck, cv, mask)", inputs=PAST_INPUTS)
    after = clone(before)
    assert canonicalize(after)["cache-in-attention"] == 1
    feeds = cache_feeds(3)
    np.testing.assert_allclose(run_model(after, feeds)["y"], run_model(before, feeds)["y"], **CLOSE)


KEPT_CACHES = {
    "causal by itself, without an offset": CONCATS + "y = Attention<is_causal = 1>(q, ck, cv)",
    "keys that something else reads": CONCATS
    + "z = Attention(q, ck, cv, mask) w = ReduceSum<keepdims = 0>(ck) "
    "y = Add(z, w)",
    "concatenated heads": "ck = Concat<axis = 1>(pk, k) cv = Concat<axis = 1>(pv, v) "
    "y = Attention(q, ck, cv)",
    "keys only": "ck = Concat<axis = -2>(pk, k) cv = Concat<axis = 2>(pv, v) va = Abs(cv) "
    "y = Attention(q, ck, va)",
    "keys that are the values too": "ck = Concat<axis = -2>(pk, k) y = Attention(q, ck, ck, mask)",
    "three parts": "ck = Concat<axis = -2>(pk, pk, k) cv = Concat<axis = 2>(pv, pv, v) "
    "y = Attention(q, ck, cv)",
}


@pytest.mark.parametrize("body", KEPT_CACHES.values(), ids=KEPT_CACHES)
def test_what_is_no_cache_of_this_attention_stays(body):
    before = grouped(body, inputs=PAST_INPUTS)
    after = clone(before)
    canonicalize(after)
    assert "Concat" in ops(after)
    feeds = cache_feeds(KEYS)
    np.testing.assert_array_equal(run_model(after, feeds)["y"], run_model(before, feeds)["y"])
