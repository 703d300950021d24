"""The scale pass: the scales of both methods against plain numpy, what is reported, and real decoders."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx.shape_inference
import onnx_ir as ir
import planish
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.codegen import get_target
from planish.ir import clone
from planish.ir.errors import InputError, PipelineError
from planish.passes.infrastructure.base import PassContext
from planish.passes.infrastructure.driver import run_pipeline
from planish.passes.infrastructure.instruments import ContractCheck, VerifyAfterEachPass
from planish.passes.infrastructure.pipeline import Pipeline
from planish.passes.quantize import Quantize
from planish.passes.quantize.grid import Grid
from planish.passes.scale import Scale
from planish.passes.scale.awq import awq_scale, output_error
from planish.passes.scale.smoothquant import smoothing_scale
from planish.runtime.calibration import CalibrationData
from planish.runtime.reference import run_model

WIDTH, HIDDEN = 32, 48
GATED = """n = RMSNormalization <axis = -1> (x, norm_weight)
    g = MatMul(n, gate_weight)  u = MatMul(n, up_weight)
    e = Gelu(g)  h = Mul(e, u)  y = MatMul(h, down_weight)"""


def gated_model(outliers: float = 30.0, seed: int = 0) -> ir.Model:
    """A gated MLP with two channels of large activations, as decoders have them."""
    text = f"g (float[b,s,{WIDTH}] x) => (float[b,s,{WIDTH}] y) {{ {GATED} }}"
    proto = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["" : 23]> {text}')
    rng = np.random.default_rng(seed)
    norm = rng.uniform(0.5, 2, WIDTH)
    norm[[3, 17]] *= outliers
    arrays = {
        "norm_weight": norm,
        "gate_weight": rng.standard_normal((WIDTH, HIDDEN)) / 6,
        "up_weight": rng.standard_normal((WIDTH, HIDDEN)) / 6,
        "down_weight": rng.standard_normal((HIDDEN, WIDTH)) / 7,
    }
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for value in list(model.graph.initializers.values()):
        value.name = value.name.replace("_weight", ".weight")
    return model


def data(count: int = 6, seed: int = 9) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((2, 10, WIDTH)).astype(np.float32)} for _ in range(count)]


def scale(model: ir.Model, calibration, **options):
    ctx = PassContext(target=get_target("portable"), calibration=calibration)
    return Scale(**options).run(model, ctx), ctx


def weight(model: ir.Model, name: str) -> np.ndarray:
    return model.graph.initializers[f"{name}.weight"].const_value.numpy().astype(np.float64)


def activations(model: ir.Model, calibration, name: str) -> np.ndarray:
    """All rows of a tensor, by running the whole model."""
    arrays = [run_model(model, feeds, [name])[name] for feeds in calibration]
    return np.concatenate([array.reshape(-1, array.shape[-1]) for array in arrays]).astype(np.float64)


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_smoothquant_is_its_formula(alpha):
    model, calibration = gated_model(), data()
    before = clone(model)
    result, _ = scale(model, calibration, method="smoothquant", alpha=alpha)
    assert str(result.coverage) == "2 of 2 inputs of linears"
    assert result.statistics == {"folded into a norm": 1, "folded into a linear": 1}
    x = np.abs(activations(before, calibration, "n")).max(0)
    w = np.abs(np.concatenate([weight(before, "gate"), weight(before, "up")], axis=1)).max(1)
    expected = x**alpha / w ** (1 - alpha)
    np.testing.assert_allclose(weight(before, "norm") / weight(model, "norm"), expected, rtol=1e-5)
    np.testing.assert_allclose(weight(model, "gate"), expected[:, None] * weight(before, "gate"), rtol=1e-5)
    # down's scale comes from the model as it was; up has both.
    hidden = np.abs(activations(before, calibration, "h")).max(0)
    second = hidden**alpha / np.abs(weight(before, "down")).max(1) ** (1 - alpha)
    np.testing.assert_allclose(
        weight(model, "up"), expected[:, None] * weight(before, "up") / second, rtol=1e-5
    )
    np.testing.assert_allclose(weight(model, "down"), second[:, None] * weight(before, "down"), rtol=1e-5)


def test_half_way_activations_and_weights_have_the_same_maxima():
    x, w = np.array([100.0, 1.0, 4.0]), np.array([1.0, 1.0, 0.25])
    s = smoothing_scale(x, w, 0.5)
    np.testing.assert_allclose(x / s, s * w)


def test_channels_that_are_zero_are_left_alone():
    s = smoothing_scale(np.array([0.0, 3.0, 4.0]), np.array([2.0, 0.0, 1.0]), 0.5)
    np.testing.assert_allclose(s, [1, 1, 2])


def round_trip(weights: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Symmetric round-to-nearest of [K, N] on groups of rows, by loops over the groups."""
    result = np.empty_like(weights)
    top = 2 ** (bits - 1) - 1
    for start in range(0, len(weights), group):
        block = weights[start : start + group]
        step = np.abs(block).max(0) / top
        result[start : start + group] = np.round(block / step) * step
    return result


