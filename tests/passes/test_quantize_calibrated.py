"""Quantising with calibration data: which statistics an algorithm gets, and what is built from them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import planish
import pytest
from planish.codegen import get_target
from planish.ir import clone, verify
from planish.ir.views import linears
from planish.passes.infrastructure.base import PassContext
from planish.passes.quantize import Quantize
from planish.passes.quantize import quantize as quantize_module
from planish.passes.quantize.activations import Activations
from planish.passes.quantize.algorithms.rtn import round_to_nearest
from planish.passes.quantize.layer_outcome import output_error
from planish.passes.quantize.low_rank import low_rank_residual
from planish.passes.quantize.selection import SCHEME_KEY
from planish.runtime.reference import run_model

K = 32
# q and k share their input, as in an attention; o reads what comes of them; up follows a residual.
TEXT = f"""
<ir_version: 11, opset_import: ["" : 23]>
block (float[n, s, {K}] x, int64[n, s] attention_mask) => (float[n, s, {K}] y) {{
  h = Tanh (x)
  q = MatMul (h, q_weight)
  k = MatMul (h, k_weight)
  qk = Mul (q, k)
  o = MatMul (qk, o_weight)
  stream = Add (x, o)
  up = MatMul (stream, up_weight)
  y = Add (stream, up)
}}
"""
RNG = np.random.default_rng(3)
DATA = [
    {
        "x": RNG.standard_normal((2, 8, K)).astype(np.float32),
        "attention_mask": np.array([[1] * 8, [1] * 5 + [0] * 3]),
    }
    for _ in range(3)
]


def make_model() -> ir.Model:
    proto = onnx.parser.parse_model(TEXT)
    for seed, name in enumerate(("q", "k", "o", "up")):
        weight = np.random.default_rng(seed).standard_normal((K, K)) / np.sqrt(K)
        tensor = onnx.numpy_helper.from_array(weight.astype(np.float32), f"{name}_weight")
        proto.graph.initializer.append(tensor)
    model = planish.ir.load(proto)
    for name in ("q", "k", "o", "up"):
        model.graph.initializers[f"{name}_weight"].name = f"{name}.weight"
    return model


def quantize(model: ir.Model, data=DATA, **options):
    ctx = PassContext(target=get_target("portable"), calibration=data)
    result = Quantize(**options).run(model, ctx)
    verify(model)
    return result, ctx


def rows_of(model: ir.Model, name: str) -> np.ndarray:
    """The value on all of the data, padding left out, by running the whole model."""
    parts = []
    for feeds in DATA:
        value = run_model(model, feeds, [name])[name].astype(np.float64)
        parts.append(value[feeds["attention_mask"].astype(bool)])
    return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class Spy:
    """Rounds to nearest and keeps the statistics that it was given, by the weight's width."""

    needs_statistics: ClassVar[bool] = True
    needs_prefix_error: ClassVar[bool] = True
    seen: list = dataclasses.field(default_factory=list)

    def __call__(self, weight, grid, statistics, remark, workers):
        self.seen.append((weight, statistics))
        return round_to_nearest(weight, grid)


@pytest.fixture
def spy(monkeypatch):
    spy = Spy()
    monkeypatch.setattr(quantize_module, "algorithm", lambda name, **settings: spy)
    return spy


