"""Which linears `scale` pairs with which source, what it refuses, and that folding changes no output."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import onnx
import onnx.parser
import onnx.reference
import onnx.shape_inference
import onnx_ir as ir
import pytest
from planish.ir import verify
from planish.ir.errors import PassError
from planish.passes.scale.fold import fold
from planish.passes.scale.pairs import scaling_groups

WIDTH, HIDDEN, HEADS = 8, 12, 2
# A few float64 roundings of sums of at most 12 terms of order 1.
EXACT = {"rtol": 1e-12, "atol": 1e-12}

ATTENTION = """
    n = RMSNormalization <axis = -1> (x, norm__weight)
    q2 = MatMul(n, q__weight)  k2 = MatMul(n, k__weight)  v2 = MatMul(n, v__weight)
    q3 = Reshape(q2, heads)  k3 = Reshape(k2, kv_heads)  v3 = Reshape(v2, kv_heads)
    q4 = Transpose <perm = [0, 2, 1, 3]> (q3)  k4 = Transpose <perm = [0, 2, 1, 3]> (k3)
    v4 = Transpose <perm = [0, 2, 1, 3]> (v3)
    a4 = Attention(q4, k4, v4)
    a3 = Transpose <perm = [0, 2, 1, 3]> (a4)  a = Reshape(a3, flat)
    y = MatMul(a, o__weight)"""
MERGED_ATTENTION = """
    n = LayerNormalization <axis = -1> (x, norm__weight, norm__bias)
    p = MatMul(n, qkv__weight)  m = Add(p, qkv__bias)
    q, k, v = Split <axis = -1> (m, thirds)
    a = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v)
    y = MatMul(a, o__weight)"""
GATED = """
    n = RMSNormalization <axis = -1> (x, norm__weight)
    g = MatMul(n, gate__weight)  u = MatMul(n, up__weight)
    e = Sigmoid(g)  silu = Mul(g, e)  h = Mul(silu, u)
    y = MatMul(h, down__weight)"""
MERGED_GATED = """
    n = RMSNormalization <axis = -1> (x, norm__weight)
    m = MatMul(n, gate_up__weight)  g, u = Split <axis = -1> (m, halves)
    e = Gelu(g)  h = Mul(u, e)
    y = MatMul(h, down__weight)"""
PLAIN = """
    n = LayerNormalization <axis = -1> (x, norm__weight, norm__bias)
    p = MatMul(n, fc1__weight)  f = Add(p, fc1__bias)
    h = {activation}(f)
    y = MatMul(h, fc2__weight)"""

SHAPES = {
    "norm.weight": (WIDTH,),
    "norm.bias": (WIDTH,),
    "q.weight": (WIDTH, WIDTH),
    "k.weight": (WIDTH, WIDTH),
    "v.weight": (WIDTH, WIDTH),
    "o.weight": (WIDTH, WIDTH),
    "qkv.weight": (WIDTH, 3 * WIDTH),
    "qkv.bias": (3 * WIDTH,),
    "gate.weight": (WIDTH, HIDDEN),
    "up.weight": (WIDTH, HIDDEN),
    "gate_up.weight": (WIDTH, 2 * HIDDEN),
    "down.weight": (HIDDEN, WIDTH),
    "fc1.weight": (WIDTH, HIDDEN),
    "fc1.bias": (HIDDEN,),
    "fc2.weight": (HIDDEN, WIDTH),
}
INTEGERS = {
    "heads": [0, 0, HEADS, WIDTH // HEADS],
    "kv_heads": [0, 0, HEADS, WIDTH // HEADS],
    "flat": [0, 0, WIDTH],
    "thirds": [WIDTH] * 3,
    "halves": [HIDDEN] * 2,
}


def model_of(
    body: str, *, outputs: str = "", dtype=np.float64, inputs: str = "", shapes=None, integers=None
) -> ir.Model:
    """A model of ``body`` with random weights; dots of names are written ``__`` there."""
    kind = {"float64": "double", "float32": "float", "float16": "float16"}[np.dtype(dtype).name]
    outputs = outputs or f"{kind}[b,s,{WIDTH}] y"
    signature = f"({kind}[b,s,{WIDTH}] x{inputs}) => ({outputs})"
    text = f'<ir_version: 11, opset_import: ["" : 23]> g {signature} {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in {**SHAPES, **(shapes or {})}.items():
        array = rng.standard_normal(shape).astype(dtype)
        if name.replace(".", "__") in text:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name.replace(".", "__")))
    for name, entries in {**INTEGERS, **(integers or {})}.items():
        if re.search(rf", {name}\b", text):
            proto.graph.initializer.append(onnx.numpy_helper.from_array(np.int64(entries), name))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))
    for value in list(model.graph.initializers.values()):
        value.name = value.name.replace("__", ".")
    return model


def run(model: ir.Model, **feeds) -> list[np.ndarray]:
    """In the evaluator of ONNX itself, which shares no code with what rewrote the model."""
    verify(model)
    return onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)


def scale_of(count: int, seed: int = 3) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).uniform(-2, 2, count))


def found(model: ir.Model) -> dict[str, tuple[str, list[tuple[str, int, int]]]]:
    """group name → (source, [(constant, axis, start)])."""
    groups, _ = scaling_groups(model)
    return {
        group.name: (
            group.source.name,
            [(channels.value.name, channels.axis, channels.start) for channels in group.source.constants],
        )
        for group in groups
    }


def reasons(model: ir.Model) -> dict[str, str]:
    _, skipped = scaling_groups(model)
    return {skip.name: skip.reason for skip in skipped}


NORM = ("norm", [("norm.weight", 0, 0)])
NORM_WITH_BIAS = ("norm", [("norm.weight", 0, 0), ("norm.bias", 0, 0)])
PAIRS = {
    "attention": (ATTENTION, {"qkv": NORM, "o": ("v", [("v.weight", 1, 0)])}),
    "merged attention": (
        MERGED_ATTENTION,
        {"qkv": NORM_WITH_BIAS, "o": ("qkv", [("qkv.weight", 1, 16), ("qkv.bias", 0, 16)])},
    ),
    "gated": (GATED, {"gate_up": NORM, "down": ("up", [("up.weight", 1, 0)])}),
    "merged gated": (
        MERGED_GATED,
        {"gate_up": NORM, "down": ("gate_up", [("gate_up.weight", 1, HIDDEN)])},
    ),
    "relu": (
        PLAIN.format(activation="Relu"),
        {"fc1": NORM_WITH_BIAS, "fc2": ("fc1", [("fc1.weight", 1, 0), ("fc1.bias", 0, 0)])},
    ),
}


@pytest.mark.parametrize("body", PAIRS)
def test_pairs(body):
    text, expected = PAIRS[body]
    model = model_of(text)
    assert found(model) == expected
    assert not reasons(model)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("body", PAIRS)
def test_folding_every_pair_changes_no_output(body, dtype):
    text, _ = PAIRS[body]
    model = model_of(text, dtype=dtype)
    x = np.random.default_rng(1).standard_normal((2, 3, WIDTH)).astype(dtype)
    (before,) = run(model, x=x)
    weights = {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}
    nodes = [(node.op_type, [value.name for value in node.inputs]) for node in model.graph]
    groups, _ = scaling_groups(model)
    for index, group in enumerate(groups):
        assert fold(group, scale_of(group.channels, index)) is None
    (after,) = run(model, x=x)
    # float32 rounds each of three factors of every term once.
    tolerance = EXACT if dtype == np.float64 else {"rtol": 1e-5, "atol": 1e-5 * np.abs(before).max()}
    np.testing.assert_allclose(after, before, **tolerance)
    assert after.dtype == before.dtype
    # Before and Expected are the same graph, with other numbers in all that the groups touch.
    assert nodes == [(node.op_type, [value.name for value in node.inputs]) for node in model.graph]
    touched = {linear.weight.name for group in groups for linear in group.linears}
    touched |= {channels.value.name for group in groups for channels in group.source.constants}
    changed = {
        name
        for name, value in model.graph.initializers.items()
        if not np.array_equal(value.const_value.numpy(), weights[name])
    }
    assert changed == touched


def test_the_scaled_weights_are_what_the_formula_says():
    model = model_of(PLAIN.format(activation="Relu"))
    before = {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}
    groups, _ = scaling_groups(model)
    first, second = scale_of(WIDTH, 1), scale_of(HIDDEN, 2)
    for group, scale in zip(groups, (first, second), strict=True):
        assert fold(group, scale) is None
    expected = {
        "norm.weight": before["norm.weight"] / first,
        "norm.bias": before["norm.bias"] / first,
        "fc1.weight": np.diag(first) @ before["fc1.weight"] @ np.diag(1 / second),
        "fc1.bias": before["fc1.bias"] / second,
        "fc2.weight": np.diag(second) @ before["fc2.weight"],
    }
    for name, array in expected.items():
        np.testing.assert_allclose(model.graph.initializers[name].const_value.numpy(), array, rtol=1e-14)


def test_gemms_with_transposed_weights():
    text = """n = LayerNormalization <axis = -1> (x, a) p = Gemm <transB = 1> (n, fc1__weight, fc1__bias)
        h = Relu(p) y = Gemm <transB = 1> (h, fc2__weight)"""
    signature = f"(double[m,{WIDTH}] x) => (double[m,{WIDTH}] y)"
    proto = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["" : 23]> g {signature} {{ {text} }}')
    rng = np.random.default_rng(0)
    shapes = {"a": (WIDTH,), "fc1__weight": (HIDDEN, WIDTH), "fc1__bias": (HIDDEN,)}
    for name, shape in {**shapes, "fc2__weight": (WIDTH, HIDDEN)}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape), name))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    x = rng.standard_normal((5, WIDTH))
    (before,) = run(model, x=x)
    groups, _ = scaling_groups(model)
    assert len(groups) == 2
    for group in groups:
        assert fold(group, scale_of(group.channels)) is None
    np.testing.assert_allclose(run(model, x=x)[0], before, **EXACT)


@dataclasses.dataclass(frozen=True)
class Refused:
    """A graph with a group that cannot be scaled, and why."""

    body: str
    group: str
    reason: str
    outputs: str = ""
    inputs: str = ""
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    integers: dict[str, list[int]] = dataclasses.field(default_factory=dict)

    def model(self) -> ir.Model:
        return model_of(
            self.body,
            outputs=f"double[b,s,{WIDTH}] y{self.outputs}",
            inputs=self.inputs,
            shapes=self.shapes,
            integers=self.integers,
        )


CACHED = ATTENTION.replace("a4 = Attention(q4, k4, v4)", "a4, pk, pv = Attention(q4, k4, v4, , ik, iv)")
CACHE_INPUTS = ", double[b,2,r,4] ik, double[b,2,r,4] iv"
CACHE_OUTPUTS = ", double[b,2,t,4] pk, double[b,2,t,4] pv"
HALF = WIDTH // 2
NORMED = f", double[b,s,{WIDTH}] "
HIDDEN_OUTPUT = f", double[b,s,{HIDDEN}] z"
REFUSED = {
    "norm read by another op": Refused(GATED + " z = Neg(n)", "gate_up", "Neg too", outputs=NORMED + "z"),
    "norm on the residual stream": Refused(
        "n = LayerNormalization <axis = -1> (x, norm__weight)  h = MatMul(n, o__weight)  y = Add(n, h)",
        "o",
        "read by Add too",
    ),
    "norm that is an output": Refused(GATED, "gate_up", "output of the graph", outputs=NORMED + "n"),
    "gelu": Refused(PLAIN.format(activation="Gelu"), "fc2", "Gelu does not commute"),
    "sigmoid": Refused(PLAIN.format(activation="Sigmoid"), "fc2", "Sigmoid does not commute"),
    "silu": Refused(
        PLAIN.format(activation="Sigmoid").replace("h =", "e =").replace("y =", "h = Mul(f, e) y ="),
        "fc2",
        "no factor of the product",
    ),
    "squared": Refused(
        PLAIN.format(activation="Relu").replace("h =", "e =").replace("y =", "h = Mul(e, e) y ="),
        "fc2",
        "no factor of the product",
    ),
    "up is read twice": Refused(
        GATED + " z = Neg(u)", "down", "no factor of the product", outputs=HIDDEN_OUTPUT
    ),
    "grouped queries": Refused(
        ATTENTION,
        "o",
        "several query heads read one value head",
        shapes={"k.weight": (WIDTH, HALF), "v.weight": (WIDTH, HALF)},
        integers={"kv_heads": [0, 0, 1, WIDTH // HEADS]},
    ),
    "grouped queries, merged": Refused(
        MERGED_ATTENTION.replace("kv_num_heads = 2", "kv_num_heads = 1"),
        "o",
        "several query heads read one value head",
        shapes={"qkv.weight": (WIDTH, 2 * WIDTH), "qkv.bias": (2 * WIDTH,)},
        integers={"thirds": [WIDTH, HALF, HALF]},
    ),
    "cache that is read": Refused(
        CACHED + " z = Neg(pv)",
        "o",
        "not an input and output of the graph",
        outputs=CACHE_OUTPUTS + ", double[b,2,t,4] z",
        inputs=CACHE_INPUTS,
    ),
    "past that is read": Refused(
        CACHED + " z = Neg(iv)",
        "o",
        "not an input and output of the graph",
        outputs=CACHE_OUTPUTS + ", double[b,2,r,4] z",
        inputs=CACHE_INPUTS,
    ),
    "past that does not come from here": Refused(
        CACHED, "o", "not an input and output of the graph", inputs=CACHE_INPUTS
    ),
    "keys are values": Refused(
        MERGED_ATTENTION.replace("(q, k, v)", "(q, v, v)"), "o", "read by another op too"
    ),
    "shared weight": Refused(
        GATED + " z = MatMul(x, gate__weight)", "gate_up", "is shared", outputs=HIDDEN_OUTPUT
    ),
    "shared norm": Refused(
        GATED + " z = RMSNormalization(x, norm__weight)",
        "gate_up",
        "norm.weight is shared",
        outputs=NORMED + "z",
    ),
    "input of the graph": Refused("y = MatMul(x, o__weight)", "o", "from outside"),
    "slices": Refused(
        """m = MatMul(x, gate_up__weight) g = Slice(m, start, middle, last) u = Slice(m, middle, end, last)
        e = Gelu(g) h = Identity(u) y = MatMul(h, down__weight)""",
        "down",
        "fuse makes such cuts a Split",
        integers={"start": [0], "middle": [HIDDEN], "end": [2 * HIDDEN], "last": [-1]},
    ),
    "transposed": Refused(
        """n = MatMul(x, q__weight) m = Reshape(n, heads) t = Transpose <perm = [0, 1, 3, 2]> (m)
        a = Reshape(t, flat) y = MatMul(a, o__weight)""",
        "o",
        "Transpose moves",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_scaled_is_skipped_with_the_reason(name):
    refused = REFUSED[name]
    model = refused.model()
    assert refused.reason in reasons(model)[refused.group]
    assert refused.group not in found(model)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_left_beside_a_refused_pair_is_exact(name):
    model = REFUSED[name].model()
    rng = np.random.default_rng(1)
    feeds = {"x": rng.standard_normal((2, 3, WIDTH))}
    for value in model.graph.inputs[1:]:
        feeds[value.name] = rng.standard_normal((2, HEADS, 5, WIDTH // HEADS))
    before = run(model, **feeds)
    groups, _ = scaling_groups(model)
    for group in groups:
        assert fold(group, scale_of(group.channels)) is None
    for after, expected in zip(run(model, **feeds), before, strict=True):
        np.testing.assert_allclose(after, expected, **EXACT)


def test_a_cache_holds_scaled_values():
    model = model_of(CACHED, outputs=f"double[b,s,{WIDTH}] y" + CACHE_OUTPUTS, inputs=CACHE_INPUTS)
    groups, skipped = scaling_groups(model)
    assert not skipped
    assert [[cache.name for cache in group.source.caches] for group in groups] == [[], ["pv"]]
    rng = np.random.default_rng(1)
    x = [rng.standard_normal((2, 3, WIDTH)) for _ in range(2)]
    empty = np.zeros((2, HEADS, 0, WIDTH // HEADS))

    def two_steps() -> tuple[np.ndarray, ...]:
        first, keys, values = run(model, x=x[0], ik=empty, iv=empty)
        second, *_ = run(model, x=x[1], ik=keys, iv=values)
        return first, second, values

    before = two_steps()
    scale = scale_of(WIDTH)
    assert fold(groups[1], scale) is None
    after = two_steps()
    by_head = scale.reshape(1, HEADS, 1, -1)
    for found, expected in zip(after, (*before[:2], before[2] / by_head), strict=True):
        np.testing.assert_allclose(found, expected, **EXACT)


def test_a_reader_of_the_shape_alone_is_no_reader():
    model = model_of(GATED + " z = Shape(n)", outputs=f"double[b,s,{WIDTH}] y, int64[3] z")
    assert set(found(model)) == {"gate_up", "down"}


def test_a_scale_that_float16_cannot_hold_changes_nothing():
    model = model_of(GATED, dtype=np.float16)
    before = {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}
    groups, _ = scaling_groups(model)
    for factor in (1e-6, 1e6):
        scale = np.full(WIDTH, factor)
        assert fold(groups[0], scale).startswith("FLOAT16 cannot hold the scaled ")
    for name, value in model.graph.initializers.items():
        np.testing.assert_array_equal(value.const_value.numpy(), before[name])
    assert fold(groups[0], np.full(WIDTH, 2.0)) is None
    np.testing.assert_array_equal(
        model.graph.initializers["gate.weight"].const_value.numpy(), before["gate.weight"] * 2
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(bad):
    model = model_of(GATED)
    weight = model.graph.initializers["up.weight"].const_value.numpy().copy()
    weight[2, 3] = bad
    model.graph.initializers["up.weight"].const_value = ir.tensor(weight)
    groups, _ = scaling_groups(model)
    with pytest.raises(PassError, match=r"'up\.weight' holds NaN or infinity"):
        fold(groups[0], scale_of(WIDTH))
