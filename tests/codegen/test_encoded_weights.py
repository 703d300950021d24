"""onnxruntime-cpu: code books, float8, bilevel scales, outliers and convolutions, bound and run."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from planish.codegen import get_target, microbenchmark
from planish.codegen.onnxruntime_cpu import kernel as kernel_module
from planish.codegen.onnxruntime_cpu.encoded_linear import ENCODED_BODY, ENCODED_KERNELS, NF4, encoded_op
from planish.codegen.onnxruntime_cpu.float_weights import CONV_KERNEL, FLOAT_KERNEL, FOLD_AT_LOAD
from planish.ir import ops
from planish.ir.errors import TargetError

K, N = 64, 12
# float32 sums of 64 products: a few units in the last place of the largest term.
FLOAT32_ROUNDING = 2e-6
FLOAT16_ROUNDING = 2**-9  # the weights, the product and the sum with the bias are each rounded to 11 bits
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
BNB4 = ENCODED_KERNELS[0]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANISH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(microbenchmark, "_SECONDS_PER_CANDIDATE", 0.0)
    monkeypatch.setattr(microbenchmark, "_FEWEST_ROUNDS", 1)


def constant(array, name, dtype=None):
    tensor = ir.tensor(array, name=name) if dtype is None else ops.integer_tensor(array, dtype, name)
    return ir.val(name, shape=array.shape, dtype=tensor.dtype, const_value=tensor)


def model_of(x, node, definition):
    initializers = [value for value in node.inputs if value is not None and value.const_value is not None]
    node.outputs[0].name, node.name = "y", "layer"
    graph = ir.Graph(
        [x], node.outputs, nodes=[node], initializers=initializers, opset_imports={"": 23}, name="g"
    )
    model = ir.Model(graph, ir_version=11)
    ops.define(model, definition)
    return model


def by_row(blocks, block_size):
    blocks = np.atleast_2d(blocks).astype(np.float64)
    return np.repeat(blocks, block_size, axis=0) if block_size else blocks


def layer(form, has_bias=True, block_size=16, dtype=np.float32, rank=3):
    """A model of one layer of this form, and its weight in float64."""
    rng = np.random.default_rng(0)
    grid = (K // block_size, N) if block_size else (N,)
    scale = rng.uniform(0.5, 2, grid).astype(np.float32)
    w = rng.integers(0, 16, (K, N))
    positions, values = np.array([5, 40, K * N - 1]), np.array([20, -30, 7.5], np.float16)
    outliers = ops.Outliers(constant(ops.outlier_gaps(positions), "gaps"), constant(values, "values"))
    arguments = {"bits": 4, "block_size": block_size}
    weight, zero = constant(w, "w", ir.DataType.UINT4), None
    scales = constant(scale.astype(dtype) if form in ("float8", "outliers") else scale, "scale")
    if form in ("nf4", "fp4"):
        codebook = NF4 if form == "nf4" else FP4
        arguments["codebook"] = constant(codebook, "codebook")
        expected = codebook.astype(np.float64)[w] * by_row(scale, block_size)
    elif form == "mxfp4":
        exponents = rng.integers(120, 131, grid).astype(np.uint8)
        scales = constant(exponents, "scale")
        arguments["codebook"] = constant(FP4, "codebook")
        expected = FP4.astype(np.float64)[w] * by_row(2.0 ** (exponents.astype(int) - 127), block_size)
    elif form == "float8":
        stored = rng.standard_normal((K, N)).astype(ml_dtypes.float8_e4m3fn)
        weight, arguments["bits"] = constant(stored, "w"), 8
        expected = stored.astype(np.float64) * by_row(scale.astype(dtype), block_size)
    elif form == "outliers":
        zero, arguments["outliers"] = (
            constant(w[: len(np.atleast_2d(scale))], "z", ir.DataType.UINT4),
            outliers,
        )
        expected = (w - by_row(w[: K // block_size], block_size)) * by_row(scale.astype(dtype), block_size)
    elif form.startswith("bilevel"):
        scales = constant(w[: K // block_size], "scale", ir.DataType.UINT4)
        zero = constant(w[-(K // block_size) :], "zero", ir.DataType.UINT4)
        levels = [rng.uniform(0.2, 1.5, (K // block_size, 2)).astype(np.float16) for _ in range(4)]
        second = [constant(level, f"level{index}") for index, level in enumerate(levels)]
        arguments["second_level"] = ops.SecondLevel(*second, 6)
        columns = [np.repeat(level.astype(np.float64), 6, axis=1) for level in levels]
        s = (w[: K // block_size] - columns[1]) * columns[0]
        z = (w[-(K // block_size) :] - columns[3]) * columns[2]
        expected = (w - by_row(z, block_size)) * by_row(s, block_size)
        if form == "bilevel outliers":
            arguments["outliers"] = outliers
    if "outliers" in arguments:
        expected.reshape(-1)[positions] = values
    x = ir.val("x", shape=["b", "s", K][-rank:], dtype=ir.DataType.from_numpy(np.dtype(dtype)))
    bias = constant(np.linspace(-1, 1, N).astype(dtype), "bias") if has_bias else None
    model = model_of(x, *ops.quantized_linear(x, weight, scales, zero, bias, **arguments))
    return model, expected, 0 if bias is None else bias.const_value.numpy().astype(np.float64)


FORMS = ("nf4", "fp4", "mxfp4", "float8", "outliers", "bilevel", "bilevel outliers")


def session_options(bound):
    options = onnxruntime.SessionOptions()
    for key, value in bound.session_options.items():
        options.add_session_config_entry(key, value)
    return options


def run(model, x, options=None):
    options = options or onnxruntime.SessionOptions()
    serialized = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(serialized, options, ["CPUExecutionProvider"]).run(None, {"x": x})[0]


def relative(actual, expected):
    return float(np.linalg.norm(actual.astype(np.float64) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_kernels_compute_the_op(form, has_bias):
    model, weight, bias = layer(form, has_bias)
    op = encoded_op(model.graph.node(0)).timed()
    x = np.random.default_rng(1).standard_normal((1, 5, K)).astype(np.float32)
    kernels = [*(kernel for kernel in ENCODED_KERNELS if kernel.applies(op)), ENCODED_BODY]
    assert {kernel.name for kernel in kernels} == {FLOAT_KERNEL, "body"} | (
        {BNB4.name} if form == "nf4" else set()
    )
    for kernel in kernels:
        actual = run(kernel_module._candidate(op, kernel).model, x)
        assert relative(actual, x.astype(np.float64) @ weight + bias) < FLOAT32_ROUNDING, kernel.name


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_bound_and_portable_models_dequantise_at_load(form, rank, tmp_path):
    """Nothing but the product is left at run time; seen in the profile of a run."""
    model, weight, bias = layer(form, rank=rank)
    before = ir.to_proto(model).SerializeToString()
    x = np.random.default_rng(2).standard_normal((2, 3, K)[-rank:]).astype(np.float32)
    for target in ("onnxruntime-cpu", "portable"):
        bound = get_target(target).bind(model)
        dequantizes = form in ("float8", "outliers")
        assert dict(bound.session_options) == (FOLD_AT_LOAD if dequantizes and target != "portable" else {})
        (binding,) = bound.bindings
        options = session_options(bound)
        options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
        session = onnxruntime.InferenceSession(
            ir.to_proto(bound.model).SerializeToString(), options, ["CPUExecutionProvider"]
        )
        actual = session.run(None, {"x": x})[0]
        assert relative(actual, x.astype(np.float64) @ weight + bias) < FLOAT32_ROUNDING
        events = json.loads((tmp_path / session.end_profiling()).read_text())
        executed = {event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time")}
        at_every_run = dequantizes and target == "portable"
        assert ("DequantizeLinear" in executed) == at_every_run
        assert at_every_run or executed <= {"MatMul", "Gemm", "Add", "MatMulBnb4"}
        assert binding.kernel in (("body",) if target == "portable" else (FLOAT_KERNEL, BNB4.name))
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("form", ["fp4", "float8", "bilevel outliers", "outliers"])
def test_float16(form):
    model, weight, bias = layer(form, dtype=np.float16)
    x = np.random.default_rng(3).standard_normal((2, 3, K)).astype(np.float16)
    actual = run(get_target("onnxruntime-cpu").bind(model).model, x)
    assert actual.dtype == np.float16
    assert relative(actual, x.astype(np.float64) @ weight + bias) < FLOAT16_ROUNDING


@pytest.mark.parametrize("block_size", [0, 8, 48])
def test_bnb4_needs_blocks_that_it_knows(block_size):
    assert not BNB4.applies(op_with(NF4, block_size))


def op_with(codebook, block_size=16, rows=96):
    x = ir.val("x", shape=["rows", rows], dtype=ir.DataType.FLOAT)
    w = constant(np.zeros((rows, N), int), "w", ir.DataType.UINT4)
    scale = constant(np.ones((rows // block_size, N) if block_size else N, np.float32), "s")
    node, _ = ops.quantized_linear(
        x, w, scale, bits=4, block_size=block_size, codebook=constant(codebook, "codebook")
    )
    return encoded_op(node)


def test_bnb4_needs_its_own_table_to_the_bit():
    assert BNB4.applies(op_with(NF4))
    nearly = NF4.copy()
    nearly[3] = np.nextafter(nearly[3], np.float32(0))
    assert not BNB4.applies(op_with(nearly))
    assert op_with(nearly).spec != op_with(NF4).spec


def test_the_kernels_table_is_the_code_book():
    """Each entry as the kernel multiplies it: the identity times one column for each index."""
    x = ir.val("x", shape=["rows", 16], dtype=ir.DataType.FLOAT)
    indices = np.repeat(np.arange(16)[None, :], 16, axis=0)
    node, _ = ops.quantized_linear(
        x,
        constant(indices, "w", ir.DataType.UINT4),
        constant(np.ones((1, 16), np.float32), "s"),
        bits=4,
        block_size=16,
        codebook=constant(NF4, "codebook"),
    )
    op = encoded_op(node)
    table = run(kernel_module._candidate(op, BNB4).model, np.eye(16, dtype=np.float32))
    np.testing.assert_array_equal(table, np.tile(NF4, (16, 1)))


def test_bnb4_packs_the_same_indices():
    model, _, _ = layer("nf4")
    build = kernel_module.GraphBuilder("layer")
    BNB4.emit(build, encoded_op(model.graph.node(0)))
    packed, scales = (value.const_value.numpy() for value in build.initializers)
    indices = np.empty(2 * packed.size, np.uint8)
    indices[0::2], indices[1::2] = packed // 16, packed % 16
    stored = ops.integer_values(model.graph.initializers["w"].const_value)
    np.testing.assert_array_equal(indices.reshape(N, K).T, stored)
    np.testing.assert_array_equal(
        scales.reshape(N, K // 16).T, model.graph.initializers["scale"].const_value.numpy()
    )


def test_an_unknown_dtype_of_the_activations_is_an_error():
    model, _, _ = layer("float8")
    model.graph.inputs[0].type = None
    with pytest.raises(TargetError, match="'layer'"):
        get_target("onnxruntime-cpu").bind(model)


def convolution(bits, signed, has_bias, dtype=np.float32):
    rng = np.random.default_rng(bits)
    w = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), (8, 2, 3, 3)) + (0 if signed else 1 << (bits - 1))
    container = ops.container(bits, signed=signed)
    zero = None if signed else constant(rng.integers(0, 1 << bits, 8), "zero", container)
    bias = constant(rng.standard_normal(8).astype(dtype), "bias") if has_bias else None
    x = ir.val("x", shape=["n", 4, "h", "w"], dtype=ir.DataType.from_numpy(np.dtype(dtype)))
    node, definition = ops.quantized_conv(
        x,
        constant(w, "weight", container),
        constant(rng.uniform(0.5, 2, 8).astype(dtype), "scale"),
        zero,
        bias,
        bits=bits,
        strides=[2, 1],
        pads=[1, 0, 1, 1],
        dilations=[1, 2],
        group=2,
    )
    node.outputs[0].shape = ir.Shape(["n", 8, "oh", "ow"])
    return model_of(x, node, definition)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("bits", "signed"), [(8, True), (8, False), (4, True), (4, False)])
def test_convolutions_dequantise_at_load(bits, signed, has_bias, tmp_path):
    model = convolution(bits, signed, has_bias)
    x = np.random.default_rng(4).standard_normal((2, 4, 9, 7)).astype(np.float32)
    as_written = onnxruntime.SessionOptions()
    as_written.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    expected = run(model, x, as_written)
    bound = get_target("onnxruntime-cpu").bind(model)
    assert {node.domain for node in bound.model.graph} == {""}
    options = session_options(bound)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    # The same float32 steps, but Conv may add its products in another order once it is optimised.
    assert relative(run(bound.model, x, options), expected.astype(np.float64)) < FLOAT32_ROUNDING
    optimized = {node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph}
    assert not optimized & {"DequantizeLinear", "Cast", "Mul", "Sub"}
    (binding,) = bound.bindings
    assert (binding.node, binding.op) == ("layer", "planish::QuantizedConv")
    assert binding.kernel == CONV_KERNEL


def test_convolutions_in_float16():
    model = convolution(8, True, True, np.float16)
    x = np.random.default_rng(5).standard_normal((2, 4, 9, 7)).astype(np.float16)
    bound = get_target("onnxruntime-cpu").bind(model)
    actual, expected = run(bound.model, x, session_options(bound)), run(model, x)
    assert relative(actual, expected.astype(np.float64)) < FLOAT16_ROUNDING


def with_quantization_of_its_own(model):
    tensors = [ir.tensor(np.ones(3, np.int8), name="q"), ir.tensor(np.array(1, np.float32), name="s")]
    operands = [ir.val(tensor.name, const_value=tensor) for tensor in tensors]
    own = ir.node("DequantizeLinear", operands, name="own")
    own.outputs[0].name = "own"
    for value in operands:
        model.graph.register_initializer(value)
    model.graph.append(own)
    model.graph.outputs.append(own.outputs[0])
    return model


@pytest.mark.parametrize("form", ["float8", "outliers", "fp4", "convolution"])
def test_a_model_with_quantisation_of_its_own_is_not_folded(form):
    """Folding at load is a property of the whole session: it would undo the model's own QDQ nodes."""
    if form == "convolution":
        model, x = convolution(8, True, True), np.ones((2, 4, 9, 7), np.float32)
    else:
        model, x = layer(form)[0], np.ones((2, 3, K), np.float32)
    expected = run(model, x)
    bound = get_target("onnxruntime-cpu").bind(with_quantization_of_its_own(model))
    assert not bound.session_options
    assert bound.bindings[0].kernel == (FLOAT_KERNEL if form == "fp4" else "body")
    assert relative(run(bound.model, x), expected.astype(np.float64)) < FLOAT32_ROUNDING
