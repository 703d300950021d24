"""The onnxruntime-cpu target: every kernel against its op's equation, and whole models."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.codegen import get_target, microbenchmark
from planish.codegen.linear_op import LinearSpec, made_up_op
from planish.codegen.onnxruntime_cpu import kernel as kernel_module
from planish.codegen.onnxruntime_cpu.float_weights import FLOAT_KERNEL
from planish.codegen.onnxruntime_cpu.fused_add import ADD_KERNELS, AddSpec, add_spec, made_up_add
from planish.codegen.onnxruntime_cpu.gather import GATHER_KERNELS, GatherSpec, made_up_gather
from planish.codegen.onnxruntime_cpu.linear_kernels import LINEAR_BODY, LINEAR_KERNELS
from planish.ir import ops
from planish.ir.errors import TargetError
from planish.passes.infrastructure.base import PassContext
from planish.passes.quantize import Quantize
from planish.passes.quantize.algorithms.rtn import round_to_nearest
from planish.passes.quantize.grid import Grid

FLOAT32_ROUNDING = 2e-6
FLOAT16_ROUNDING = 2**-9  # the weights, the product and the sum with the bias are each rounded to 11 bits
# Activations as int8: step / √12 relative to evenly spread values, in blocks (accuracy 4) or for the tensor.
INT8_ACTIVATIONS = 1e-2


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANISH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(microbenchmark, "_SECONDS_PER_CANDIDATE", 0.0)
    monkeypatch.setattr(microbenchmark, "_FEWEST_ROUNDS", 1)


def run(candidate, feeds):
    options = onnxruntime.SessionOptions()
    for key, value in candidate.session_options.items():
        options.add_session_config_entry(key, value)
    serialized = ir.to_proto(candidate.model).SerializeToString()
    return onnxruntime.InferenceSession(serialized, options, ["CPUExecutionProvider"]).run(None, feeds)[0]


def relative(actual, expected):
    return float(np.linalg.norm(actual.astype(np.float64) - expected) / np.linalg.norm(expected))


def linear_reference(op, x):
    """The equation of the op in float64; float32 only where the op's grid is defined in float32."""
    spec = op.spec
    w, scale = op.integers().astype(np.float64), op.scales().astype(np.float64)
    zero = op.zero_points()
    if spec.block_size:
        scale = np.repeat(scale, spec.block_size, axis=0)
        zero = None if zero is None else np.repeat(zero, spec.block_size, axis=0)
    if spec.activations == "tensor":
        low, high = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
        step = (high - low) / np.float32(255)
        zero_x = np.clip(np.rint(-low / step), 0, 255)
        x = (np.clip(np.rint(x / step) + zero_x, 0, 255) - zero_x).astype(np.float64) * step
    elif spec.activations == "token":
        levels = np.float32(2 ** (spec.activation_bits - 1) - 1)
        step = np.abs(x).max(-1, keepdims=True) * np.float32(spec.activation_clip) / levels
        x = np.clip(np.rint(x / step), -levels - 1, levels).astype(np.float64) * step
    elif spec.activations == "static":
        step, middle = op.x_scale.const_value.numpy(), op.x_zero_point.const_value.numpy()
        limits = np.iinfo(middle.dtype)
        integers = np.clip(np.rint(x / step) + int(middle), limits.min, limits.max) - int(middle)
        x = integers.astype(np.float64) * step
    y = x.astype(np.float64) @ ((w - (0 if zero is None else zero)) * scale)
    return y if op.bias is None else y + op.bias.const_value.numpy()


def spec_of(activations="float", bits=8, block_size=0, **changes):
    spec = LinearSpec(activations, 64, 12, bits, block_size, True, False, True, "FLOAT", 3, pairs_fit=True)
    return dataclasses.replace(spec, **changes)


