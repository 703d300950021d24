"""Activations and padding: what onnxscript's rules and ours match under our driver, and what must stay."""

import numpy as np
import onnx.parser
import onnx.shape_inference
import onnx_ir as ir
import onnxruntime
import pytest
from planish.passes.fuse.borrowed import borrowed_rules
from planish.passes.fuse.hard_swish import FuseHardSwish
from planish.passes.infrastructure.rewriter import apply_rules

RULES = [FuseHardSwish(), *borrowed_rules()]

CONSTANTS = """float zero = {0.0}, float three = {3.0}, float six = {6.0}, float one = {1.0},
    int64[8] pads = {0, 0, 1, 2, 0, 0, 2, 1}, int64[8] batch = {1, 0, 0, 0, 0, 0, 0, 0},
    float[1,2,1,1] w = {0.5, -0.25}"""


def model_of(body: str) -> ir.Model:
    text = f"""<ir_version: 11, opset_import: ["" : 23]> g (float[n,2,h,k] x) => (float[o,p,q,r] y)
    <{CONSTANTS}> {{ {body} }}"""
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))


def run(model: ir.Model) -> np.ndarray:
    x = np.linspace(-8, 8, 2 * 2 * 5 * 4, dtype=np.float32).reshape(2, 2, 5, 4)
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("p = Pad(x, pads) y = Conv(p, w)", ["Conv"]),
        ("p = Pad(x, pads, zero) y = Conv<pads = [1, 0, 0, 1]>(p, w)", ["Conv"]),
        ("a = Relu(x) y = Relu(a)", ["Relu"]),
        ("a = Relu(x) y = Clip(a, zero, six)", ["Clip"]),
        ("a = Clip(x, one, six) y = Clip(a, zero, three)", ["Clip"]),
        ("a = Add(x, three) b = Clip(a, zero, six) c = Mul(x, b) y = Div(c, six)", ["HardSwish"]),
        ("a = Add(three, x) b = Clip(a, zero, six) c = Div(b, six) y = Mul(c, x)", ["HardSwish"]),
        ("b = HardSigmoid<alpha = 0.16666667>(x) y = Mul(b, x)", ["HardSwish"]),
    ],
)
def test_matches(body, expected):
    model = model_of(body)
    before = run(model)
    apply_rules(model, RULES)
    assert [node.op_type for node in model.graph] == expected
    # float32 in another order of operations.
    np.testing.assert_allclose(run(model), before, rtol=1e-5, atol=1e-6)


def test_an_op_without_a_kernel_for_the_type_is_not_emitted():
    text = """<ir_version: 11, opset_import: ["" : 23]> g (double[n] x) => (double[n] y)
    <double zero = {0.0}, double three = {3.0}, double six = {6.0}>
    { a = Add(x, three) b = Clip(a, zero, six) c = Mul(x, b) y = Div(c, six) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    assert not any(apply_rules(model, RULES).values())


@pytest.mark.parametrize(
    "body",
    [
        "p = Pad(x, pads, one) y = Conv(p, w)",
        "p = Pad(x, batch) y = Conv(p, w)",
        'p = Pad<mode = "edge">(x, pads) y = Conv(p, w)',
        "a = Add(x, three) b = Clip(a, zero, six) c = Mul(x, b) y = Div(c, three)",
        "a = Add(x, three) b = Clip(a, one, six) c = Mul(x, b) y = Div(c, six)",
        "a = Add(x, three) b = Clip(a, zero, six) c = Mul(x, b) d = Div(c, six) y = Sub(d, b)",
        "b = HardSigmoid(x) y = Mul(b, x)",
    ],
    ids=["pads with ones", "pads the batch", "edge", "another divisor", "another bound", "reader", "slope"],
)
def test_non_matches(body):
    model = model_of(body)
    before = [node.op_type for node in model.graph]
    assert not any(apply_rules(model, RULES).values())
    assert [node.op_type for node in model.graph] == before
