"""HadamardTransform on onnxruntime: every kernel against a dense product in float64; costs of ops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.codegen import get_target, microbenchmark
from planish.codegen.hadamard_op import HadamardSpec, hadamard_op, made_up_hadamard, parts_of
from planish.codegen.onnxruntime_cpu.hadamard import HADAMARD_KERNELS
from planish.codegen.onnxruntime_cpu.kernel import _candidate
from planish.ir import ops
from planish.ir.errors import TargetError

# Two or three products of float32 (float16, float64) and their sums, relative to the largest entry.
ROUNDING = {"FLOAT": 4e-6, "FLOAT16": 8e-3, "DOUBLE": 1e-13}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANISH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(microbenchmark, "_SECONDS_PER_CANDIDATE", 0.0)
    monkeypatch.setattr(microbenchmark, "_FEWEST_ROUNDS", 1)


def dense(matrices, features, trailing=1):
    product = np.eye(1)
    for matrix in matrices:
        product = np.kron(product, matrix.astype(np.float64))
    product = np.kron(product, np.eye(trailing))
    return np.kron(np.eye(features // len(product)), product)


def run(model, feeds):
    serialized = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(serialized, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


SPECS = [
    HadamardSpec(8, ((2, 2, 2),), 1, 1, 3, "FLOAT"),
    HadamardSpec(12, ((12,),), 1, 1, 3, "FLOAT"),
    HadamardSpec(48, ((12,), (2, 2)), 1, 1, 2, "FLOAT"),
    HadamardSpec(48, ((2, 2), (3,)), 1, 1, 3, "FLOAT"),  # in blocks of 12
    HadamardSpec(24, ((2, 3),), 1, 1, 3, "FLOAT"),  # one factor, in blocks of 6
    HadamardSpec(48, ((2, 2),), 4, 1, 3, "FLOAT"),  # across heads of 4, in blocks of 16
    HadamardSpec(16, ((2,), (2, 2), (2,)), 1, 3, 4, "FLOAT"),
    HadamardSpec(16, ((2, 2), (2, 2)), 1, 1, 3, "FLOAT16"),
    HadamardSpec(16, ((2, 2), (2, 2)), 1, 1, 3, "DOUBLE"),
]


APPLICABLE = [
    pytest.param(spec, kernel, id=f"{index}-{kernel.name}")
    for index, spec in enumerate(SPECS)
    for kernel in HADAMARD_KERNELS
    if kernel.applies(made_up_hadamard(spec))
]


@pytest.mark.parametrize(("spec", "kernel"), APPLICABLE)
def test_every_kernel_computes_the_body(spec, kernel):
    op = made_up_hadamard(spec)
    feeds = op.feeds(5)
    assert feeds["x"].shape[-2:] == (5, spec.features)
    result = run(_candidate(op, kernel).model, feeds)
    matrices = [factor.const_value.numpy() for factor in op.factors]
    expected = feeds["x"].astype(np.float64) @ dense(matrices, spec.features, spec.trailing)
    assert result.shape == expected.shape
    assert np.abs(result - expected).max() < ROUNDING[spec.dtype] * np.abs(expected).max()


def test_which_kernels_apply():
    def names(*factors):
        spec = HadamardSpec(math.prod(itertools.chain(*factors)), factors, 1, 1, 3, "FLOAT")
        return [kernel.name for kernel in HADAMARD_KERNELS if kernel.applies(made_up_hadamard(spec))]

    assert names((12,)) == ["one MatMul", "body"]
    assert names((12,), (2,)) == ["one MatMul", "two MatMuls", "body"]
    assert names((2,) * 6, (2,) * 5) == ["two MatMuls", "three MatMuls", "body"]  # 2048 is too wide for one


@settings(max_examples=25, deadline=None)
@given(orders=st.lists(st.sampled_from([2, 3, 4, 5]), min_size=1, max_size=4))
def test_a_product_is_taken_apart(orders):
    # Rotations by generic angles are no Kronecker products themselves.
    matrices = [
        np.linalg.qr(np.random.default_rng(7 * seed + n).standard_normal((n, n)))[0]
        for seed, n in enumerate(orders)
    ]
    product = dense(matrices, math.prod(orders))
    parts = parts_of(product)
    assert sorted(len(part) for part in parts) == sorted(orders)
    np.testing.assert_allclose(dense(parts, len(product)), product, atol=1e-14)


def test_a_matrix_that_is_no_product_stays_whole():
    matrix = np.linalg.qr(np.random.default_rng(0).standard_normal((12, 12)))[0]
    (whole,) = parts_of(matrix)
    np.testing.assert_array_equal(whole, matrix)


def transform_model(orders, features, trailing=1, heads=None):
    matrices = [
        np.linalg.qr(np.random.default_rng(n).standard_normal((n, n)))[0].astype(np.float32) for n in orders
    ]
    shape = ["batch", "sequence", features] if heads is None else ["batch", heads, "sequence", features]
    x = ir.val("x", shape=shape, dtype=ir.DataType.FLOAT)
    factors = ops.factor_values(matrices, "online", ir.DataType.FLOAT)
    node, definition = ops.hadamard_transform(x, factors, trailing=trailing, name="online")
    node.outputs[0].name = "y"
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=factors, opset_imports={"": 23}, name="g")
    model = ir.Model(graph, ir_version=11)
    ops.define(model, definition)
    return model, matrices


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "portable"])
@pytest.mark.parametrize(
    ("orders", "features", "trailing"), [((4, 6), 24, 1), ((4,), 8, 1), ((2,), 16, 4), ((2, 3, 4), 48, 1)]
)
def test_bound_models_compute_the_transform(target, orders, features, trailing):
    model, matrices = transform_model(orders, features, trailing)
    bound = get_target(target).bind(model)
    onnx.checker.check_model(ir.to_proto(bound.model), full_check=True)
    assert {node.domain for node in bound.model.graph} == {""}
    (binding,) = bound.bindings
    assert (binding.node, binding.op) == ("online", "planish::HadamardTransform")
    x = np.random.default_rng(1).standard_normal((2, 3, features)).astype(np.float32)
    expected = x.astype(np.float64) @ dense(matrices, features, trailing)
    assert np.abs(run(bound.model, {"x": x}) - expected).max() < ROUNDING["FLOAT"] * np.abs(expected).max()
    assert model.graph.node(0).domain == "planish"


def test_heads_count_as_rows():
    model, _ = transform_model((8,), 8, heads=4)
    op = hadamard_op(model.graph.node(0))
    assert (op.spec.heads, op.spec.rank) == (4, 4)
    assert op.feeds(3)["x"].shape == (1, 4, 3, 8)


def test_a_transform_whose_factors_are_not_constant_is_refused():
    model, _ = transform_model((4,), 8)
    model.graph.node(0).inputs[1].const_value = None
    with pytest.raises(TargetError, match="not constant"):
        get_target("onnxruntime-cpu").bind(model)


def linear_nodes():
    """A float linear and the same one with its bias."""
    rng = np.random.default_rng(0)

    def constant(name, *shape):
        return ir.val(
            name,
            shape=shape,
            dtype=ir.DataType.FLOAT,
            const_value=ir.tensor(rng.standard_normal(shape).astype(np.float32), name=name),
        )

    x = ir.val("x", shape=["batch", "sequence", 32], dtype=ir.DataType.FLOAT)
    product = ir.node("MatMul", [x, constant("w", 32, 16)])
    add = ir.node("Add", [product.outputs[0], constant("b", 16)])
    graph = ir.Graph([x], add.outputs, nodes=[product, add], opset_imports={"": 23}, name="g")
    return graph, product, add


def test_costs_of_ops():
    target = get_target("onnxruntime-cpu", rows=(2,))
    graph, product, add = linear_nodes()
    transform, _ = transform_model((4, 6), 24)
    quantised, _ = ops.quantized_linear(
        graph.inputs[0],
        ir.val("q", const_value=ops.integer_tensor(np.ones((32, 16)), ir.DataType.INT8, "q")),
        ir.val("s", const_value=ir.tensor(np.ones(16, np.float32), name="s")),
        bits=8,
    )
    for value in quantised.inputs[1:3]:
        value.dtype, value.shape = value.const_value.dtype, value.const_value.shape
    for node in (product, transform.graph.node(0), quantised):
        assert 0 < target.seconds(node) < 1
        assert get_target("portable").seconds(node) is None
    assert target.seconds(add) is None


def test_a_cost_is_the_time_of_the_kernel_that_is_bound(monkeypatch):
    """Times made up so that two products win: the cost is theirs, as the geometric mean over the rows."""
    table = {"one MatMul": 4.0, "two MatMuls": 1.0, "three MatMuls": 2.0, "body": 3.0}

    def made_up_times(sessions, feeds):
        return {name: table[name] * feeds["x"].shape[-2] for name in sessions}

    monkeypatch.setattr(microbenchmark, "_seconds", made_up_times)
    model, _ = transform_model((2, 3, 4), 24)
    target = get_target("onnxruntime-cpu", rows=(2, 8))
    assert [binding.kernel for binding in target.bind(model).bindings] == ["two MatMuls"]
    assert target.seconds(model.graph.node(0)) == pytest.approx(4.0)


def test_very_wide_linears_are_timed_at_a_bounded_width(monkeypatch):
    monkeypatch.setattr("planish.codegen.onnxruntime_cpu.costs._WIDEST_TIMED", 8)
    monkeypatch.setattr(microbenchmark, "_seconds", lambda sessions, feeds: dict.fromkeys(sessions, 1.0))
    _, product, _ = linear_nodes()
    assert get_target("onnxruntime-cpu", rows=(2,)).seconds(product) == pytest.approx(2.0)