LINEAR_SPECS = [
    *(spec_of(bits=bits, block_size=block) for bits in range(2, 9) for block in (0, 16, 32)),
    *(spec_of(bits=bits, block_size=32, signed=False, zero_point=True) for bits in (2, 3, 4, 8)),
    spec_of(bits=4, block_size=32, signed=False),
    spec_of(bits=8, signed=False, zero_point=True, bias=False),
    spec_of(bits=4, block_size=32, rank=2, bias=False),
    spec_of(bits=4, block_size=16, in_features=48),
    spec_of(bits=4, block_size=32, dtype="FLOAT16"),
    *(
        spec_of(activations, bias=bias, rank=rank)
        for activations in ("tensor", "token")
        for bias in (True, False)
        for rank in (2, 3)
    ),
    spec_of("tensor", zero_point=True),
    spec_of("tensor", signed=False, zero_point=True),
    spec_of("token", signed=False, zero_point=True),
    spec_of("tensor", in_features=33, out_features=7),
    *(spec_of("token", bits=bits, activation_bits=4) for bits in (2, 4, 8)),
    *(spec_of("token", bits=4, activation_bits=bits, activation_clip=0.75) for bits in (4, 8)),
    spec_of("token", bits=4),
    spec_of("token", bits=4, signed=False, zero_point=True, rank=2),
    spec_of("token", bits=8, signed=False, zero_point=True, activation_bits=6),
    *(spec_of("token", bits=bits, block_size=32) for bits in (3, 4, 8)),
    spec_of("token", bits=4, block_size=16, activation_bits=4, activation_clip=0.75, bias=False),
    spec_of("token", bits=4, block_size=32, signed=False, zero_point=True, rank=2),
    *(
        spec_of("static", bits=bits, signed=signed, zero_point=not signed, activations_signed=x_signed)
        for bits in (4, 8)
        for signed in (True, False)
        for x_signed in (True, False)
    ),
    *(spec_of("static", bits=8, bias=bias, rank=2) for bias in (True, False)),
]
LINEAR_CASES = [
    pytest.param(spec, kernel, id=f"{kernel.name}-{index}")
    for index, spec in enumerate(LINEAR_SPECS)
    for kernel in (*LINEAR_KERNELS, LINEAR_BODY)
    if kernel.applies(made_up_op(spec))
]


@pytest.mark.parametrize(("spec", "kernel"), LINEAR_CASES)
def test_linear_kernels_compute_the_op(spec, kernel):
    op = made_up_op(spec)
    quantises = kernel.name.endswith("accuracy 4") or (
        # which onnxruntime fuses to just that
        kernel is LINEAR_BODY and (spec.activations == "float" or spec.block_size > 0)
    )
    leaves_out = spec.activations != "float" and kernel.name in (FLOAT_KERNEL, "MatMulNBits accuracy 0")
    for rows in (1, 5):
        feeds = op.feeds(rows)
        expected = linear_reference(op, feeds["x"])
        error = relative(run(kernel_module._candidate(op, kernel), feeds), expected)
        exact = FLOAT16_ROUNDING if spec.dtype == "FLOAT16" else FLOAT32_ROUNDING
        assert error < (INT8_ACTIVATIONS if quantises or leaves_out else exact)


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_few_bits_of_activations_never_saturate(bits):
    """The sum of two products is at most 2 · 127 · 127, whatever the weights."""
    op = made_up_op(spec_of("token", activation_bits=bits))
    assert np.abs(op.integers()).max() > 100
    feeds = op.feeds(5)
    expected = linear_reference(op, feeds["x"])
    for kernel in (*LINEAR_KERNELS, LINEAR_BODY):
        if kernel.applies(op):
            assert relative(run(kernel_module._candidate(op, kernel), feeds), expected) < FLOAT32_ROUNDING


@pytest.mark.parametrize("activations", ["tensor", "token"])
def test_unsigned_weights_are_exact_where_signed_ones_may_saturate(activations):
    op = made_up_op(spec_of(activations, pairs_fit=False))
    assert np.abs(op.integers()).max() > 100
    feeds = op.feeds(5)
    unsigned = [kernel for kernel in LINEAR_KERNELS if "unsigned" in kernel.name and kernel.applies(op)]
    assert unsigned
    for kernel in unsigned:
        actual = run(kernel_module._candidate(op, kernel), feeds)
        assert relative(actual, linear_reference(op, feeds["x"])) < FLOAT32_ROUNDING


GATHER_SPECS = [
    GatherSpec(48, 8, 0, True, False, "FLOAT", "INT64"),
    GatherSpec(48, 8, 0, True, False, "FLOAT", "INT32"),
    GatherSpec(64, 4, 16, True, False, "FLOAT", "INT64"),
    GatherSpec(64, 4, 32, False, True, "FLOAT", "INT64"),
    GatherSpec(64, 4, 32, False, False, "FLOAT", "INT64"),
    GatherSpec(64, 8, 32, True, False, "FLOAT", "INT64"),
    GatherSpec(64, 8, 32, False, True, "FLOAT", "INT64"),
]
GATHER_CASES = [
    pytest.param(spec, kernel, id=f"{kernel.name}-{index}")
    for index, spec in enumerate(GATHER_SPECS)
    for kernel in GATHER_KERNELS
    if kernel.applies(made_up_gather(spec))
]