@pytest.mark.parametrize("scheme", ["W3A16", "W4A4"])
def test_statistics_are_those_of_the_quantised_prefix_without_padding(spy, scheme):
    dense, model = make_model(), make_model()
    quantize(model, scheme=scheme, group_size=-1, ignore=())
    # Layers that share an input come as one weight.
    assert [weight.shape for weight, _ in spy.seen] == [(K, 2 * K), (K, K), (K, K)]
    seen = [statistics for _, statistics in spy.seen]
    for name, statistics in zip(("h", "qk", "stream"), seen, strict=True):
        inputs, reference = rows_of(model, name), rows_of(dense, name)
        if scheme == "W4A4":
            largest = np.abs(inputs).max(axis=-1, keepdims=True)
            step = 0.9 * largest / 7
            inputs = np.clip(np.rint(inputs / step), -8, 7) * step
        assert statistics.tokens == len(inputs) == 3 * 13
        # Sums of 39 products in float32, and roundings of activations that are ties in one precision only.
        tolerance = 1e-6 if scheme == "W3A16" else 2e-2
        expected = inputs.T @ inputs / len(inputs)
        np.testing.assert_allclose(statistics.covariance, expected, atol=tolerance)
        error = (reference - inputs).T @ inputs / len(inputs)
        np.testing.assert_allclose(statistics.prefix_error, error, atol=tolerance)
    assert np.abs(seen[2].prefix_error).max() > 1e-3


def test_without_data_an_algorithm_that_needs_it_is_refused():
    with pytest.raises(planish.InputError, match="needs calibration data"):
        quantize(make_model(), data=(), algorithm="gptq", group_size=-1)


def test_activations_that_are_not_finite_are_named():
    model = make_model()
    broken = [{**DATA[0], "x": np.full((2, 8, K), 3e38, np.float32)}]
    with pytest.raises(planish.PassError, match=r"'stream'.*'up'"):
        quantize(model, data=broken, algorithm="gptq", targets=("up",), group_size=-1)


def test_gptq_errs_less_at_the_output_than_rounding_to_nearest():
    errors = {}
    for algorithm in ("rtn", "gptq"):
        model = make_model()
        quantize(model, scheme="W2A16", group_size=-1, algorithm=algorithm, ignore=(), clip=False)
        dense = rows_of(make_model(), "y")
        errors[algorithm] = np.linalg.norm(rows_of(model, "y") - dense) / np.linalg.norm(dense)
    assert errors["gptq"] < errors["rtn"]


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_a_low_rank_residual_stands_beside_the_layer(algorithm):
    model = make_model()
    dense_weight = model.graph.initializers["up.weight"].const_value.numpy()
    quantize(model, scheme="W2A16", algorithm=algorithm, targets=("up",), compensate_rank=4, group_size=-1)
    weights = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    down, up = weights["up.low_rank_down"], weights["up.low_rank_up"]
    assert down.shape == (K, 4)
    assert up.shape == (4, K)
    integers = weights["up.weight_quantized"].astype(np.float32)
    whole = integers * weights["up.weight_scale"] + down @ up
    stream = rows_of(model, "stream")
    np.testing.assert_allclose(rows_of(model, "y"), stream + stream @ whole, atol=1e-5)
    # It is the best that rank 4 can do for this error in the inputs' metric.
    root = np.linalg.cholesky(stream.T @ stream / len(stream)).T
    singular = np.linalg.svd(root @ (dense_weight - integers * weights["up.weight_scale"]), compute_uv=False)
    left = np.linalg.norm(root @ (dense_weight - whole))
    assert left == pytest.approx(np.sqrt((singular[4:] ** 2).sum()), rel=1e-3)


def test_the_residual_beside_gptaq_aims_where_gptaq_does():
    errors = {}
    dense = rows_of(make_model(), "y")
    for rank in (0, K):
        model = make_model()
        options = {"group_size": -1, "ignore": (), "compensate_rank": rank}
        quantize(model, scheme="W2A16", algorithm="gptaq", damp=1e-6, **options)
        errors[rank] = np.linalg.norm(rows_of(model, "y") - dense) / np.linalg.norm(dense)
    # With the full rank, every layer gives the least-squares answer to the dense model's output; what is left
    # is damping and the tokens, 39 of them, that 32 channels cannot all fit.
    assert errors[K] < 0.1 * errors[0]


def test_low_rank_layers_are_left_alone_by_the_next_quantisation():
    model = make_model()
    quantize(model, scheme="W4A16", targets=("up",), compensate_rank=4, group_size=-1)
    result, _ = quantize(model, scheme="W8A16")
    reasons = {skip.name: skip.reason for skip in result.coverage.skipped}
    assert reasons["up.low_rank_down"] == "makes up for the error of a quantised layer"
    assert reasons["up"] == "quantised already"


