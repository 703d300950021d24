"""Formats of ``QuantizedLinear``: float8, code books, bilevel grids, outliers; against float64 references."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from planish.ir import ops
from planish.ir.errors import ModelError

# float32 sums of 64 products: a few units in the last place of the largest term.
FLOAT32_ROUNDING = 2e-6
# Weights, products and the result are rounded to 11 bits, and 64 of them add up.
FLOAT16_ROUNDING = 64 * 2**-11
LEVELS = onnxruntime.GraphOptimizationLevel
K, N = 64, 18


def constant(array, name, dtype=None):
    tensor = ir.tensor(array, name=name) if dtype is None else ops.integer_tensor(array, dtype, name)
    return ir.val(name, shape=array.shape, dtype=tensor.dtype, const_value=tensor)


def activations(dtype=ir.DataType.FLOAT):
    return ir.val("x", shape=["batch", "sequence", K], dtype=dtype)


def model_of(x, node, definition):
    initializers = [value for value in node.inputs if value is not None and value.const_value is not None]
    node.outputs[0].name = "y"
    graph = ir.Graph(
        [x], node.outputs, nodes=[node], initializers=initializers, opset_imports={"": 23}, name="g"
    )
    model = ir.Model(graph, ir_version=11)
    ops.define(model, definition)
    return model


def results(model, x):
    """The body as onnxruntime runs it, as written and optimised, and as the reference evaluator does."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    yield ReferenceEvaluator(proto).run(None, {"x": x})[0]
    for inlined in (False, True):
        if inlined:
            ops.inline(model)
        for level in (LEVELS.ORT_DISABLE_ALL, LEVELS.ORT_ENABLE_ALL):
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = level
            # Optimised, onnxruntime would also quantise the activations of a plain QuantizedLinear.
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
            serialized = ir.to_proto(model).SerializeToString()
            session = onnxruntime.InferenceSession(serialized, options, ["CPUExecutionProvider"])
            yield session.run(None, {"x": x})[0]


def check(model, x, weight, bias, tolerance=FLOAT32_ROUNDING):
    expected = x.astype(np.float64) @ weight + (0 if bias is None else bias.astype(np.float64))
    for actual in results(model, x):
        assert actual.dtype == x.dtype
        assert np.abs(actual.astype(np.float64) - expected).max() / np.abs(expected).max() < tolerance


def by_row(blocks, block_size):
    """[K / B, N] or [N] → [K, N] or [1, N], float64."""
    blocks = np.atleast_2d(blocks).astype(np.float64)
    return np.repeat(blocks, block_size, axis=0) if block_size else blocks


class Random:
    """Operands of a layer, alike for every test that asks in the same order."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)

    def x(self, dtype=np.float32):
        return self.rng.standard_normal((2, 3, K)).astype(dtype)

    def integers(self, bits, shape=(K, N)):
        return self.rng.integers(0, 1 << bits, shape)

    def scale(self, block_size, dtype=np.float32):
        shape = (K // block_size, N) if block_size else (N,)
        return self.rng.uniform(0.5, 2, shape).astype(dtype)

    def bias(self, has_bias, dtype=np.float32):
        return self.rng.standard_normal(N).astype(dtype) if has_bias else None


def optional(array, name):
    return None if array is None else constant(array, name)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("block_size", [0, 16, 32])
@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_float8_weights(dtype, block_size, has_bias):
    random = Random()
    w, scale, bias = random.x()[0, 0, :, None] * random.bias(True), random.scale(block_size), None
    w, bias, x = w.astype(dtype), random.bias(has_bias), random.x()
    value = activations()
    node, definition = ops.quantized_linear(
        value,
        constant(w, "w"),
        constant(scale, "scale"),
        None,
        optional(bias, "bias"),
        bits=8,
        block_size=block_size,
    )
    assert definition.overload == ("bias" if has_bias else "")
    weight = w.astype(np.float64) * by_row(scale, block_size)
    check(model_of(value, node, definition), x, weight, bias)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("block_size", [0, 16, 32])
@pytest.mark.parametrize("scales", ["float32", "float16", "float8", "exponent"])
@pytest.mark.parametrize("bits", [2, 4, 5])
def test_code_books(bits, scales, block_size, has_bias):
    random = Random(bits)
    w, x, bias = random.integers(bits), random.x(), random.bias(has_bias)
    codebook = np.sort(random.rng.standard_normal(1 << bits)).astype(np.float32)
    scale = random.scale(block_size)
    if scales == "exponent":
        scale = random.rng.integers(120, 131, scale.shape).astype(np.uint8)
        stored = 2.0 ** (scale.astype(np.float64) - 127)
    else:
        names = {"float8": ml_dtypes.float8_e4m3fn, "float16": np.float16, "float32": np.float32}
        stored = scale = scale.astype(names[scales])
    value = activations()
    node, definition = ops.quantized_linear(
        value,
        constant(w, "w", ops.container(bits, signed=False)),
        constant(scale, "scale"),
        None,
        optional(bias, "bias"),
        bits=bits,
        block_size=block_size,
        codebook=constant(codebook, "codebook"),
    )
    assert definition.overload.startswith("codebook_exponent" if scales == "exponent" else "codebook")
    assert list(node.outputs[0].shape) == ["batch", "sequence", N]
    weight = codebook.astype(np.float64)[w] * by_row(stored, block_size)
    check(model_of(value, node, definition), x, weight, bias)


def test_every_power_of_two_scale_is_exact():
    """All exponents of normal float32 numbers; what is multiplied is the code book's 1."""
    exponents = np.arange(1, 255, dtype=np.uint8)
    w = np.ones((1, len(exponents)), int)
    value = ir.val("x", shape=["rows", 1], dtype=ir.DataType.FLOAT)
    node, definition = ops.quantized_linear(
        value,
        constant(w, "w", ir.DataType.UINT4),
        constant(exponents, "scale"),
        bits=4,
        codebook=constant(np.arange(16, dtype=np.float32), "codebook"),
    )
    for actual in results(model_of(value, node, definition), np.ones((1, 1), np.float32)):
        np.testing.assert_array_equal(actual[0], np.ldexp(1.0, exponents.astype(int) - 127))


