"""The quantize pass: what it replaces, what it skips and why, and that the graph still computes the layer."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from planish.codegen import get_target
from planish.ir import clone, verify
from planish.ir.errors import PassError, PipelineError
from planish.passes.infrastructure.base import PassContext
from planish.passes.quantize import Quantize

K, N = 64, 8


def model_of(text: str, weights: dict[str, np.ndarray], dtype=ir.DataType.FLOAT) -> ir.Model:
    """A model from ONNX text whose free names are the given initializers."""
    proto = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["" : 23]>\n{text}')
    for name, array in weights.items():
        proto.graph.initializer.append(ir.to_proto(ir.tensor(array, name=name)))
    return ir.from_proto(proto)


def linear_model(weight: np.ndarray, bias: np.ndarray | None = None) -> ir.Model:
    body = "y = MatMul (x, fc.weight)" if bias is None else "p = MatMul (x, fc.weight) y = Add (p, fc.bias)"
    kind = {"float32": "float", "float16": "float16", "bfloat16": "bfloat16"}[weight.dtype.name]
    k, n = weight.shape
    text = f"g ({kind}[batch, sequence, {k}] x) => ({kind}[batch, sequence, {n}] y) {{ {body} }}"
    text = text.replace("fc.", "fc_")
    model = model_of(text, {"fc_weight": weight} | ({} if bias is None else {"fc_bias": bias}))
    for name in ("weight", "bias"):
        if f"fc_{name}" in model.graph.initializers:
            model.graph.initializers[f"fc_{name}"].name = f"fc.{name}"
    return model


def quantize(model: ir.Model, **options):
    ctx = PassContext(target=get_target("portable"))
    result = Quantize(**options).run(model, ctx)
    verify(model)
    return result, ctx


def run(model: ir.Model, **feeds):
    options = onnxruntime.SessionOptions()
    # The graph as it is written: optimised, onnxruntime quantises activations of an A16 layer too.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"]).run(
        None, feeds
    )[0]


def random(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def relative(actual, expected):
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def op_types(model):
    return [(node.domain, node.op_type) for node in model.graph]


# What a grid of 2^bits points costs on Gaussian weights: step / √12 over a range of about ±3.5 σ, relative.
def expected_error(bits):
    return 7 / (2**bits - 1) / np.sqrt(12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("group_size", [-1, 16, 32])
@pytest.mark.parametrize("scheme", ["W8A16", "W4A16", "W4A16_ASYM", "W8A16_ASYM", "W3A16", "W2A16", "W6A16"])
def test_weight_only_schemes(scheme, group_size, bias):
    weight, b, x = random(K, N), random(N, seed=1) if bias else None, random(2, 3, K, seed=2)
    model = linear_model(weight, b)
    result, _ = quantize(model, scheme=scheme, group_size=group_size)
    assert str(result.coverage) == "1 of 1 linears and embeddings"
    assert op_types(model) == [("planish", "QuantizedLinear")]
    assert "fc.weight" not in model.graph.initializers
    assert model.graph.outputs[0].name == "y"
    expected = x.astype(np.float64) @ weight + (0 if b is None else b)
    assert relative(run(model, x=x), expected) < 1.5 * expected_error(int(scheme[1]))


@pytest.mark.parametrize("activations", ["token", "tensor"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_w8a8(activations, bias, dtype):
    weight, x = random(K, N, dtype=dtype), random(2, 3, K, seed=2, dtype=dtype)
    b = random(N, seed=1, dtype=dtype) if bias else None
    model = linear_model(weight, b)
    quantize(model, scheme="W8A8", activations=activations)
    node = next(node for node in model.graph if node.domain == "planish")
    assert node.op_type == "DynamicQuantizedLinear"
    assert node.overload.startswith(activations)
    expected = x.astype(np.float64) @ weight.astype(np.float64) + (0 if b is None else b)
    # Weights and activations each add an 8-bit grid's error; pairs within their limit double the weights'.
    assert relative(run(model, x=x).astype(np.float64), expected) < 3 * expected_error(8)
    assert model.graph.outputs[0].dtype == ir.DataType.from_numpy(np.dtype(dtype))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_scales_keep_the_models_float_type(dtype):
    model = linear_model(random(K, N).astype(dtype))
    quantize(model, scheme="W4A16", group_size=32)
    node = model.graph.node(0)
    assert node.inputs[2].dtype == ir.DataType.from_numpy(np.dtype(dtype))
    assert node.outputs[0].dtype == ir.DataType.from_numpy(np.dtype(dtype))


def test_a_gemm_with_a_transposed_weight():
    weight, b, x = random(N, K), random(N, seed=1), random(5, K, seed=2)
    model = model_of(
        f"g (float[m, {K}] x) => (float[m, {N}] y) {{ y = Gemm <transB = 1> (x, w, b) }}",
        {"w": weight, "b": b},
    )
    quantize(model, scheme="W8A16")
    assert relative(run(model, x=x), x @ weight.T.astype(np.float64) + b) < expected_error(8)


def test_embedding_tables_become_int8_by_row():
    table = random(300, K) * np.arange(1, 301, dtype=np.float32)[:, None]
    model = model_of(f"g (int64[m] ids) => (float[m, {K}] y) {{ y = Gather (table, ids) }}", {"table": table})
    ids = np.array([0, 299, 17])
    result, _ = quantize(model, scheme="W8A16")
    assert result.coverage.covered == 1
    assert op_types(model) == [("planish", "QuantizedGather")]
    actual = run(model, ids=ids)
    # Half a step of each row's own grid, plus float32 rounding.
    assert np.all(np.abs(actual - table[ids]) <= np.abs(table[ids]).max(-1, keepdims=True) / 127 * 0.5001)


@pytest.mark.parametrize(
    ("table", "body", "outputs", "reason"),
    [
        (random(300, K), "y = Gather (t, ids) z = Transpose (t)", f"float[{K}, 300] z", "read by other ops"),
        (random(4, K), "y = Gather (t, ids) z = Identity (y)", f"float[m, {K}] z", "fewer than"),
    ],
)
def test_tables_that_are_left_alone(table, body, outputs, reason):
    model = model_of(f"g (int64[m] ids) => (float[m, {K}] y, {outputs}) {{ {body} }}", {"t": table})
    result, ctx = quantize(model, scheme="W8A16")
    assert result.coverage.covered == 0
    assert reason in result.coverage.skipped[0].reason
    assert not result.modified
    assert reason in ctx.remarks[0].text
    assert op_types(model)[0] == ("", "Gather")


def test_embeddings_can_be_left_out():
    model = model_of(
        f"g (int64[m] ids) => (float[m, {K}] y) {{ y = Gather (t, ids) }}", {"t": random(300, K)}
    )
    result, _ = quantize(model, scheme="W8A16", embeddings=False)
    assert (result.coverage.total, result.coverage.unit) == (0, "linears")


def two_layers():
    return model_of(
        f"g (float[m, {K}] x) => (float[m, {N}] y) {{ h = MatMul (x, a) y = MatMul (h, b) }}",
        {"a": random(K, K), "b": random(K, N)},
    )


@pytest.mark.parametrize(
    ("options", "quantised"),
    [
        ({}, {"a", "b"}),
        ({"ignore": ("a",)}, {"b"}),
        ({"ignore": ("re:[b]",)}, {"a"}),
        ({"targets": ("b",)}, {"b"}),
        ({"targets": ("re:.*",), "ignore": ("b",)}, {"a"}),
    ],
)
def test_targets_and_ignore(options, quantised):
    model = two_layers()
    result, _ = quantize(model, scheme="W8A16", **options)
    assert {"a", "b"} - {skip.name for skip in result.coverage.skipped} == quantised
    assert len(quantised) == result.coverage.covered
    assert {name for name in ("a", "b") if name not in model.graph.initializers} == quantised


def test_the_reason_for_skipping_is_counted():
    model = linear_model(random(48, N))
    result, _ = quantize(model, scheme="W4A16", group_size=32)
    assert str(result.coverage) == "0 of 1 linears and embeddings; 1 skipped: in_features % 32"


def test_a_shared_weight_is_skipped():
    model = model_of(
        f"g (float[m, {K}] x) => (float[m, {K}] y) {{ h = MatMul (x, w) y = MatMul (h, w) }}",
        {"w": random(K, K)},
    )
    result, _ = quantize(model, scheme="W8A16")
    assert {skip.reason for skip in result.coverage.skipped} == {"its weight is shared"}


def test_quantising_twice_changes_nothing():
    model = linear_model(random(K, N))
    quantize(model, scheme="W8A16")
    result, _ = quantize(model, scheme="W4A16", group_size=32)
    assert not result.modified
    assert result.coverage.skipped[0].reason == "quantised already"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(bad):
    weight = random(K, N)
    weight[3, 4] = bad
    with pytest.raises(PassError, match=r"'fc\.weight' holds NaN or infinity"):
        quantize(linear_model(weight), scheme="W8A16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "W9A16"}, "'W9A16' is not known"),
        ({"scheme": "int4"}, "'int4' is not known"),
        ({"scheme": "W4A9"}, "'W4A9' is not known"),
        ({"scheme": "W4A4", "activations": "tensor"}, "per token"),
        ({"scheme": "W4A4", "activation_clip": 1.5}, "activation_clip"),
        ({"scheme": "W4A16", "damp": -1.0}, "negative"),
        ({"config_groups": {"g": {"scheme": "W8A16"}}}, "targets"),
        ({"config_groups": {"g": {"scheme": "W8A16", "targets": "a", "bits": 3}}}, "no option 'bits'"),
        ({"scheme": "W8A8", "group_size": 32}, "group_size=32"),
        ({"scheme": "W4A16", "group_size": 100}, "power of two"),
        ({"scheme": "W4A16_ASYM", "symmetric": True}, "is asymmetric"),
        ({"algorithm": "gptq3"}, "'gptq3' is not known"),
    ],
)
def test_bad_options_are_refused_when_the_pass_is_made(options, message):
    with pytest.raises(PipelineError, match=message):
        Quantize(**options)


def test_a_bad_pattern_is_refused():
    with pytest.raises(PipelineError, match="not a regular expression"):
        quantize(two_layers(), scheme="W8A16", ignore=("re:(",))


def test_errors_are_reported():
    weight = random(K, N)
    model = linear_model(weight)
    _, ctx = quantize(model, scheme="W4A16", group_size=32)
    error = float(model.graph.node(0).metadata_props["planish.weight_error"])
    assert 0 < error < 1.5 * expected_error(4)
    assert [(remark.subject, "relative weight error" in remark.text) for remark in ctx.remarks] == [
        ("fc", True)
    ]


@pytest.mark.parametrize(("reduce_range", "limited"), [("auto", True), (True, True), (False, False)])
def test_reduce_range_keeps_pairs_exact(reduce_range, limited):
    model = linear_model(np.abs(random(K, N)))
    quantize(model, scheme="W8A8", reduce_range=reduce_range)  # the portable target may meet such a CPU
    integers = model.graph.node(0).inputs[1].const_value.numpy().astype(int)
    assert ((integers[0::2] + integers[1::2]).max() <= 128) == limited


def test_the_copy_of_a_quantised_model_is_independent():
    model = linear_model(random(K, N))
    quantize(model, scheme="W8A16")
    copy = clone(model)
    assert op_types(copy) == op_types(model)
    assert list(copy.functions) == list(model.functions)
