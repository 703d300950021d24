"""The bodies of HadamardTransform against a dense product in float64."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.ir import ops
from planish.ir.errors import ModelError

# A unit in the last place for each of the two to four roundings of a path through the factors, and the sums.
ROUNDING = {np.float64: 1e-14, np.float32: 2e-6, np.float16: 4e-3}


def orthogonal(order, seed=0):
    return np.linalg.qr(np.random.default_rng(seed + order).standard_normal((order, order)))[0]


def dense(matrices, features, trailing=1):
    product = np.eye(1)
    for matrix in matrices:
        product = np.kron(product, matrix)
    product = np.kron(product, np.eye(trailing))
    return np.kron(np.eye(features // len(product)), product)


def model_of(matrices, shape, dtype, trailing=1):
    kind = ir.DataType.from_numpy(np.dtype(dtype))
    x = ir.val("x", shape=shape, dtype=kind)
    factors = ops.factor_values(matrices, "online", kind)
    node, definition = ops.hadamard_transform(x, factors, trailing=trailing, name="online")
    node.outputs[0].name = "y"
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=factors, opset_imports={"": 23}, name="g")
    model = ir.Model(graph, ir_version=11)
    ops.define(model, definition)
    return model


def run(model, x):
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


CASES = [  # orders, features, trailing, overload
    ([8], 8, 1, ""),
    ([4], 12, 1, "blocks"),
    ([4, 6], 24, 1, "two"),
    ([6, 4], 48, 1, "two"),
    ([2, 3, 4], 24, 1, "three"),
    ([4, 2, 3], 48, 1, "three"),
    ([3], 12, 4, "leading"),
    ([2], 24, 4, "leading"),
]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize(("orders", "features", "trailing", "overload"), CASES)
def test_it_is_the_product_with_the_kronecker_product(orders, features, trailing, overload, dtype):
    matrices = [orthogonal(order, seed) for seed, order in enumerate(orders)]
    model = model_of(matrices, ["batch", "sequence", features], dtype, trailing)
    assert model.graph.node(0).overload == overload
    assert list(model.graph.outputs[0].shape) == ["batch", "sequence", features]
    assert model.graph.outputs[0].dtype == ir.DataType.from_numpy(np.dtype(dtype))
    x = np.random.default_rng(1).standard_normal((2, 3, features)).astype(dtype)
    expected = x.astype(np.float64) @ dense(matrices, features, trailing)
    for inlined in (False, True):
        if inlined:
            assert ops.inline(model) == 1
            assert {node.domain for node in model.graph} == {""}
        y = run(model, x)
        assert y.dtype == dtype
        assert np.abs(y - expected).max() < ROUNDING[dtype] * np.abs(expected).max()


@settings(max_examples=15, deadline=None)
@given(
    orders=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    blocks=st.integers(1, 3),
    shape=st.lists(st.integers(1, 3), max_size=3),
)
def test_the_transposed_factors_are_the_inverse(orders, blocks, shape):
    matrices = [orthogonal(order, seed) for seed, order in enumerate(orders)]
    features = blocks * math.prod(orders)
    x = np.random.default_rng(features).standard_normal((*shape, features))
    forward = model_of(matrices, x.shape, np.float64)
    back = model_of([matrix.T for matrix in matrices], x.shape, np.float64)
    y = run(forward, x)
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-12)
    np.testing.assert_allclose(run(back, y), x, atol=1e-12)


def test_hadamard_matrices_are_normalised():
    signs = np.array([[1, 1], [1, -1]], np.int8)
    first, second = ops.factor_values([signs, np.kron(signs, signs)], "h", ir.DataType.FLOAT)
    assert (first.name, second.name) == ("h.a", "h.b")
    assert second.dtype == ir.DataType.FLOAT
    np.testing.assert_allclose(first.const_value.numpy(), signs / math.sqrt(2), rtol=1e-7)
    np.testing.assert_array_equal(second.const_value.numpy(), np.kron(signs, signs) / 2)


@pytest.mark.parametrize(
    ("shapes", "features", "trailing", "message"),
    [
        ([(4, 4)], "n", 1, "last dimension of 'x' must be known"),
        ([(4, 4)], 10, 1, r"factors \[4\] × 1 do not divide 10 features"),
        ([(4, 4)], 12, 2, r"factors \[4\] × 2 do not divide 12 features"),
        ([(4, 3)], 12, 1, r"'f0' must be a square matrix, found \(4, 3\)"),
        ([(2, 2)] * 4, 16, 1, "found 4 and trailing=1"),
        ([(2, 2)] * 2, 16, 2, "found 2 and trailing=2"),
        ([], 16, 1, "found 0"),
    ],
)
def test_operands_that_do_not_fit(shapes, features, trailing, message):
    x = ir.val("x", shape=["m", features], dtype=ir.DataType.FLOAT)
    factors = [
        ir.val(f"f{index}", shape=shape, dtype=ir.DataType.FLOAT) for index, shape in enumerate(shapes)
    ]
    with pytest.raises(ModelError, match=message):
        ops.hadamard_transform(x, factors, trailing=trailing)