def second_level(random, block_size, second_block):
    shape = (K // block_size if block_size else 1, -(-N // second_block))
    names = ("scale_scale", "scale_zero", "zero_scale", "zero_zero")
    values = [random.rng.uniform(0.2, 1.5, shape).astype(np.float16) for _ in names]
    values[1] -= 3  # the grid of the scales starts well above 0
    return values, ops.SecondLevel(
        *(constant(array, name) for array, name in zip(values, names, strict=True)), second_block
    )


def bilevel_weight(w, scale, zero, levels, block_size, second_block):
    columns = np.arange(N) // second_block
    scale_scale, scale_zero, zero_scale, zero_zero = (
        level.astype(np.float64)[:, columns] for level in levels
    )
    scales = (scale - scale_zero) * scale_scale
    zeros = (zero - zero_zero) * zero_scale
    return (w - by_row(zeros, block_size or K)) * by_row(scales, block_size or K)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_outliers", [False, True])
@pytest.mark.parametrize(("bits", "block_size", "second_block"), [(3, 16, 16), (2, 32, 6), (8, 0, 18)])
def test_bilevel_scales(bits, block_size, second_block, has_outliers, has_bias):
    random = Random(bits)
    w, x, bias = random.integers(bits), random.x(), random.bias(has_bias)
    groups = (K // block_size if block_size else 1, N)
    scale, zero = random.integers(3, groups), random.integers(3, groups)
    levels, second = second_level(random, block_size, second_block)
    weight = bilevel_weight(w, scale, zero, levels, block_size, second_block)
    positions, values = np.array([0, 7, K * N - 1]), np.array([20, -30, 7.5], np.float16)
    if has_outliers:
        weight.reshape(-1)[positions] = values
    outliers = ops.Outliers(constant(ops.outlier_gaps(positions), "gaps"), constant(values, "values"))
    value = activations()
    node, definition = ops.quantized_linear(
        value,
        constant(w, "w", ops.container(bits, signed=False)),
        constant(scale, "scale", ir.DataType.UINT4),
        constant(zero, "zero", ir.DataType.UINT4),
        optional(bias, "bias"),
        bits=bits,
        block_size=block_size,
        second_level=second,
        outliers=outliers if has_outliers else None,
    )
    check(model_of(value, node, definition), x, weight, bias)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("block_size", [0, 16])
def test_outliers_replace_plain_weights(block_size, signed):
    random = Random(4)
    w, x, bias = random.integers(4) - (8 if signed else 0), random.x(), random.bias(True)
    scale = random.scale(block_size)
    zero = None if signed else random.integers(4, scale.shape)
    weight = (w - (0 if signed else by_row(zero, block_size))) * by_row(scale, block_size)
    positions = np.sort(random.rng.choice(K * N, 30, replace=False))
    values = random.rng.normal(0, 50, 30).astype(np.float16)
    weight.reshape(-1)[positions] = values
    dtype = ops.container(4, signed=signed)
    value = activations()
    node, definition = ops.quantized_linear(
        value,
        constant(w, "w", dtype),
        constant(scale, "scale"),
        None if signed else constant(zero, "zero", dtype),
        constant(bias, "bias"),
        bits=4,
        block_size=block_size,
        outliers=ops.Outliers(constant(ops.outlier_gaps(positions), "gaps"), constant(values, "values")),
    )
    assert definition.overload == "outliers_bias"
    check(model_of(value, node, definition), x, weight, bias)


def test_formats_in_float16():
    random = Random(5)
    w, x = random.integers(4), random.x(np.float16)
    codebook, scale = np.linspace(-1, 1, 16, dtype=np.float32), random.scale(16)
    positions, values = np.array([3, 100]), np.array([2, -2], np.float16)
    value = activations(ir.DataType.FLOAT16)
    node, definition = ops.quantized_linear(
        value,
        constant(w, "w", ir.DataType.UINT4),
        constant(scale.astype(ml_dtypes.float8_e4m3fn), "scale"),
        bits=4,
        block_size=16,
        codebook=constant(codebook, "codebook"),
        outliers=ops.Outliers(constant(ops.outlier_gaps(positions), "gaps"), constant(values, "values")),
    )
    weight = codebook.astype(np.float64)[w] * by_row(scale.astype(ml_dtypes.float8_e4m3fn), 16)
    weight.reshape(-1)[positions] = values
    check(model_of(value, node, definition), x, weight, None, FLOAT16_ROUNDING)


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(0, 1 << 20), min_size=1, max_size=50))
def test_gaps_add_up_to_the_positions(positions):
    positions = np.array(sorted(positions))
    gaps = ops.outlier_gaps(positions)
    np.testing.assert_array_equal(np.cumsum(gaps.astype(np.int64)), positions)
    assert gaps.dtype == (np.uint16 if np.diff(positions, prepend=0).max() < 65536 else np.uint32)


