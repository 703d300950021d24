"""Convolutions are linears of patches: one scale per output channel, any algorithm, and what is skipped."""

from __future__ import annotations

import numpy as np
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import planish
import pytest
import torch
from planish.codegen import get_target
from planish.ir import verify
from planish.ir.views import convolutions
from planish.passes.infrastructure.base import PassContext
from planish.passes.quantize import Quantize
from planish.passes.quantize.convolution_layers import ConvolutionPlan, patch_statistics
from planish.runtime.calibration import ActivationStream
from planish.runtime.reference import run_model

RNG = np.random.default_rng(0)
IMAGES = [{"x": RNG.standard_normal((2, 4, 9, 8)).astype(np.float32)} for _ in range(2)]


def make_model(attributes: str, groups: int = 1, spatial: int = 2, shape=None) -> ir.Model:
    dims = "batch, 4, " + ", ".join(["height", "width", "depth"][:spatial])
    kernel = (3, 2, 2)[:spatial]
    out = ", ".join(["batch", "6", *[f"o{axis}" for axis in range(spatial)]])
    text = f"""<ir_version: 11, opset_import: ["" : 23]>
    net (float[{dims}] x) => (float[{out}] y) {{ y = Conv <{attributes}> (x, weight, bias) }}"""
    proto = onnx.parser.parse_model(text)
    weight = np.random.default_rng(1).standard_normal((6, 4 // groups, *kernel)).astype(np.float32)
    bias = np.random.default_rng(2).standard_normal(6).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "weight"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(bias, "bias"))
    return planish.ir.load(proto)


VARIANTS = [
    ("kernel_shape = [3, 2]", 1),
    ("kernel_shape = [3, 2], pads = [1, 0, 2, 1], strides = [2, 1]", 1),
    ("kernel_shape = [3, 2], dilations = [2, 3], group = 2", 2),
]


def quantize(model: ir.Model, data=(), **options):
    ctx = PassContext(target=get_target("portable"), calibration=data)
    result = Quantize(**options).run(model, ctx)
    verify(model)
    return result


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "gptaq"])
@pytest.mark.parametrize(("attributes", "groups"), VARIANTS)
@pytest.mark.parametrize("scheme", ["W8A16", "W4A16_ASYM"])
def test_a_quantised_convolution_is_the_convolution_of_what_its_weight_stands_for(
    attributes, groups, scheme, algorithm
):
    model, dense = make_model(attributes, groups), make_model(attributes, groups)
    result = quantize(model, IMAGES, scheme=scheme, algorithm=algorithm)
    assert str(result.coverage) == "1 of 1 linears, convolutions and embeddings"
    assert [node.op_type for node in model.graph] == ["QuantizedConv"]
    constants = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    (name,) = [name for name in constants if name.endswith("_quantized")]
    integers = constants[name].astype(np.float32)
    prefix = name.removesuffix("_quantized")
    zero = constants.get(f"{prefix}_zero_point", np.zeros(6)).astype(np.float32)
    scale = constants[f"{prefix}_scale"]
    assert scale.shape == (6,)
    weight = (integers - zero[:, None, None, None]) * scale[:, None, None, None]
    dense.graph.initializers["weight"].const_value = ir.tensor(weight.astype(np.float32), name="weight")
    for feeds in IMAGES:
        expected = run_model(dense, feeds)["y"]
        # The same products of the same float32 numbers, summed in another order.
        np.testing.assert_allclose(run_model(model, feeds)["y"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("attributes", "groups"), VARIANTS)
def test_patches_times_the_weight_are_the_convolution(attributes, groups):
    model = make_model(attributes, groups)
    (convolution,) = convolutions(model)
    plan = ConvolutionPlan(convolution, "W8A16", None)
    stream = ActivationStream(model, IMAGES)
    statistics = patch_statistics(plan, ((tap, None) for tap in stream.advance(["x"])))
    weight = torch.from_numpy(np.array(convolution.weight.const_value.numpy()))
    bias = convolution.bias.const_value.numpy()
    energy, count = np.zeros(6), 0
    for feeds in IMAGES:
        outputs = run_model(model, feeds)["y"] - bias[:, None, None]
        energy += (outputs.astype(np.float64) ** 2).sum(axis=(0, 2, 3))
        count += outputs[:, 0].size
    # E[(w · patch)²] from the covariance is the mean square of the output, for each output channel.
    matrices = weight.reshape(groups, 6 // groups, -1).double().numpy()
    found = np.concatenate(
        [
            np.einsum("ok,kl,ol->o", matrix, part.covariance, matrix)
            for matrix, part in zip(matrices, statistics, strict=True)
        ]
    )
    np.testing.assert_allclose(found, energy / count, rtol=1e-4)
    assert {part.tokens for part in statistics} == {count}


def test_gptq_errs_less_than_rounding_where_patches_are_correlated():
    smooth = [{"x": np.cumsum(feeds["x"], axis=-1)} for feeds in IMAGES]
    errors = {}
    for algorithm in ("rtn", "gptq"):
        model, dense = make_model(VARIANTS[0][0]), make_model(VARIANTS[0][0])
        quantize(model, smooth, scheme="W2A16", algorithm=algorithm, clip=False)
        differences = [run_model(model, feeds)["y"] - run_model(dense, feeds)["y"] for feeds in smooth]
        errors[algorithm] = np.linalg.norm(differences)
    assert errors["gptq"] < errors["rtn"]


def test_a_signal_has_patches_too():
    signals = [{"x": RNG.standard_normal((2, 4, 9)).astype(np.float32)}]
    model = make_model("kernel_shape = [3], pads = [1, 1]", spatial=1)
    quantize(model, signals, scheme="W4A16", algorithm="gptq")
    assert [node.op_type for node in model.graph] == ["QuantizedConv"]


def test_a_volume_is_rounded_to_nearest_with_a_remark():
    model = make_model("kernel_shape = [3, 2, 2]", spatial=3)
    ctx = PassContext(
        target=get_target("portable"), calibration=[{"x": np.zeros((1, 4, 5, 5, 5), np.float32)}]
    )
    Quantize(scheme="W4A16", algorithm="gptq").run(model, ctx)
    assert "rounded to nearest: statistics are taken of signals and images only" in [
        remark.text for remark in ctx.remarks
    ]
    assert [node.op_type for node in model.graph] == ["QuantizedConv"]


@pytest.mark.parametrize(
    ("attributes", "scheme", "reason"),
    [
        ("kernel_shape = [3, 2]", "W8A8", "a convolution takes integer weights and float activations"),
        ("kernel_shape = [3, 2]", "NF4", "a convolution takes integer weights and float activations"),
        ('kernel_shape = [3, 2], auto_pad = "SAME_UPPER"', "W8A16", "(auto_pad)"),
    ],
)
def test_what_is_left_alone(attributes, scheme, reason):
    result = quantize(make_model(attributes), scheme=scheme)
    (skipped,) = result.coverage.skipped
    assert reason in skipped.reason
    twice = make_model("kernel_shape = [3, 2]")
    quantize(twice, scheme="W8A16")
    assert quantize(twice, scheme="W4A16").coverage.skipped[0].reason == "quantised already"
