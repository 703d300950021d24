"""The bodies of the planish ops against float64 references written from their equations."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.ir import ops
from planish.ir.errors import ModelError


def constant(array, name, dtype=None):
    tensor = ir.tensor(array, name=name) if dtype is None else ops.integer_tensor(array, dtype, name)
    return ir.Value(
        name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype)
    )


def model_of(build, x_shape, x_dtype=ir.DataType.FLOAT, opset=23):
    """A model of the one op that ``build(x)`` makes; every other input that is constant is an initializer."""
    x = ir.Value(name="x", shape=ir.Shape(x_shape), type=ir.TensorType(x_dtype))
    node, definition = build(x)
    initializers = [value for value in node.inputs if value is not None and value.const_value is not None]
    node.outputs[0].name = "y"
    graph = ir.Graph(
        [x], list(node.outputs), nodes=[node], initializers=initializers, opset_imports={"": opset}, name="g"
    )
    model = ir.Model(graph, ir_version=11)
    ops.define(model, definition)
    return model


def run(model, x):
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    # The bodies as they are written: optimised, onnxruntime quantises the activations of a QuantizedLinear.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def dequantised(w, scale, zero_point, block_size):
    w = w.astype(np.float64)
    if block_size:
        scale = np.repeat(scale, block_size, axis=0)
        zero_point = None if zero_point is None else np.repeat(zero_point, block_size, axis=0)
    return (w - (0 if zero_point is None else zero_point.astype(np.float64))) * scale.astype(np.float64)


def relative(actual, expected):
    return np.abs(actual - expected).max() / np.abs(expected).max()


# float32 sums of 64 products: a few units in the last place of the largest term.
FLOAT32_ROUNDING = 2e-6


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("block_size", [0, 16])
@pytest.mark.parametrize(("bits", "signed"), [(b, s) for b in range(2, 9) for s in (True, False)])
def test_quantized_linear_is_dequantise_then_matmul(bits, signed, block_size, bias):
    rng = np.random.default_rng(bits)
    k, n = 64, 6
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    dtype = ops.container(bits, signed=signed)
    w = rng.integers(low, high, (k, n))
    grid_shape = (k // block_size, n) if block_size else (n,)
    scale = rng.uniform(0.5, 2, grid_shape).astype(np.float32)
    zero_point = None if signed else rng.integers(low, high, grid_shape)
    b = rng.standard_normal(n).astype(np.float32) if bias else None
    x = rng.standard_normal((2, 3, k)).astype(np.float32)

    def build(value):
        return ops.quantized_linear(
            value,
            constant(w, "w", dtype),
            constant(scale, "scale"),
            None if zero_point is None else constant(zero_point, "zero_point", dtype),
            constant(b, "bias") if bias else None,
            bits=bits,
            block_size=block_size,
        )

    expected = x.astype(np.float64) @ dequantised(w, scale, zero_point, block_size) + (b if bias else 0)
    model = model_of(build, ["batch", "sequence", k])
    assert list(model.graph.outputs[0].shape) == ["batch", "sequence", n]
    assert relative(run(model, x), expected) < FLOAT32_ROUNDING
    assert ops.inline(model) == 1
    assert {node.domain for node in model.graph} == {""}
    assert ops.DOMAIN not in model.opset_imports
    assert not model.functions
    assert relative(run(model, x), expected) < FLOAT32_ROUNDING


def test_quantized_linear_in_float16():
    rng = np.random.default_rng(0)
    w = rng.integers(-8, 8, (32, 4))
    scale = rng.uniform(0.5, 2, (2, 4)).astype(np.float16)
    x = rng.standard_normal((5, 32)).astype(np.float16)
    model = model_of(
        lambda value: ops.quantized_linear(
            value, constant(w, "w", ir.DataType.INT4), constant(scale, "scale"), bits=4, block_size=16
        ),
        ["rows", 32],
        ir.DataType.FLOAT16,
    )
    expected = x.astype(np.float64) @ dequantised(w, scale, None, 16)
    # Weights, products and the result are rounded to 11 bits; 32 of them add up.
    assert relative(run(model, x), expected) < 32 * 2**-11


def dynamic_reference(x, w, scale, zero_point, granularity):
    """Integer arithmetic in int64; the float32 steps of the grid are part of the op's meaning."""
    if granularity == "tensor":
        low, high = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
        x_scale = np.float32((high - low) / np.float32(255))
        x_zero = np.clip(np.rint((0 - low) / x_scale), 0, 255)
        quantised = np.clip(np.rint(x / x_scale) + x_zero, 0, 255).astype(np.int64) - int(x_zero)
    else:
        x_scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
        x_scale = np.maximum(x_scale, np.finfo(np.float32).tiny)
        quantised = np.rint(x / x_scale).astype(np.int64)
    w = w.astype(np.int64) - (0 if zero_point is None else zero_point.astype(np.int64))
    return (quantised @ w) * x_scale.astype(np.float64) * scale.astype(np.float64)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "token"])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_dynamic_quantized_linear_is_an_integer_product(granularity, bias, asymmetric):
    rng = np.random.default_rng(1)
    # |w| ≤ 64 keeps the product exact on CPUs whose int8 kernel saturates: this tests the body, not them.
    w = rng.integers(-64, 65, (48, 5)) + (100 if asymmetric else 0)
    dtype = ir.DataType.UINT8 if asymmetric else ir.DataType.INT8
    zero_point = rng.integers(90, 110, 5) if asymmetric else None
    scale = rng.uniform(0.5, 2, 5).astype(np.float32)
    b = rng.standard_normal(5).astype(np.float32) if bias else None
    x = rng.standard_normal((2, 7, 48)).astype(np.float32)
    x[0, 3] *= 50
    x[1, 2] = 0

    def build(value):
        return ops.dynamic_quantized_linear(
            value,
            constant(w, "w", dtype),
            constant(scale, "scale"),
            constant(zero_point, "zero_point", dtype) if asymmetric else None,
            constant(b, "bias") if bias else None,
            granularity=granularity,
        )

    expected = dynamic_reference(x, w, scale, zero_point, granularity) + (b if bias else 0)
    model = model_of(build, ["batch", "sequence", 48])
    assert relative(run(model, x), expected) < FLOAT32_ROUNDING
    ops.inline(model)
    assert relative(run(model, x), expected) < FLOAT32_ROUNDING