def test_a_rank_without_energy_adds_nothing():
    weight = np.eye(4, dtype=np.float32)
    down, up = low_rank_residual(weight, np.zeros((4, 4), np.float32), np.diag([1.0, 1.0, 0.0, 0.0]), 4)
    assert np.isfinite(down).all()
    np.testing.assert_allclose(down @ up, np.diag([1, 1, 0, 0]), atol=1e-12)


@pytest.mark.parametrize("calibrator", ["min-max", "percentile", "mse", "entropy"])
def test_static_activations(calibrator):
    model = make_model()
    quantize(model, scheme="W8A8", activations="static", calibrator=calibrator, ignore=())
    nodes = [node for node in model.graph if node.domain == "planish"]
    assert [node.op_type for node in nodes] == ["StaticQuantizedLinear"] * 4
    stream = rows_of(model, "stream")
    scale = float(model.graph.initializers["up.input_scale"].const_value.numpy())
    zero_point = int(model.graph.initializers["up.input_zero_point"].const_value.numpy())
    covered = 255 * scale
    whole = stream.max() - stream.min()
    assert (
        covered == pytest.approx(whole, rel=1e-6) if calibrator == "min-max" else 0 < covered <= 1.01 * whole
    )
    assert 0 <= zero_point <= 255
    dense = rows_of(make_model(), "y")
    # 8 bits over ± 4 σ: a step of σ / 32 and an error of step / √12 at each of three layers; twice that.
    assert np.linalg.norm(rows_of(model, "y") - dense) / np.linalg.norm(dense) < 0.04


def test_groups_have_their_own_schemes():
    groups = {
        "attention": {"targets": ("q", "k"), "scheme": "W8A16"},
        "rest": {"targets": "re:.*", "scheme": "W4A16", "group_size": 16},
    }
    model = make_model()
    quantize(model, config_groups=groups, ignore=("o",))
    bits = {linear.name: linear.bits for linear in linears(model)}
    assert bits == {"q": 8, "k": 8, "o": None, "up": 4}
    only = {"attention": groups["attention"]}
    result, _ = quantize(make_model(), config_groups=only)
    assert {skip.reason for skip in result.coverage.skipped} == {"in no config group"}


def test_what_allocate_chose_is_obeyed():
    model = make_model()
    by_name = {linear.name: linear.node for linear in linears(model)}
    by_name["q"].metadata_props[SCHEME_KEY] = "W3A16 group_size=16"
    by_name["k"].metadata_props[SCHEME_KEY] = "dense"
    result, _ = quantize(model, scheme="W8A16", ignore=())
    assert {linear.name: linear.bits for linear in linears(model)} == {"q": 3, "k": None, "o": 8, "up": 8}
    assert [skip.reason for skip in result.coverage.skipped] == ["left dense by allocate"]
    by_name["k"].metadata_props[SCHEME_KEY] = "W3A16 colour=red"
    with pytest.raises(planish.PipelineError, match="cannot be read"):
        quantize(model, ignore=())


def test_a_group_size_that_fits_no_layer_leaves_nothing_to_do():
    model = make_model()
    with pytest.raises(planish.PlanishError, match=r"covered nothing.*in_features % 64"):
        planish.compile(model, "canonicalize,quantize{scheme=W4A16,group_size=64}", target="portable")


def test_a_scheme_that_the_target_cannot_run_is_refused_before_any_work():
    class Refusing(type(get_target("portable"))):
        name = "refusing"

        def unsupported_reason(self, linear):
            return "it has no 3-bit kernel" if linear.bits == 3 else None

        def formats(self):
            return ("W4A16", "W8A16")

    model = make_model()
    before = clone(model)
    ctx = PassContext(target=Refusing(), calibration=DATA)
    with pytest.raises(planish.TargetError, match=r"refusing.*W3A16.*no 3-bit kernel.*W4A16.*W8A16"):
        Quantize(scheme="W3A16", group_size=-1).run(model, ctx)
    assert [node.op_type for node in model.graph] == [node.op_type for node in before.graph]