@pytest.mark.parametrize("positions", [[3, 3], [4, 1], [-1, 2], [[1, 2]]])
def test_gaps_need_ascending_positions(positions):
    with pytest.raises(ValueError, match="ascending"):
        ops.outlier_gaps(np.array(positions))


@pytest.mark.parametrize("operands", list(itertools.product([True, False], repeat=3)), ids=str)
def test_operands_that_no_overload_takes_together_are_refused(operands):
    has_codebook, has_zero, has_second = operands
    _, second = second_level(Random(), 16, 16)
    arguments = {
        "zero_point": constant(np.zeros((4, N), np.uint8), "z") if has_zero else None,
        "codebook": constant(np.zeros(16, np.float32), "c") if has_codebook else None,
        "second_level": second if has_second else None,
    }
    w, scale = constant(np.zeros((K, N), np.uint8), "w"), constant(np.zeros((4, N), np.uint8), "s")
    fits = (has_codebook, has_zero, has_second) in {
        (True, False, False),
        (False, True, True),
        (False, True, False),
        (False, False, False),
    }
    if fits:
        ops.quantized_linear(activations(), w, scale, bits=4, block_size=16, **arguments)
    else:
        with pytest.raises(ModelError, match=r"code book|second level"):
            ops.quantized_linear(activations(), w, scale, bits=4, block_size=16, **arguments)


def test_a_format_needs_the_dtype_of_the_activations():
    w, scale = constant(np.zeros((K, N), np.uint8), "w"), constant(np.ones(N, np.float32), "s")
    codebook = constant(np.zeros(16, np.float32), "c")
    with pytest.raises(ModelError, match="dtype of its activations"):
        ops.quantized_linear(ir.val("x"), w, scale, bits=4, codebook=codebook)


def test_operands_are_found_by_name():
    w, scale = constant(np.zeros((K, N), np.uint8), "w"), constant(np.ones(N, np.float32), "s")
    codebook, bias = constant(np.zeros(16, np.float32), "c"), constant(np.ones(N, np.float32), "b")
    node, definition = ops.quantized_linear(activations(), w, scale, None, bias, bits=4, codebook=codebook)
    assert ops.definition_of(node) is definition
    assert definition.inputs == ("X", "W", "scale", "codebook", "bias")
    assert ops.operand(node, "bias") is bias
    assert ops.operand(node, "codebook") is codebook
    assert ops.operand(node, "zero_point") is None
    assert ops.operand(ir.node("MatMul", [w, w]), "W") is None
    assert ops.definition_of(ir.node("Other", [], domain="planish")) is None
