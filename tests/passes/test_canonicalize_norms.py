"""Decomposed RMS and layer norms: every spelling, every precondition, against numpy in float64."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from planish.codegen import get_target
from planish.ir import clone
from planish.passes.canonicalize import Canonicalize
from planish.passes.infrastructure.base import PassContext
from planish.runtime.reference import run_model

EPSILON = 1e-3
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 8)) * 3 + 1
W = RNG.standard_normal(8)
B = RNG.standard_normal(8)

# A handful of float64 roundings on values of order 1.
CLOSE = {"rtol": 1e-13, "atol": 1e-13}


def numbers(array: np.ndarray, dtype: str) -> str:
    """As ONNX text wants them: float16 by its bits."""
    if dtype == "float16":
        return ", ".join(str(bits) for bits in array.astype(np.float16).view(np.uint16))
    return ", ".join(repr(float(element)) for element in array)


def model_of(body: str, dtype: str = "double", opset: int = 23, outputs: str = "y") -> ir.Model:
    w, b = numbers(W, dtype), numbers(B, dtype)
    two, three, one, eps, half = (numbers(np.array([n]), dtype) for n in (2, 3, 1, EPSILON, -0.5))
    text = f"""<ir_version: 10, opset_import: ["" : {opset}]>
        g ({dtype}[b,s,8] x, {dtype}[s,8] v) => ({outputs})
        <{dtype}[8] w = {{{w}}}, {dtype}[8] b = {{{b}}}, {dtype}[1,8] row = {{{w}}}, {dtype} two = {{{two}}},
         {dtype} three = {{{three}}}, {dtype} one = {{{one}}}, {dtype} eps = {{{eps}}},
         {dtype} half = {{{half}}}, float ftwo = {{2}}, float feps = {{{EPSILON}}}, int64[1] last = {{-1}},
         int64[1] two_axis = {{2}}, int64[1] middle = {{1}}, int64[2] both = {{-2, -1}}> {{ {body} }}"""
    return ir.from_proto(onnx.parser.parse_model(text))


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def canonicalize(model: ir.Model) -> dict[str, int]:
    return dict(Canonicalize().run(model, PassContext(target=get_target("portable"))).statistics)


def root(x: str = "x", axes: str = "last", square: str = "") -> str:
    """s = √(mean(x²) + ε)."""
    square = square or f"Pow({x}, two)"
    return f"q = {square} a = ReduceMean(q, {axes}) e = Add(a, eps) s = Sqrt(e)"


RMS = {
    "reciprocal": f"{root()} r = Reciprocal(s) n = Mul(x, r) y = Mul(w, n)",
    "division": f"{root()} n = Div(x, s) y = Mul(n, w)",
    "one over": f"{root()} r = Div(one, s) n = Mul(r, x) y = Mul(n, w)",
    "square by Mul": f"{root(square='Mul(x, x)')} n = Div(x, s) y = Mul(n, w)",
    "epsilon first": "q = Pow(x, two) a = ReduceMean(q, last) e = Add(eps, a) s = Sqrt(e) "
    "n = Div(x, s) y = Mul(n, w)",
    "power": f"{root()} r = Pow(e, half) n = Mul(x, r) y = Mul(n, w)",
    "axis from the front": f"{root(axes='two_axis')} n = Div(x, s) y = Mul(n, w)",
}


@pytest.mark.parametrize("body", RMS.values(), ids=RMS)
def test_spellings_of_the_rms_norm_become_one_node(body):
    model = model_of(body)
    assert canonicalize(model)["rms-normalization"] == 1
    assert ops(model) == ["RMSNormalization"]
    assert model.graph[0].attributes["stash_type"].as_int() == ir.DataType.DOUBLE
    expected = W * X / np.sqrt(np.mean(X**2, axis=-1, keepdims=True) + EPSILON)
    found = run_model(model, {"x": X, "v": X[0]})["y"]
    # The node holds ε as a float32 attribute: relative error 2⁻²⁴ of ε, which is far below mean(x²).
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_gemmas_scale_is_stored_as_one_plus_w():
    before = model_of(f"{root()} n = Div(x, s) g = Add(w, one) y = Mul(n, g)")
    after = clone(before)
    canonicalize(after)
    assert ops(after) == ["RMSNormalization"]
    np.testing.assert_array_equal(after.graph[0].inputs[1].const_value.numpy(), W + 1)


def test_half_precision_norms_computed_in_float_become_one_node():
    body = """f = Cast<to = 1>(x) q = Pow(f, ftwo) a = ReduceMean(q, last) e = Add(a, feps) s = Sqrt(e)
        n = Div(f, s) h = Cast<to = 10>(n) y = Mul(w, h)"""
    before = model_of(body, "float16")
    after = clone(before)
    canonicalize(after)
    assert ops(after) == ["RMSNormalization"]
    feeds = {"x": X.astype(np.float16), "v": X[0].astype(np.float16)}
    # Stage one in float32, then float16 by float16: at most one rounding to float16 may fall differently.
    expected = run_model(before, feeds)["y"].astype(np.float32)
    np.testing.assert_allclose(
        run_model(after, feeds)["y"].astype(np.float32), expected, rtol=2**-9, atol=1e-6
    )


KEPT_RMS = {
    "mean over another axis": f"{root(axes='middle')} n = Div(x, s) y = Mul(n, w)",
    "cube": f"{root(square='Pow(x, three)')} n = Div(x, s) y = Mul(n, w)",
    "product of two values": f"m = Neg(x) k = Abs(x) {root(square='Mul(m, k)')} n = Div(m, s) y = Mul(n, w)",
    "something else is divided": f"{root()} m = Abs(x) n = Div(m, s) y = Mul(n, w)",
    "dimensions not kept": "q = Pow(x, two) a = ReduceMean<keepdims = 0>(q, last) e = Add(a, eps) "
    "s = Sqrt(e) u = Unsqueeze(s, last) n = Div(x, u) y = Mul(n, w)",
    "scale of another rank": f"{root()} n = Div(x, s) y = Mul(n, row)",
    "scale per position": f"{root()} n = Div(x, s) y = Mul(n, v)",
    "epsilon outside the root": "q = Pow(x, two) a = ReduceMean(q, last) s = Sqrt(a) e = Add(s, eps) "
    "n = Div(x, e) y = Mul(n, w)",
    "no scale": f"{root()} y = Div(x, s)",
}


@pytest.mark.parametrize("body", KEPT_RMS.values(), ids=KEPT_RMS)
def test_what_is_no_rms_norm_stays(body):
    before = model_of(body)
    after = clone(before)
    canonicalize(after)
    assert "RMSNormalization" not in ops(after)
    feeds = {"x": X, "v": X[0]}
    expected, found = run_model(before, feeds)["y"], run_model(after, feeds)["y"]
    np.testing.assert_array_equal(found, expected)


def test_opset_22_has_no_rms_normalization():
    model = model_of(RMS["division"], opset=22)
    canonicalize(model)
    assert "RMSNormalization" not in ops(model)


def test_an_interior_value_that_is_an_output_survives():
    before = model_of(RMS["division"], outputs="y, s")
    after = clone(before)
    canonicalize(after)
    assert ops(after)[-1] == "RMSNormalization"
    feeds = {"x": X, "v": X[0]}
    expected, found = run_model(before, feeds), run_model(after, feeds)
    np.testing.assert_allclose(found["s"], expected["s"], **CLOSE)


CENTER = "m = ReduceMean(x, last) d = Sub(x, m)"
LAYER = {
    "scale and bias": f"{CENTER} {root('d')} n = Div(d, s) g = Mul(n, w) y = Add(g, b)",
    "bias first": f"{CENTER} {root('d')} r = Reciprocal(s) n = Mul(d, r) g = Mul(w, n) y = Add(b, g)",
    "subtracted twice": f"{CENTER} m2 = ReduceMean(x, last) d2 = Sub(x, m2) {root('d2')} "
    "n = Div(d, s) g = Mul(n, w) y = Add(g, b)",
}


@pytest.mark.parametrize("body", LAYER.values(), ids=LAYER)
def test_spellings_of_the_layer_norm_become_one_node(body):
    model = model_of(body)
    canonicalize(model)
    assert ops(model) == ["LayerNormalization"]
    centered = X - X.mean(-1, keepdims=True)
    expected = W * centered / np.sqrt(np.mean(centered**2, -1, keepdims=True) + EPSILON) + B
    found = run_model(model, {"x": X, "v": X[0]})["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)


def test_a_layer_norm_over_two_axes_with_a_scale_of_both_is_one_node():
    body = """m = ReduceMean(x, both) d = Sub(x, m) q = Pow(d, two) a = ReduceMean(q, both) e = Add(a, eps)
        s = Sqrt(e) n = Div(d, s) y = Mul(n, v)"""
    model = model_of(body)
    model.graph.inputs[0].shape = ir.Shape(["b", 3, 8])
    model.graph.inputs[1].shape = ir.Shape([3, 8])
    canonicalize(model)
    assert ops(model) == ["LayerNormalization"]
    assert model.graph[0].attributes["axis"].as_int() == -2
    centered = X - X.mean((-2, -1), keepdims=True)
    expected = X[0] * centered / np.sqrt(np.mean(centered**2, (-2, -1), keepdims=True) + EPSILON)
    np.testing.assert_allclose(run_model(model, {"x": X, "v": X[0]})["y"], expected, rtol=1e-9, atol=1e-10)


KEPT_BIAS = {
    "a residual": "g = LayerNormalization(x, w) k = Add(g, x) y = Neg(k)",
    "a bias of another shape": "g = LayerNormalization(x, w) k = Add(g, row) y = Neg(k)",
    "it has a bias": "g = LayerNormalization(x, w, b) k = Add(g, b) y = Neg(k)",
    "the norm is read elsewhere": "g = LayerNormalization(x, w) h = Add(g, b) k = Mul(h, g) y = Neg(k)",
}


@pytest.mark.parametrize("body", KEPT_BIAS.values(), ids=KEPT_BIAS)
def test_additions_that_are_no_bias_of_the_norm_stay(body):
    before = model_of(body)
    after = clone(before)
    canonicalize(after)
    assert ops(after) == ops(before)
    feeds = {"x": X, "v": X[0]}
    np.testing.assert_array_equal(run_model(after, feeds)["y"], run_model(before, feeds)["y"])