def storage(model: ir.Model) -> dict[str, str]:
    return {
        name.removeprefix("up."): value.dtype.name
        for name, value in model.graph.initializers.items()
        if name.startswith("up.")
    }


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
@pytest.mark.parametrize(
    ("options", "expected", "allowed"),
    [
        # The allowed error of the layer's output: a 4-bit code book on Gaussian weights costs about 0.1.
        ({"scheme": "NF4", "group_size": 16}, {"weight_quantized": "UINT4", "weight_scale": "FLOAT"}, 0.15),
        ({"scheme": "FP4", "group_size": 16}, {"weight_quantized": "UINT4", "weight_scale": "FLOAT"}, 0.15),
        ({"scheme": "MXFP4A16"}, {"weight_quantized": "UINT4", "weight_scale": "UINT8"}, 0.2),
        ({"scheme": "NVFP4A16"}, {"weight_quantized": "UINT4", "weight_scale": "FLOAT8E4M3FN"}, 0.15),
        ({"scheme": "FP8A16"}, {"weight_quantized": "FLOAT8E4M3FN", "weight_scale": "FLOAT"}, 0.05),
    ],
    ids=["NF4", "FP4", "MXFP4", "NVFP4", "FP8"],
)
def test_formats_that_are_no_integers(options, expected, allowed, algorithm):
    model, dense = make_model(), make_model()
    quantize(model, **options, algorithm=algorithm, targets=("up",))
    assert expected.items() <= storage(model).items()
    stream = rows_of(dense, "stream")
    product = rows_of(dense, "y") - stream
    assert np.linalg.norm(rows_of(model, "y") - stream - product) < allowed * np.linalg.norm(product)


def test_outliers_are_kept_beside_bilevel_groups():
    model, dense = make_model(), make_model()
    weight = np.array(dense.graph.initializers["up.weight"].const_value.numpy())
    weight[3, 5] = 40.0
    for copy in (model, dense):
        copy.graph.initializers["up.weight"].const_value = ir.tensor(weight, name="up.weight")
    quantize(model, scheme="W3A16_ASYM", group_size=16, algorithm="spqr", targets=("up",))
    assert {"outlier_gaps", "outlier_values", "weight_scale_scale"} <= storage(model).keys()
    stream = rows_of(dense, "stream")
    product = rows_of(dense, "y") - stream
    # 3 bits on Gaussian weights cost about 0.2; without the outlier, column 5 would be lost altogether.
    error = rows_of(model, "y") - stream - product
    assert np.linalg.norm(error[:, 5]) < 0.2 * np.linalg.norm(product[:, 5])
    assert np.linalg.norm(error) < 0.25 * np.linalg.norm(product)


def test_activations_on_a_grid_per_token():
    rows = np.array([[1.0, -7.0, 3.2, 0.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
    plain = Activations("token", 4).apply(rows)
    np.testing.assert_allclose(plain, [[1, -7, 3, 0], [0, 0, 0, 0]])
    clipped = Activations("token", 4, 0.5).apply(rows)
    np.testing.assert_allclose(clipped, [[1, -4, 3, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("columns", [5, 700])  # one slab, and two
def test_the_output_error_is_that_of_the_outputs(columns):
    x = RNG.standard_normal((100, K))
    weight, other = RNG.standard_normal((2, K, columns)).astype(np.float32)
    expected = np.linalg.norm(x @ (weight - other)) / np.linalg.norm(x @ weight)
    assert output_error(weight, other, x.T @ x / 100) == pytest.approx(expected, rel=1e-5)
    assert output_error(np.zeros_like(weight), other, x.T @ x / 100) == 0
