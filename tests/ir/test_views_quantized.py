"""Linears and convolutions in their quantised forms, as the views see them."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from planish.ir import ops
from planish.ir.views import convolutions, linears

K, N = 32, 4


def constant(name, *shape, dtype=np.float32):
    array = np.ones(shape, dtype)
    return ir.val(name, shape=shape, dtype=ir.DataType.from_numpy(array.dtype), const_value=ir.tensor(array))


def model_of(x, node, definition=None):
    initializers = [value for value in node.inputs if value is not None and value.const_value is not None]
    graph = ir.Graph(
        [x], node.outputs, nodes=[node], initializers=initializers, opset_imports={"": 23}, name="g"
    )
    model = ir.Model(graph, ir_version=11)
    if definition is not None:
        ops.define(model, definition)
    return model


def linear_forms(x, weight, scale, bias):
    """Every quantised form of one layer, by name."""
    per_channel = constant("scale", N)
    codebook = constant("codebook", 16)
    levels = [constant(f"level{i}", K // 16, 1, dtype=np.float16) for i in range(4)]
    outliers = ops.Outliers(constant("gaps", 3, dtype=np.uint16), constant("values", 3, dtype=np.float16))
    zero = constant("zero", K // 16, N, dtype=np.uint8)
    blocked = {"bits": 3, "block_size": 16}
    return {
        "plain": ops.quantized_linear(x, weight, scale, None, bias, **blocked),
        "outliers": ops.quantized_linear(x, weight, scale, None, bias, outliers=outliers, **blocked),
        "codebook": ops.quantized_linear(x, weight, scale, None, bias, codebook=codebook, **blocked),
        "bilevel": ops.quantized_linear(
            x, weight, scale, zero, bias, second_level=ops.SecondLevel(*levels), outliers=outliers, **blocked
        ),
        "tensor": ops.dynamic_quantized_linear(x, weight, per_channel, None, bias, bits=3),
        "narrow": ops.dynamic_quantized_linear(
            x, weight, per_channel, None, bias, bits=3, granularity="token", activation_bits=4
        ),
        "block": ops.dynamic_quantized_linear(x, weight, scale, None, bias, granularity="token", **blocked),
        "static": ops.static_quantized_linear(
            x, weight, per_channel, constant("xs"), constant("xz", dtype=np.uint8), None, bias, bits=3
        ),
    }


FORMS = ("plain", "outliers", "codebook", "bilevel", "tensor", "narrow", "block", "static")


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_quantised_form_is_a_linear(form, has_bias):
    x = ir.val("x", shape=["rows", K], dtype=ir.DataType.FLOAT)
    weight = constant("blocks.0.fc.weight_quantized", K, N, dtype=np.uint8)
    bias = constant("blocks.0.fc.bias", N) if has_bias else None
    node, definition = linear_forms(x, weight, constant("scale", K // 16, N), bias)[form]
    (linear,) = linears(model_of(x, node, definition))
    assert (linear.name, linear.in_features, linear.out_features) == ("blocks.0.fc", K, N)
    assert (linear.input, linear.weight, linear.bias) == (x, weight, bias)
    assert linear.bias_node is (node if has_bias else None)
    assert linear.is_quantized
    assert linear.bits == 3


def test_a_float_linear_has_no_bits():
    x = ir.val("x", shape=["rows", K], dtype=ir.DataType.FLOAT)
    node = ir.node("MatMul", [x, constant("fc.weight", K, N)])
    (linear,) = linears(model_of(x, node))
    assert (linear.name, linear.is_quantized, linear.bits) == ("fc", False, None)


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("fc.weight_quantized_2", "fc"),
        ("fc.weight_scale", "fc.weight_scale"),
        ("weight.fc", "weight.fc"),
    ],
)
def test_the_name_is_the_modules_path(stored, name):
    x = ir.val("x", shape=["rows", K], dtype=ir.DataType.FLOAT)
    node, definition = ops.quantized_linear(
        x, constant(stored, K, N, dtype=np.int8), constant("s", N), bits=8
    )
    assert linears(model_of(x, node, definition))[0].name == name


def test_another_op_of_the_domain_is_no_linear():
    x = ir.val("x", shape=["rows", K], dtype=ir.DataType.FLOAT)
    node = ir.node("HadamardTransform", [x, constant("weight", K, N)], domain=ops.DOMAIN)
    assert linears(model_of(x, node)) == []


def convolution(text, bias="b"):
    """A model ``y = Conv(x, weight, bias)``; ``c`` is a bias that is no constant."""
    proto = onnx.parser.parse_model(
        '<ir_version: 11, opset_import: ["" : 23]>'
        "g (float[n, 4, h, w] x, float[8] c) => (float[n, 8, h, w] y)"
        f"{{ y = Conv <{text}> (x, weight, {bias}) }}"
    )
    tensors = {"weight": np.ones((8, 2, 3, 3), np.float32), "b": np.ones(8, np.float32)}
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()
    )
    model = ir.from_proto(proto)
    model.graph.initializers["weight"].name = "conv.weight"
    return model


@pytest.mark.parametrize(
    ("text", "pads", "strides", "dilations"),
    [
        ("group = 2", (0, 0, 0, 0), (1, 1), (1, 1)),
        ("group = 2, pads = [1, 0, 1, 2], strides = [2, 1]", (1, 0, 1, 2), (2, 1), (1, 1)),
        ('group = 2, auto_pad = "VALID", dilations = [1, 2]', (0, 0, 0, 0), (1, 1), (1, 2)),
        ('group = 2, auto_pad = "SAME_UPPER"', None, (1, 1), (1, 1)),
    ],
)
def test_convolutions(text, pads, strides, dilations):
    model = convolution(text)
    (found,) = convolutions(model)
    assert (found.name, found.groups, found.is_quantized, found.bits) == ("conv", 2, False, None)
    assert (found.pads, found.strides, found.dilations) == (pads, strides, dilations)
    assert found.input is model.graph.inputs[0]
    assert (found.weight.name, found.bias.name, found.output.name) == ("conv.weight", "b", "y")


def test_a_convolution_with_a_computed_bias_is_left_out():
    assert convolutions(convolution("group = 2", bias="c")) == []


def test_a_quantised_convolution_is_a_convolution():
    form = {"bits": 8, "strides": [1, 2], "pads": [1, 1, 0, 0], "dilations": [1, 1], "group": 2}
    for bias in (None, constant("conv.bias", 8)):
        x = ir.val("x", shape=["n", 4, "h", "w"], dtype=ir.DataType.FLOAT)
        weight, scale = constant("conv.weight_quantized", 8, 2, 3, 3, dtype=np.int8), constant("s", 8)
        node, definition = ops.quantized_conv(x, weight, scale, None, bias, **form)
        (found,) = convolutions(model_of(x, node, definition))
        assert (found.name, found.groups, found.is_quantized, found.bits) == ("conv", 2, True, 8)
        assert (found.pads, found.strides, found.bias) == ((1, 1, 0, 0), (1, 2), bias)