def test_token_granularity_does_not_see_other_tokens():
    rng = np.random.default_rng(2)
    w, scale = rng.integers(-64, 65, (32, 4)), np.ones(4, np.float32)
    x = rng.standard_normal((6, 32)).astype(np.float32)

    def result(granularity, rows):
        model = model_of(
            lambda value: ops.dynamic_quantized_linear(
                value, constant(w, "w", ir.DataType.INT8), constant(scale, "s"), granularity=granularity
            ),
            ["rows", 32],
        )
        return run(model, rows)

    outlier = np.concatenate([x, 100 * x[:1]])
    np.testing.assert_array_equal(result("token", outlier)[:6], result("token", x))
    assert np.abs(result("tensor", outlier)[:6] - result("tensor", x)).max() > 1


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_quantized_gather_by_row(dtype):
    rng = np.random.default_rng(3)
    table, scale = rng.integers(-127, 128, (20, 12)), rng.uniform(0.1, 1, (20, 1)).astype(dtype)
    ids = np.array([[0, 19, -1], [7, 7, 3]], np.int64)
    model = model_of(
        lambda value: ops.quantized_gather(
            value, constant(table, "table", ir.DataType.INT8), constant(scale, "scale"), bits=8
        ),
        ["batch", "sequence"],
        ir.DataType.INT64,
    )
    expected = (table.astype(dtype) * scale)[ids]
    np.testing.assert_array_equal(run(model, ids), expected)
    assert list(model.graph.outputs[0].shape) == ["batch", "sequence", 12]


