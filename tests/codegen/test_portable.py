"""The portable target: standard ops only, the same function, and forms that onnxruntime fuses."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from planish.codegen import get_target
from planish.ir import ops
from planish.ir.errors import TargetError


def constant(array, name, dtype=None):
    tensor = ir.tensor(array, name=name) if dtype is None else ops.integer_tensor(array, dtype, name)
    return ir.val(name, shape=array.shape, dtype=tensor.dtype, const_value=tensor)


def model_of(x, node, definition=None):
    initializers = [value for value in node.inputs if value is not None and value.const_value is not None]
    node.outputs[0].name, node.name = "y", "layer"
    graph = ir.Graph(
        [x], node.outputs, nodes=[node], initializers=initializers, opset_imports={"": 23}, name="g"
    )
    model = ir.Model(graph, ir_version=11)
    if definition is not None:
        ops.define(model, definition)
    return model


def run(model, x, level=onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL, check=True):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    proto = ir.to_proto(model)
    if check:
        onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def linear(bits, block_size, rank=3, bias=True):
    rng = np.random.default_rng(0)
    k, n = 64, 16
    w = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (k, n))
    scale = rng.uniform(0.5, 2, (k // block_size, n) if block_size else (n,)).astype(np.float32)
    x = ir.val("x", shape=["batch", "sequence", k][-rank:], dtype=ir.DataType.FLOAT)
    return model_of(
        x,
        *ops.quantized_linear(
            x,
            constant(w, "w", ops.container(bits, signed=True)),
            constant(scale, "scale"),
            None,
            constant(rng.standard_normal(n).astype(np.float32), "bias") if bias else None,
            bits=bits,
            block_size=block_size,
        ),
    )


def test_bodies_are_inlined_and_the_model_is_not_changed():
    model = linear(4, 32)
    before = ir.to_proto(model).SerializeToString()
    bound = get_target("portable").bind(model)
    assert ir.to_proto(model).SerializeToString() == before
    assert [node.op_type for node in bound.model.graph] == ["DequantizeLinear", "MatMul", "Add"]
    assert set(bound.model.opset_imports) == {""}
    assert not bound.model.functions
    assert bound.model.graph.initializers["w"].const_value is model.graph.initializers["w"].const_value
    (binding,) = bound.bindings
    assert (binding.node, binding.op, binding.kernel) == ("layer", "planish::QuantizedLinear", "body")
    x = np.random.default_rng(1).standard_normal((2, 3, 64)).astype(np.float32)
    np.testing.assert_array_equal(run(bound.model, x), run(model, x))


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("bits", "block_size"), [(4, 32), (8, 32), (8, 0)])
def test_onnxruntime_fuses_the_form(bits, block_size, rank, bias, tmp_path):
    """Fused, no DequantizeLinear is left at run time; seen in the profile of a run."""
    bound = get_target("portable").bind(linear(bits, block_size, rank, bias))
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        ir.to_proto(bound.model).SerializeToString(), options, ["CPUExecutionProvider"]
    )
    session.run(None, {"x": np.ones((2, 5, 64)[-rank:], np.float32)})
    profile = (tmp_path / session.end_profiling()).read_text()
    assert "MatMulNBits" in profile
    assert "DequantizeLinear" not in profile


def static_linear(rank, bias):
    rng = np.random.default_rng(3)
    x = ir.val("x", shape=["batch", "sequence", 64][-rank:], dtype=ir.DataType.FLOAT)
    return model_of(
        x,
        *ops.static_quantized_linear(
            x,
            constant(rng.integers(-64, 65, (64, 16)).astype(np.int8), "w"),
            constant(rng.uniform(0.5, 2, 16).astype(np.float32), "scale"),
            constant(np.array(0.03, np.float32), "x_scale"),
            constant(np.array(120, np.uint8), "x_zero_point"),
            None,
            constant(rng.standard_normal(16).astype(np.float32), "bias") if bias else None,
        ),
    )


@pytest.mark.parametrize(("rank", "bias"), [(3, True), (3, False), (2, False)])
def test_onnxruntime_fuses_static_activations(rank, bias, tmp_path):
    bound = get_target("portable").bind(static_linear(rank, bias))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    onnxruntime.InferenceSession(
        ir.to_proto(bound.model).SerializeToString(), options, ["CPUExecutionProvider"]
    )
    optimized = [node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph]
    assert optimized == ["QuantizeLinear", "MatMulIntegerToFloat"] + (["Add"] if bias else [])


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_static_activations_are_the_same_function_everywhere(rank, bias, tmp_path, monkeypatch):
    monkeypatch.setenv("PLANISH_CACHE_DIR", str(tmp_path))
    model = static_linear(rank, bias)
    x = np.random.default_rng(4).standard_normal((2, 5, 64)[-rank:]).astype(np.float32)
    as_written = run(model, x)
    everything = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    for target in ("portable", "onnxruntime-cpu"):
        bound = get_target(target).bind(model)
        actual = run(bound.model, x, everything, check=target == "portable")
        # Sums of 64 products: integers here, rounded float32 there.
        np.testing.assert_allclose(actual, as_written, atol=1e-5 * np.abs(as_written).max())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(3,), (2, 2), (0,), (1, 2, 3)])
def test_four_bit_rows_are_gathered_packed(signed, shape):
    rng = np.random.default_rng(2)
    dtype = ops.container(4, signed=signed)
    table = rng.integers(-8, 8, (10, 32)) + (0 if signed else 8)
    scale = rng.uniform(0.1, 1, (10, 2)).astype(np.float32)
    zero_point = None if signed else constant(rng.integers(0, 16, (10, 2)), "zero_point", dtype)
    ids = ir.val("x", shape=[f"d{i}" for i in range(len(shape))], dtype=ir.DataType.INT64)
    model = model_of(
        ids,
        *ops.quantized_gather(
            ids, constant(table, "table", dtype), constant(scale, "scale"), zero_point, bits=4, block_size=16
        ),
    )
    bound = get_target("portable").bind(model)
    assert "DequantizeLinear" not in {node.op_type for node in bound.model.graph}
    assert "table" not in bound.model.graph.initializers
    assert "packed" in bound.bindings[0].kernel
    x = rng.integers(-10, 10, shape)
    # The same float32 subtraction and product in another order of nodes: equal to the bit.
    np.testing.assert_array_equal(run(bound.model, x), run(model, x))


def test_an_eight_bit_table_keeps_its_body():
    ids = ir.val("x", shape=["m"], dtype=ir.DataType.INT64)
    table, scale = np.ones((10, 32), np.int8), np.ones((10, 2), np.float32)
    model = model_of(
        ids, *ops.quantized_gather(ids, constant(table, "t"), constant(scale, "s"), bits=8, block_size=16)
    )
    assert get_target("portable").bind(model).bindings[0].kernel == "body"


def test_other_vendors_ops_are_refused():
    x = ir.val("x", shape=["m", 4], dtype=ir.DataType.FLOAT)
    model = model_of(x, ir.node("BiasGelu", [x], domain="com.microsoft"))
    with pytest.raises(TargetError, match=r"'layer' is com\.microsoft::BiasGelu"):
        get_target("portable").bind(model)


def test_functions_of_the_model_are_allowed():
    x = ir.val("x", shape=["m", 4], dtype=ir.DataType.FLOAT)
    model = model_of(x, ir.node("Twice", [x], domain="local"))
    text = '<domain: "local", opset_import: ["" : 23]> Twice (x) => (y) { y = Add (x, x) }'
    function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
    model.functions[function.identifier()] = function
    assert get_target("portable").bind(model).bindings == ()


def test_targets_and_options_are_checked():
    with pytest.raises(TargetError, match=r"expected one of .*'portable'.*found 'cpu'"):
        get_target("cpu")
    with pytest.raises(TargetError, match="no option 'rows'"):
        get_target("portable", rows=(1,))