@pytest.mark.parametrize(("spec", "kernel"), GATHER_CASES)
def test_gather_kernels_compute_the_op(spec, kernel):
    op = made_up_gather(spec)
    table = ops.integer_values(op.table.const_value).astype(np.float64)
    if op.zero_point is not None:
        zero = ops.integer_values(op.zero_point.const_value).astype(np.float64)
        table -= np.repeat(zero, spec.block_size, axis=1)
    scale = op.scale.const_value.numpy().astype(np.float64)
    expected = table * np.repeat(scale, spec.block_size or spec.columns, axis=1)
    feeds = op.feeds(7)
    actual = run(kernel_module._candidate(op, kernel), feeds)
    assert relative(actual, expected[feeds["ids"]]) < 1e-7  # one float32 product each


@pytest.mark.parametrize(
    ("reader", "kernel"),
    [
        pytest.param(reader, kernel, id=f"{kernel.name}-{reader}")
        for reader in ("LayerNormalization", "Gelu")
        for kernel in ADD_KERNELS
        if kernel.applies(made_up_add(AddSpec(reader, 24)))
    ],
)
def test_additions_with_their_reader_compute_the_op(reader, kernel):
    op = made_up_add(AddSpec(reader, 24))
    feeds = op.feeds(5)
    if reader == "LayerNormalization":
        total = feeds["x"].astype(np.float64) + feeds["addend"]
        centred = total - total.mean(-1, keepdims=True)
        normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        expected = normal * op.scale.const_value.numpy() + op.shift.const_value.numpy()
    else:
        total = feeds["x"].astype(np.float64) + op.addend.const_value.numpy()
        expected = total / 2 * (1 + np.vectorize(math.erf)(total / math.sqrt(2)))
    assert relative(run(kernel_module._candidate(op, kernel), feeds), expected) < FLOAT32_ROUNDING


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("y = Add (a, b) z = LayerNormalization (y, w)", AddSpec("LayerNormalization", 8)),
        ("y = Add (a, w) z = Gelu (y)", AddSpec("Gelu", 8)),
        ("y = Add (a, w) z = LayerNormalization (y, w)", None),
        ("y = Add (a, b) z = Gelu (y)", None),
        ("y = Add (a, b) z = Relu (y)", None),
        ("y = Mul (a, b) z = LayerNormalization (y, w)", None),
    ],
)
def test_additions_that_onnxruntime_would_fuse(text, found):
    operands = "float[m, s, 8] a, float[m, s, 8] b"
    proto = onnx.parser.parse_model(
        '<ir_version: 11, opset_import: ["" : 23]>'
        f"g ({operands}) => (float[m, s, 8] z) <float[m, s, 8] y> {{ {text} }}"
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(8, np.float32), "w"))
    assert add_spec(ir.from_proto(proto).graph.node(0)) == found


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([16, 31, 64]))
def test_weights_whose_pairs_fit_are_exact_on_this_machine(seed, rows):
    """Rows 2i and 2i + 1 are the pairs that a 16-bit kernel adds; the hardest activations are 0 and 255."""
    rng = np.random.default_rng(seed)
    grid = Grid(bits=8, symmetric=True, block_size=0, scale_dtype=np.dtype(np.float32), limit_pairs=True)
    weight = round_to_nearest(rng.laplace(size=(rows, 8)).astype(np.float32), grid).integers
    x = rng.choice(np.array([0, 255], np.uint8), (5, rows))
    a = ir.val("a", dtype=ir.DataType.UINT8, shape=["m", rows])
    b = ir.val("b", const_value=ir.tensor(weight, name="b"))
    node = ir.node("MatMulInteger", [a, b])
    node.outputs[0].name = "y"
    graph = ir.Graph([a], node.outputs, nodes=[node], initializers=[b], opset_imports={"": 23}, name="g")
    session = onnxruntime.InferenceSession(
        ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    np.testing.assert_array_equal(session.run(None, {"a": x})[0], x.astype(int) @ weight.astype(int))


def test_saturation_is_measured():
    op = made_up_op(spec_of("tensor", pairs_fit=False))
    feeds = op.feeds(4)
    error = relative(
        run(kernel_module._candidate(op, LINEAR_KERNELS[0]), feeds), linear_reference(op, feeds["x"])
    )
    assert get_target("onnxruntime-cpu").adds_products_in_16_bits() == (error > 1e-3)


def test_very_wide_layers_are_timed_narrower():
    assert spec_of(out_features=150_000).timed() == spec_of(out_features=16384)
    assert spec_of().timed() == spec_of()


def block(hidden=64):
    """Embedding, linear, residual and LayerNormalization, as canonicalize leaves them."""
    rng = np.random.default_rng(5)

    def constant(name, *shape):
        return ir.val(name, const_value=ir.tensor(rng.standard_normal(shape).astype(np.float32), name=name))

    ids = ir.val("ids", dtype=ir.DataType.INT64, shape=["batch", "sequence"])
    shape = ir.Shape(["batch", "sequence", hidden])
    weights = {
        "table": constant("embed.weight", 400, hidden),
        "w": constant("fc.weight", hidden, hidden),
        "b": constant("fc.bias", hidden),
        "g": constant("norm.weight", hidden),
        "beta": constant("norm.bias", hidden),
    }
    nodes = [gather := ir.node("Gather", [weights["table"], ids])]
    nodes.append(matmul := ir.node("MatMul", [gather.outputs[0], weights["w"]]))
    nodes.append(bias := ir.node("Add", [matmul.outputs[0], weights["b"]]))
    nodes.append(residual := ir.node("Add", [bias.outputs[0], gather.outputs[0]]))
    norm_inputs = [residual.outputs[0], weights["g"], weights["beta"]]
    nodes.append(ir.node("LayerNormalization", norm_inputs, {"axis": -1}))
    for index, node in enumerate(nodes):
        node.name = f"node{index}"
        node.outputs[0].name = f"value{index}"
        node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, shape
    graph = ir.Graph(
        [ids],
        nodes[-1].outputs,
        nodes=nodes,
        initializers=list(weights.values()),
        opset_imports={"": 23},
        name="g",
    )
    return ir.Model(graph, ir_version=11)


def session_of(bound):
    options = onnxruntime.SessionOptions()
    for key, value in bound.session_options.items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(
        ir.to_proto(bound.model).SerializeToString(),
        options,
        ["CPUExecutionProvider"],
        disabled_optimizers=list(bound.disabled_optimizers),
    )


@pytest.mark.parametrize("scheme", ["W8A8", "W4A8", "W4A4", "W8A16", "W4A16", "W4A16_ASYM"])
def test_a_bound_model_computes_what_its_bodies_do(scheme):
    model = block()
    options = {"group_size": 32} if "A16" in scheme else {"group_size": -1}
    Quantize(scheme=scheme, **options).run(model, PassContext(target=get_target("portable")))
    before = ir.to_proto(model).SerializeToString()
    bound = get_target("onnxruntime-cpu", rows=(1, 6), threads=1).bind(model)
    assert ir.to_proto(model).SerializeToString() == before
    assert "planish" not in {node.domain for node in bound.model.graph}
    names = [node.name for node in bound.model.graph]
    assert len(set(names)) == len(names)
    assert {binding.node for binding in bound.bindings} == {"node0", "node1", "node3"}
    assert all(binding.reason for binding in bound.bindings)
    ids = np.array([[1, 399, 7], [0, 5, 5]])
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    body = onnxruntime.InferenceSession(before, options, ["CPUExecutionProvider"])
    expected = body.run(None, {"ids": ids})[0]
    # The default max_error is 1e-2; the normalization passes relative errors on.
    assert relative(session_of(bound).run(None, {"ids": ids})[0], expected.astype(np.float64)) < 1.5e-2


def test_a_model_without_choices_is_left_as_it_is():
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=["m", 4])
    node = ir.node("Relu", [x], name="relu")
    node.outputs[0].name = "y"
    model = ir.Model(
        ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 23}, name="g"), ir_version=11
    )
    bound = get_target("onnxruntime-cpu").bind(model)
    assert bound.bindings == ()
    assert not bound.session_options
    assert set(bound.model.opset_imports) == {""}


