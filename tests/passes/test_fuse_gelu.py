"""GELU is recognised by its coefficients, in any spelling; its look-alikes are not."""

import math

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.passes.fuse.gelu import FuseGelu
from planish.passes.infrastructure.rewriter import apply_rules

ROOT_HALF, ROOT_TWO = 1 / math.sqrt(2), math.sqrt(2)
SLOPE = math.sqrt(2 / math.pi)

ERF_FORMS = {
    "half of x first": f"s = Div(x, c) e = Erf(s) p = Add(e, one) h = Mul(x, half) y = Mul(h, p)|{ROOT_TWO}",
    "half last": f"s = Mul(c, x) e = Erf(s) p = Add(one, e) h = Mul(p, x) y = Mul(half, h)|{ROOT_HALF}",
    "half inside": f"s = Mul(x, c) e = Erf(s) p = Add(e, one) h = Mul(half, p) y = Mul(h, x)|{ROOT_HALF}",
    "distributed": (f"s = Mul(x, c) e = Erf(s) m = Mul(e, half) p = Add(m, half) y = Mul(x, p)|{ROOT_HALF}"),
    "halved by division": (
        f"s = Div(x, c) e = Erf(s) p = Add(e, one) h = Mul(x, p) y = Div(h, two)|{ROOT_TWO}"
    ),
}
TANH_FORMS = {
    "Pow": f"q = Pow(x, three) a = Mul(k, q) b = Add(x, a) s = Mul(b, c) t = Tanh(s) p = Add(one, t)"
    f" h = Mul(half, x) y = Mul(h, p)|{SLOPE}",
    "products": f"q = Mul(x, x) r = Mul(q, x) a = Mul(r, k) b = Add(a, x) s = Mul(c, b) t = Tanh(s)"
    f" p = Add(t, one) h = Mul(x, p) y = Mul(half, h)|{SLOPE}",
    "x pulled out": f"q = Mul(x, x) a = Mul(q, k) b = Add(a, one) d = Mul(x, b) s = Mul(d, c) t = Tanh(s)"
    f" p = Add(t, one) h = Mul(x, half) y = Mul(h, p)|{SLOPE}",
}


def gelu_model(form: str, constant: float | None = None, extra: str = "", outputs: str = "y") -> ir.Model:
    body, default = form.split("|")
    inner = constant if constant is not None else float(default)
    declared = ", ".join(f"float[n] {name}" for name in outputs.split())
    text = f"""<ir_version: 11, opset_import: ["" : 23]>
    g (float[n] x) => ({declared})
    <float c = {{{inner!r}}}, float k = {{0.044715}}, float one = {{1.0}}, float half = {{0.5}},
     float two = {{2.0}}, float three = {{3.0}}> {{ {body} {extra} }}"""
    return ir.from_proto(onnx.parser.parse_model(text))


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("form", ERF_FORMS.values(), ids=ERF_FORMS.keys())
def test_erf_forms(form):
    model = gelu_model(form)
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    before = run(model, x)
    assert apply_rules(model, [FuseGelu()]) == {"gelu": 1}
    (node,) = model.graph
    assert (node.op_type, node.attributes["approximate"].as_string()) == ("Gelu", "none")
    assert list(model.graph.initializers) == [] or all(
        not value.uses() for value in model.graph.initializers.values()
    )
    # Both evaluate the same formula in float32; a few roundings of values up to 6 lie between them.
    np.testing.assert_allclose(run(model, x), before, atol=2e-6)


@pytest.mark.parametrize("form", TANH_FORMS.values(), ids=TANH_FORMS.keys())
def test_tanh_forms(form):
    model = gelu_model(form)
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    before = run(model, x)
    assert apply_rules(model, [FuseGelu()]) == {"gelu": 1}
    (node,) = model.graph
    assert (node.op_type, node.attributes["approximate"].as_string()) == ("Gelu", "tanh")
    np.testing.assert_allclose(run(model, x), before, atol=2e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"constant": 1.41},  # The constant is not √2: another function.
        {"extra": "z = Neg(p)", "outputs": "y z"},  # Somebody else reads 1 + erf.
        {"outputs": "y e"},  # The erf itself is an output.
    ],
    ids=["another constant", "another reader", "inner output"],
)
def test_non_matches(change):
    model = gelu_model(ERF_FORMS["half of x first"], **change)
    before = [node.op_type for node in model.graph]
    assert apply_rules(model, [FuseGelu()]) == {"gelu": 0}
    assert [node.op_type for node in model.graph] == before


def test_quick_gelu_is_another_function():
    model = gelu_model("s = Mul(x, c) e = Sigmoid(s) y = Mul(x, e)|1.702")
    assert apply_rules(model, [FuseGelu()]) == {"gelu": 0}


def test_an_argument_that_is_itself_arithmetic():
    body, _ = ERF_FORMS["half of x first"].split("|")
    body = "b = Add(u, two) x = Mul(b, half) " + body
    text = f"""<ir_version: 11, opset_import: ["" : 23]> g (float[n] u) => (float[n] y)
    <float c = {{{ROOT_TWO!r}}}, float one = {{1.0}}, float half = {{0.5}}, float two = {{2.0}}>
    {{ {body} }}"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    assert apply_rules(model, [FuseGelu()]) == {"gelu": 1}
    assert [node.op_type for node in model.graph] == ["Add", "Mul", "Gelu"]


@settings(max_examples=40, deadline=None)
@given(swaps=st.lists(st.booleans(), min_size=5, max_size=5), half_at=st.integers(0, 2), divide=st.booleans())
def test_any_operand_order(swaps, half_at, divide):
    def binary(op: str, a: str, b: str, swap: bool) -> str:
        return f"{op}({b}, {a})" if swap else f"{op}({a}, {b})"

    scaled = "Div(x, c)" if divide else binary("Mul", "x", "c", swaps[0])
    lines = [f"s = {scaled}", "e = Erf(s)", f"p = {binary('Add', 'e', 'one', swaps[1])}"]
    left, right = "x", "p"
    if half_at == 0:
        lines.append(f"h = {binary('Mul', 'x', 'half', swaps[2])}")
        left = "h"
    elif half_at == 1:
        lines.append(f"h = {binary('Mul', 'p', 'half', swaps[2])}")
        right = "h"
    product = binary("Mul", left, right, swaps[3])
    lines += (
        [f"m = {product}", f"y = {binary('Mul', 'm', 'half', swaps[4])}"]
        if half_at == 2
        else [f"y = {product}"]
    )
    model = gelu_model(" ".join(lines) + f"|{ROOT_TWO if divide else ROOT_HALF}")
    assert apply_rules(model, [FuseGelu()]) == {"gelu": 1}
    assert [node.op_type for node in model.graph] == ["Gelu"]
