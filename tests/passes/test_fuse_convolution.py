"""Batch normalisation and constant scales go into the convolution, exactly in float64."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from planish.passes.fuse.convolution import FoldBatchNormalization, FoldConvolutionScale
from planish.passes.infrastructure.rewriter import apply_rules

Arrays = dict[str, np.ndarray]
RULES = [FoldBatchNormalization(), FoldConvolutionScale()]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def weights(channels: int = 4, inputs: int = 3, *, transposed: bool = False) -> Arrays:
    shape = (inputs, channels, 3, 3) if transposed else (channels, inputs, 3, 3)
    return {
        "w": random(*shape),
        "b": random(channels, seed=1),
        "gamma": random(channels, seed=2),
        "beta": random(channels, seed=3),
        "mean": random(channels, seed=4),
        "var": random(channels, seed=5) ** 2 + 0.1,
    }


def model_of(body: str, initializers: Arrays, outputs: str = "double[n,c,p,q] y") -> ir.Model:
    text = f'<ir_version: 11, opset_import: ["" : 23]> g (double[n,3,h,w0] x) => ({outputs}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in initializers.items() if name in used
    )
    return ir.from_proto(proto)


def run(model: ir.Model) -> np.ndarray:
    """The reference of the onnx package: float64 throughout, and no code in common with ours."""
    return ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": random(2, 3, 6, 5, seed=9)})[0]


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


NORMALISED = "y = BatchNormalization<epsilon = 0.001>(c, gamma, beta, mean, var)"


@pytest.mark.parametrize(
    "convolution",
    [
        "c = Conv(x, w, b)",
        "c = Conv(x, w)",
        "c = Conv<strides = [2, 1], pads = [1, 0, 1, 0]>(x, w, b)",
        "c = ConvTranspose(x, w, b)",
    ],
)
def test_batch_normalization(convolution):
    model = model_of(f"{convolution} {NORMALISED}", weights(transposed="Transpose" in convolution))
    before = run(model)
    assert apply_rules(model, RULES)["fold-batch-normalization"] == 1
    assert len(model.graph) == 1
    assert set(model.graph.initializers) == {"w", "b"} if ", b" in convolution else {"w", "w.bias"}
    np.testing.assert_allclose(run(model), before, rtol=1e-12)


def test_grouped_convolution():
    body = f"c = Conv<group = 3>(x, w, b) {NORMALISED}"
    model = model_of(body, weights(channels=6, inputs=1))
    before = run(model)
    assert apply_rules(model, RULES)["fold-batch-normalization"] == 1
    np.testing.assert_allclose(run(model), before, rtol=1e-12)


@pytest.mark.parametrize(
    ("arithmetic", "shape"),
    [
        ("y = Mul(c, k)", (4, 1, 1)),
        ("y = Mul(k, c)", (1, 4, 1, 1)),
        ("y = Div(c, k)", ()),
        ("y = Add(k, c)", (1,)),
        ("y = Sub(c, k)", (4, 1, 1)),
        ("m = Mul(c, k) y = Add(m, k)", (4, 1, 1)),
    ],
)
def test_scales_and_shifts(arithmetic, shape):
    model = model_of(f"c = Conv(x, w, b) {arithmetic}", {**weights(), "k": random(*shape, seed=7) + 3})
    before = run(model)
    assert apply_rules(model, RULES)["fold-convolution-scale"] == arithmetic.count("=")
    assert ops(model) == ["Conv"]
    np.testing.assert_allclose(run(model), before, rtol=1e-12)


def test_a_shared_weight_is_copied_for_the_one_that_changes():
    model = model_of(
        f"c = Conv(x, w, b) {NORMALISED} z = Conv(x, w, b)",
        weights(),
        "double[n,c,p,q] y, double[n,c,p,q] z",
    )
    before = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": random(2, 3, 6, 5)})
    assert apply_rules(model, RULES)["fold-batch-normalization"] == 1
    after = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": random(2, 3, 6, 5)})
    for new, old in zip(after, before, strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-12)


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("c = Conv(x, w, b) y = Mul(c, k)", "double[n,c,p,q] y, double[n,c,p,q] c"),
        (f"v = Identity(w) c = Conv(x, v, b) {NORMALISED}", "double[n,c,p,q] y"),
        ("c = Conv(x, w, b) y = Mul(c, along_width)", "double[n,c,p,q] y"),
        ("c = Conv(x, w, b) y = Add(c, fifth_axis)", "double[o,n,c,p,q] y"),
        ("c = Conv(x, w, b) y = Div(k, c)", "double[n,c,p,q] y"),
        ("c = Conv(x, w, b) y = Div(c, zero)", "double[n,c,p,q] y"),
        ("c = ConvTranspose<group = 3>(x, grouped) y = Mul(c, k6)", "double[n,c,p,q] y"),
    ],
    ids=["another reader", "computed weight", "per column", "rank grows", "dividend", "by zero", "groups"],
)
def test_non_matches(body, outputs):
    constants = {
        "k": np.full((4, 1, 1), 2.0),
        "k6": np.full((6, 1, 1), 2.0),
        "zero": np.array(0.0),
        "along_width": np.full((3,), 2.0),
        "fifth_axis": np.full((1, 1, 4, 1, 1), 2.0),
        "grouped": random(3, 2, 3, 3),
    }
    model = model_of(body, {**weights(), **constants}, outputs)
    before = ops(model)
    assert apply_rules(model, RULES) == {"fold-batch-normalization": 0, "fold-convolution-scale": 0}
    assert ops(model) == before


def test_a_normalisation_in_training_stays():
    body = "c = Conv(x, w, b) y, m, v = BatchNormalization<training_mode = 1>(c, gamma, beta, mean, var)"
    model = model_of(body, weights(), "double[n,c,p,q] y")
    assert apply_rules(model, RULES)["fold-batch-normalization"] == 0


def test_a_scale_that_the_type_cannot_hold_stays():
    large = {**weights(), "w": random(4, 3, 3, 3) * 1e200, "k": np.full((4, 1, 1), 1e200)}
    model = model_of("c = Conv(x, w, b) y = Mul(c, k)", large)
    assert apply_rules(model, RULES)["fold-convolution-scale"] == 0