def awq_errors(x: np.ndarray, weights: np.ndarray, bits: int, group: int, candidates: int) -> list[float]:
    """‖x (W − Ŵ)‖² of every candidate, from the outputs themselves."""
    errors = []
    for i in range(candidates):
        s = np.maximum(np.abs(x).mean(0) ** (i / candidates), 1e-4)
        s = s / np.sqrt(s.max() * s.min())
        restored = round_trip(s[:, None] * weights, bits, group) / s[:, None]
        errors.append(float(((x @ (weights - restored)) ** 2).sum()))
    return errors


@pytest.mark.parametrize(("scheme", "bits", "group"), [("W4A16", 4, 16), ("W3A16", 3, WIDTH)])
def test_awq_takes_the_exponent_with_the_least_output_error(scheme, bits, group):
    model, calibration = gated_model(), data()
    before = clone(model)
    _, ctx = scale(model, calibration, method="awq", scheme=scheme, group_size=group if group < WIDTH else -1)
    x = activations(before, calibration, "n")
    weights = np.concatenate([weight(before, "gate"), weight(before, "up")], axis=1)
    errors = awq_errors(x, weights, bits, group, 20)
    best = int(np.argmin(errors))
    assert best > 0
    s = np.abs(x).mean(0) ** (best / 20)
    s /= np.sqrt(s.max() * s.min())
    np.testing.assert_allclose(weight(before, "norm") / weight(model, "norm"), s, rtol=1e-5)
    remark = next(remark.text for remark in ctx.remarks if remark.subject == "gate_up")
    assert f"r = {best / 20:.2f}" in remark
    energy = ((x @ weights) ** 2).sum()
    assert f"{np.sqrt(errors[0] / energy):.3g} → {np.sqrt(errors[best] / energy):.3g}" in remark


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4]), st.sampled_from([0, 16]), st.booleans())
def test_the_output_error_through_the_covariance_is_that_of_the_outputs(seed, bits, block_size, symmetric):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((100, WIDTH)) * np.exp(rng.standard_normal(WIDTH))).astype(np.float32)
    weights = rng.standard_normal((WIDTH, 5)).astype(np.float32)
    grid = Grid(bits=bits, symmetric=symmetric, block_size=block_size, scale_dtype=np.dtype(np.float32))
    s = awq_scale(np.abs(x).mean(0, dtype=np.float64), 0.5)
    error = output_error(weights, s, x.T @ x / len(x), grid)
    scaled = (weights * s[:, None]).astype(np.float32)
    blocks = scaled.reshape(-1, block_size or WIDTH, 5)
    low, high = np.minimum(blocks.min(1), 0)[:, None], np.maximum(blocks.max(1), 0)[:, None]
    if symmetric:
        step = np.maximum(-low, high) / (2 ** (bits - 1) - 1)
        restored = np.round(blocks / step) * step
    else:
        step = (high - low) / (2**bits - 1)
        zero = np.round(-low / step)
        restored = (np.clip(np.round(blocks / step) + zero, 0, 2**bits - 1) - zero) * step
    change = x @ (weights - restored.reshape(scaled.shape) / s[:, None])
    # A weight that lies half way between two points may be rounded either way.
    assert error == pytest.approx((change.astype(np.float64) ** 2).sum() / len(x), rel=1e-2)


@pytest.mark.parametrize("scheme", ["W2A16", "W3A16", "W4A16", "W4A16_ASYM"])
@pytest.mark.parametrize("seed", [0, 1])
def test_awq_never_makes_a_quantised_group_worse(scheme, seed):
    model, calibration = gated_model(seed=seed), data(seed=seed)
    before = clone(model)
    scale(model, calibration, method="awq", scheme=scheme, group_size=16)
    errors = []
    for candidate in (before, model):
        dense = clone(candidate)
        Quantize(scheme=scheme, group_size=16, clip=False, ignore=("gate", "up")).run(
            candidate, PassContext(target=get_target("portable"))
        )
        y = [activations(m, calibration, "y") for m in (candidate, dense)]
        errors.append(relative(*y))
    # The pass measured both in float32, through the covariance.
    assert errors[1] <= errors[0] * (1 + 1e-4)


def test_awq_lowers_the_error_of_a_model_with_outliers():
    model, calibration = gated_model(), data()
    before = clone(model)
    scale(model, calibration, method="awq", scheme="W4A16", group_size=16)
    errors = []
    for candidate in (before, model):
        expected = activations(candidate, calibration, "y")
        Quantize(scheme="W4A16", group_size=16, clip=False).run(
            candidate, PassContext(target=get_target("portable"))
        )
        errors.append(relative(activations(candidate, calibration, "y"), expected))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("method", ["smoothquant", "awq"])
