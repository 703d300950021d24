"""Linears with quantised activations, and convolutions, against references written from their equations."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from planish.ir import ops
from planish.ir.errors import ModelError
from planish.ir.ops.registry import DEFINITIONS

# float32 sums of 64 products: a few units in the last place of the largest term.
FLOAT32_ROUNDING = 2e-6
LEVELS = onnxruntime.GraphOptimizationLevel
K, N = 64, 6


def constant(array, name, dtype=None):
    tensor = ir.tensor(array, name=name) if dtype is None else ops.integer_tensor(array, dtype, name)
    return ir.val(name, shape=array.shape, dtype=tensor.dtype, const_value=tensor)


def optional(array, name, dtype=None):
    return None if array is None else constant(array, name, dtype)


def activations(*shape):
    return ir.val("x", shape=shape or ["batch", "sequence", K], dtype=ir.DataType.FLOAT)


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
            # Optimised, onnxruntime would quantise the activations of blocked weights once more.
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
            serialized = ir.to_proto(model).SerializeToString()
            session = onnxruntime.InferenceSession(serialized, options, ["CPUExecutionProvider"])
            yield session.run(None, {"x": x})[0]


def check(model, x, expected):
    for actual in results(model, x):
        assert np.abs(actual - expected).max() / np.abs(expected).max() < FLOAT32_ROUNDING


def on_token_grid(x, bits, clip):
    """x̂ in float64; the grid's float32 steps are part of the op's meaning."""
    levels = np.float32(2 ** (bits - 1) - 1)
    step = np.maximum(np.abs(x).max(-1, keepdims=True) * np.float32(clip) / levels, np.finfo(np.float32).tiny)
    return np.clip(np.rint(x / step), -levels - 1, levels).astype(np.float64) * step


def some_tokens(rng):
    x = rng.standard_normal((2, 7, K)).astype(np.float32)
    x[0, 3] *= 50
    x[1, 2] = 0
    return x


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("activation_bits", "clip"), [(8, 1.0), (8, 0.75), (4, 1.0), (4, 0.9), (2, 1.0)])
@pytest.mark.parametrize(("bits", "signed"), [(2, True), (4, True), (4, False), (7, True), (7, False)])
def test_narrow_activations_per_channel(bits, signed, activation_bits, clip, has_bias):
    # Weights of at most 7 bits are exact on CPUs whose int8 kernel saturates: this tests the body, not them.
    rng = np.random.default_rng(bits)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    w, scale = rng.integers(low, high, (K, N)), rng.uniform(0.5, 2, N).astype(np.float32)
    zero = None if signed else rng.integers(low, high, N)
    bias = rng.standard_normal(N).astype(np.float32) if has_bias else None
    container = ops.container(bits, signed=signed)
    value, x = activations(), some_tokens(rng)
    node, definition = ops.dynamic_quantized_linear(
        value,
        constant(w, "w", container),
        constant(scale, "scale"),
        optional(zero, "zero", ir.DataType.INT8 if container.bitwidth == 4 else container),
        optional(bias, "bias"),
        bits=bits,
        granularity="token",
        activation_bits=activation_bits,
        activation_clip=clip,
    )
    plain = container.bitwidth == 8 and activation_bits == 8 and clip == 1
    assert definition.overload == ("token" if plain else "token_narrow") + ("_bias" if has_bias else "")
    weight = (w - (0 if signed else zero)) * scale.astype(np.float64)
    expected = on_token_grid(x, activation_bits, clip) @ weight + (bias if has_bias else 0)
    model = model_of(value, node, definition)
    assert list(model.graph.outputs[0].shape) == ["batch", "sequence", N]
    check(model, x, expected)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("activation_bits", "clip"), [(8, 1.0), (4, 0.9)])
@pytest.mark.parametrize(
    ("bits", "signed", "block_size"), [(4, True, 16), (3, False, 32), (8, True, 64), (8, False, 16)]
)
def test_narrow_activations_with_blocked_weights(bits, signed, block_size, activation_bits, clip, has_bias):
    rng = np.random.default_rng(bits)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    grid = (K // block_size, N)
    w, scale = rng.integers(low, high, (K, N)), rng.uniform(0.5, 2, grid).astype(np.float32)
    zero = None if signed else rng.integers(low, high, grid)
    bias = rng.standard_normal(N).astype(np.float32) if has_bias else None
    container = ops.container(bits, signed=signed)
    value, x = activations(), some_tokens(rng)
    node, definition = ops.dynamic_quantized_linear(
        value,
        constant(w, "w", container),
        constant(scale, "scale"),
        optional(zero, "zero", container),
        optional(bias, "bias"),
        bits=bits,
        granularity="token",
        activation_bits=activation_bits,
        activation_clip=clip,
        block_size=block_size,
    )
    assert definition.overload == "token_block" + ("_bias" if has_bias else "")
    centred = w - (0 if signed else np.repeat(zero, block_size, axis=0))
    weight = centred * np.repeat(scale, block_size, axis=0).astype(np.float64)
    expected = on_token_grid(x, activation_bits, clip) @ weight + (bias if has_bias else 0)
    check(model_of(value, node, definition), x, expected)


def test_the_default_stays_the_whole_tensors_grid():
    w, scale = constant(np.ones((K, N), np.int8), "w"), constant(np.ones(N, np.float32), "s")
    node, definition = ops.dynamic_quantized_linear(activations(), w, scale)
    assert definition.overload == "tensor"
    assert {name: attribute.value for name, attribute in node.attributes.items()} == {"bits": 8}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"granularity": "tensor", "activation_bits": 4}, "use granularity"),
        ({"granularity": "tensor", "activation_clip": 0.9}, "use granularity"),
        ({"granularity": "tensor", "block_size": 16}, "use granularity"),
        ({"granularity": "token", "activation_bits": 9}, "2 to 8 bits"),
        ({"granularity": "token", "activation_bits": 1}, "2 to 8 bits"),
        ({"granularity": "token", "activation_clip": 1.5}, r"a clip in \(0, 1\]"),
        ({"granularity": "token", "activation_clip": 0.0}, r"a clip in \(0, 1\]"),
    ],
)
def test_combinations_that_no_overload_has_are_refused(change, message):
    w, scale = constant(np.ones((K, N), np.int8), "w"), constant(np.ones((4, N), np.float32), "s")
    with pytest.raises(ModelError) as caught:
        ops.dynamic_quantized_linear(activations(), w, scale, **change)
    assert caught.match(message) or message in (caught.value.hint or "")


def test_four_bit_weights_need_a_grid_per_token():
    w = constant(np.ones((K, N), int), "w", ir.DataType.INT4)
    with pytest.raises(ModelError, match="8-bit weights per channel"):
        ops.dynamic_quantized_linear(activations(), w, constant(np.ones(N, np.float32), "s"), bits=4)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("grid", [np.uint8, np.int8])
@pytest.mark.parametrize(("bits", "signed"), [(7, True), (7, False), (4, True), (4, False)])
def test_static_activations(bits, signed, grid, has_bias):
    rng = np.random.default_rng(bits)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    w, scale = rng.integers(low, high, (K, N)), rng.uniform(0.5, 2, N).astype(np.float32)
    zero = None if signed else rng.integers(low, high, N)
    bias = rng.standard_normal(N).astype(np.float32) if has_bias else None
    container = ops.container(bits, signed=signed)
    value, x = activations(), some_tokens(rng)
    x_scale, x_zero = np.float32(0.02), grid(110 if grid is np.uint8 else -18)
    node, definition = ops.static_quantized_linear(
        value,
        constant(w, "w", container),
        constant(scale, "scale"),
        constant(np.array(x_scale), "x_scale"),
        constant(np.array(x_zero), "x_zero"),
        optional(zero, "zero", container),
        optional(bias, "bias"),
        bits=bits,
    )
    limits = np.iinfo(grid)
    integers = np.clip(np.rint(x / x_scale) + int(x_zero), limits.min, limits.max) - int(x_zero)
    assert (integers == limits.max - int(x_zero)).any(), "some activations must saturate"
    weight = (w - (0 if signed else zero)) * scale.astype(np.float64)
    expected = integers.astype(np.float64) * x_scale @ weight + (bias if has_bias else 0)
    assert ops.operand(node, "x_scale").name == "x_scale"
    check(model_of(value, node, definition), x, expected)


CONVOLUTIONS = [
    {"strides": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 1], "group": 1},
    {"strides": [2, 1], "pads": [1, 0, 1, 0], "dilations": [1, 2], "group": 1},
    {"strides": [1, 1], "pads": [1, 1, 1, 1], "dilations": [1, 1], "group": 4},
]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("form", CONVOLUTIONS, ids=["plain", "strided and dilated", "grouped"])
@pytest.mark.parametrize(("bits", "signed"), [(8, True), (4, True), (4, False)])
def test_convolutions(bits, signed, form, has_bias):
    rng = np.random.default_rng(bits)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    w = rng.integers(low, high, (8, 4 // form["group"], 3, 3))
    scale = rng.uniform(0.5, 2, 8).astype(np.float32)
    zero = None if signed else rng.integers(low, high, 8)
    bias = rng.standard_normal(8).astype(np.float32) if has_bias else None
    x = rng.standard_normal((2, 4, 9, 7)).astype(np.float32)
    container, value = ops.container(bits, signed=signed), activations("batch", 4, 9, 7)
    node, definition = ops.quantized_conv(
        value,
        constant(w, "w", container),
        constant(scale, "scale"),
        optional(zero, "zero", container),
        optional(bias, "bias"),
        bits=bits,
        **form,
    )
    node.outputs[0].shape = ir.Shape(["batch", 8, "height", "width"])
    rows = slice(None), None, None, None
    weight = (w - (0 if signed else zero[rows])) * scale[rows].astype(np.float64)
    pads = form["pads"]
    expected = torch.nn.functional.conv2d(
        torch.nn.functional.pad(torch.tensor(x.astype(np.float64)), (pads[1], pads[3], pads[0], pads[2])),
        torch.tensor(weight),
        None if bias is None else torch.tensor(bias.astype(np.float64)),
        stride=form["strides"],
        dilation=form["dilations"],
        groups=form["group"],
    ).numpy()
    check(model_of(value, node, definition), x, expected)


def test_every_overload_has_its_own_identifier_and_parses():
    linears = [definition for definition in DEFINITIONS.values() if definition.op_type in ops.LINEAR_OPS]
    assert {definition.inputs[:3] for definition in linears} == {("X", "W", "scale")}
    for definition, version in itertools.product(DEFINITIONS.values(), (23, 25)):
        function = definition.function(version)
        assert function.identifier() == definition.identifier
        assert tuple(value.name for value in function.inputs) == definition.inputs