def test_a_model_with_quantisation_of_its_own_is_not_folded():
    """Folding at load is a property of the whole session: it would undo the model's own QDQ nodes."""
    model = block()
    Quantize(scheme="W8A16").run(model, PassContext(target=get_target("portable")))
    operands = [
        ir.val(name, const_value=ir.tensor(array, name=name))
        for name, array in (("q", np.ones(3, np.int8)), ("s", np.array(1, np.float32)))
    ]
    own = ir.node("DequantizeLinear", operands, name="own")
    own.outputs[0].name = "own"
    for value in operands:
        model.graph.register_initializer(value)
    model.graph.append(own)
    model.graph.outputs.append(own.outputs[0])
    bound = get_target("onnxruntime-cpu", rows=(128,)).bind(model)
    assert not bound.session_options
    assert FLOAT_KERNEL not in {binding.kernel for binding in bound.bindings}


@pytest.mark.parametrize("rows", [(), (0,), (4, -1)])
def test_rows_are_checked(rows):
    with pytest.raises(TargetError, match="rows must be positive"):
        get_target("onnxruntime-cpu", rows=rows)


def test_equal_options_make_equal_targets():
    assert get_target("onnxruntime-cpu", rows=[1, 2]) == get_target("onnxruntime-cpu", rows=(1, 2))