def test_no_output_changes(method):
    model, calibration = gated_model(), data()
    before = clone(model)
    scale(model, calibration, method=method, group_size=16)
    found, expected = (activations(m, calibration, "y") for m in (model, before))
    # Sums of 48 products whose factors were each rounded once more.
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_group_that_does_not_gain_is_left_as_it_is():
    """With equal means every exponent gives the same scale, 1."""
    model = gated_model(outliers=1)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (1, 10, WIDTH)).astype(np.float32)
    model.graph.initializers["norm.weight"].const_value = ir.tensor(np.ones(WIDTH, np.float32))
    before = clone(model)
    result, ctx = scale(model, [{"x": signs}], method="awq", group_size=16, ignore=("down",))
    assert ctx.remarks[0].subject == "gate_up"
    assert "r = 0: no scale lowers the output error" in ctx.remarks[0].text
    assert not result.modified
    assert result.coverage.covered == 1
    for name in ("norm", "gate", "up", "down"):
        np.testing.assert_array_equal(weight(model, name), weight(before, name))


def test_the_pass_says_what_it_did_and_what_it_left():
    model = gated_model()
    result, ctx = scale(model, data(), method="awq", scheme="W4A16", group_size=32)
    assert str(result.coverage) == "1 of 2 inputs of linears; 1 skipped: in_features % 32"
    assert [remark.subject for remark in ctx.remarks] == ["gate_up", "down"]
    assert ctx.remarks[1].text == "not scaled: in_features % 32"
    _, ctx = scale(model, data(), method="smoothquant")
    assert ctx.remarks[0].text.startswith("largest |x| ")


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {"norm", "gate", "up", "down"}),
        ({"ignore": ("down",)}, {"norm", "gate", "up"}),
        ({"ignore": ("gate", "up")}, {"up", "down"}),
        ({"targets": ("re:g",)}, {"norm", "gate", "up"}),
    ],
)
def test_targets_and_ignore(options, names):
    """Linears that read the same input are scaled together, also those that will not be quantised."""
    model = gated_model()
    before = clone(model)
    scale(model, data(), **options)
    changed = {
        name
        for name in ("norm", "gate", "up", "down")
        if not np.array_equal(weight(model, name), weight(before, name))
    }
    assert changed == names


def test_layers_that_will_not_be_quantised_have_no_say():
    scales = []
    for factor in (1, 100):
        model = gated_model()
        up = weight(model, "up") * factor
        model.graph.initializers["up.weight"].const_value = ir.tensor(up.astype(np.float32))
        before = weight(model, "norm")
        scale(model, data(), method="smoothquant", ignore=("up", "down"))
        scales.append(before / weight(model, "norm"))
    np.testing.assert_allclose(scales[0], scales[1], rtol=1e-6)


def test_without_calibration_data_the_error_says_what_to_give():
    with pytest.raises(InputError, match="calibration="):
        scale(gated_model(), [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha"),
        ({"candidates": 1}, "candidates"),
        ({"method": "awq", "scheme": "W99A16"}, "not known"),
    ],
)
def test_bad_options_are_refused_when_the_pass_is_made(options, message):
    with pytest.raises(PipelineError, match=message):
        Scale(**options)


def test_quantised_models_are_refused():
    with pytest.raises(PipelineError, match="scale"):
        planish.compile(
            gated_model(), ["canonicalize", Quantize(scheme="W8A16"), Scale()], calibration=data()
        )


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
IDS = np.random.default_rng(0).integers(0, 64, (4, 8))


@pytest.fixture(scope="module")
def llama() -> ir.Model:
    """With grouped queries and a cache."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2)
    return planish.compile(
        transformers.LlamaForCausalLM(config).eval(), "canonicalize", target="portable"
    ).model


@pytest.fixture(scope="module")
def opt() -> ir.Model:
    """With a cache, biases, Relu, one value head for each query head, a head tied to the embeddings."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32)
    return planish.compile(
        transformers.OPTForCausalLM(config).eval(), "canonicalize", target="portable"
    ).model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "skipped"),
    [
        ("llama", {"self_attn.o_proj": "several query heads", "lm_head": "ignored"}),
        pytest.param("opt", {}, marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", ["smoothquant", "awq"])
def test_decoders(name, skipped, fused, method, request):
    """Norm → q, k, v; v → o; norm → gate, up; up → down; fc1 → Relu → fc2: the contract is checked."""
    model = clone(request.getfixturevalue(name))
    calibration = CalibrationData.read([{"input_ids": row[None]} for row in IDS], model)
    report = run_pipeline(
        model,
        Pipeline.of([*["fuse"] * fused, Scale(method=method, group_size=16)]),
        target=get_target("portable"),
        calibration=calibration,
        instruments=[VerifyAfterEachPass(), ContractCheck(calibration[:2])],
    )
    coverage = report.passes[-1].coverage
    assert coverage.covered == 4 - ("self_attn.o_proj" in skipped)
    found = {skip.name: skip.reason for skip in coverage.skipped}
    assert len(found) == len(skipped)
    for ending, reason in skipped.items():
        assert any(key.endswith(ending) and reason in text for key, text in found.items())