@pytest.mark.parametrize("signed", [True, False])
def test_quantized_gather_in_blocks(signed):
    rng = np.random.default_rng(4)
    dtype = ops.container(4, signed=signed)
    table = rng.integers(-8, 8, (10, 32)) + (0 if signed else 8)
    scale = rng.uniform(0.1, 1, (10, 2)).astype(np.float32)
    zero_point = None if signed else rng.integers(0, 16, (10, 2))
    model = model_of(
        lambda value: ops.quantized_gather(
            value,
            constant(table, "table", dtype),
            constant(scale, "scale"),
            None if signed else constant(zero_point, "zero_point", dtype),
            bits=4,
            block_size=16,
        ),
        ["rows"],
        ir.DataType.INT64,
    )
    shift = 0 if signed else np.repeat(zero_point, 16, axis=1)
    expected = (table - shift) * np.repeat(scale, 16, axis=1)
    ids = np.array([9, 0, 4], np.int64)
    assert relative(run(model, ids), expected[ids]) < FLOAT32_ROUNDING


def test_a_row_table_takes_no_zero_point():
    table, scale = np.zeros((2, 4), np.int8), np.ones((2, 1), np.float32)
    ids = ir.Value(name="x", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    with pytest.raises(ModelError, match="zero point needs blocks"):
        ops.quantized_gather(ids, constant(table, "t"), constant(scale, "s"), constant(table, "z"), bits=8)


def per_channel(x):
    w, scale = np.zeros((4, 4), np.int8), np.ones(4, np.float32)
    return ops.quantized_linear(x, constant(w, "w"), constant(scale, "s"), bits=8)


def test_an_old_opset_is_refused():
    with pytest.raises(ModelError, match="needs opset 23, the model has 21"):
        model_of(per_channel, [2, 4], opset=21)


def test_define_adds_each_overload_once_and_survives_serialisation():
    w, scale, b = np.zeros((4, 4), np.int8), np.ones(4, np.float32), np.ones(4, np.float32)
    model = model_of(per_channel, [2, 4])
    _, with_bias = ops.quantized_linear(
        model.graph.inputs[0], constant(w, "w2"), constant(scale, "s2"), None, constant(b, "b"), bits=8
    )
    for _ in range(2):
        ops.define(model, with_bias)
    again = ir.from_proto(ir.to_proto(model))
    assert sorted(again.functions) == [
        ("planish", "QuantizedLinear", ""),
        ("planish", "QuantizedLinear", "bias"),
    ]
    assert again.opset_imports["planish"] == 1


def test_inline_leaves_other_functions_alone():
    model = model_of(per_channel, [2, 4])
    other = ir.serde.deserialize_function(
        onnx.parser.parse_function(
            '<domain: "other", opset_import: ["" : 23]> Twice (x) => (y) { y = Add (x, x) }'
        )
    )
    model.functions[other.identifier()] = other
    twice = ir.node("Twice", [model.graph.outputs[0]], domain="other")
    twice.outputs[0].name = "z"
    model.graph.append(twice)
    model.graph.outputs[0] = twice.outputs[0]
    model.opset_imports["other"] = 1
    assert ops.inline(model) == 1
    assert [node.op_type for node in model.graph][-1] == "Twice"
    assert list(model.functions) == [other.identifier()]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), bits=st.integers(2, 8), signed=st.booleans())
def test_integers_survive_their_container(data, bits, signed):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    shape = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 7)))
    flat = data.draw(
        st.lists(st.integers(low, high), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])
    )
    values = np.array(flat).reshape(shape)
    tensor = ops.integer_tensor(values, ops.container(bits, signed=signed), "w")
    np.testing.assert_array_equal(ops.integer_values(tensor), values)
    assert ops.zeros_of(tensor) == np.sum(values == 0)
    assert ops.zeros_of(ops.integer_tensor(np.asfortranarray(values), tensor.dtype, "w")) == np.sum(
        values == 0
    )
    assert tensor.nbytes == (values.size + 1) // 2 if bits <= 4 else values.size


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64])
def test_many_integers_are_packed_a_few_at_a_time(dtype):
    values = np.random.default_rng(0).integers(0, 8, 300_001).astype(dtype)
    tensor = ops.integer_tensor(values, ir.DataType.UINT4, "w")
    np.testing.assert_array_equal(ops.integer_values(tensor), values)
    assert ops.zeros_of(tensor) == np.sum(values == 0)


@pytest.mark.parametrize("bits", [1, 9])
def test_widths_without_container_are_refused(bits):
    with pytest.raises(ValueError, match="expected 2 to 8"):
        ops.container(bits, signed=True)
