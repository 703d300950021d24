"""Sessions: results against numpy, weights shared rather than copied, and one clear error for bad feeds."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from planish.ir.errors import InputError, TargetError
from planish.runtime.session import Session

WEIGHT = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)


def linear_model(op: str = "MatMul") -> ir.Model:
    text = f"""
        <ir_version: 11, opset_import: ["" : 23]>
        g (float[batch, 64] x, bool[batch] keep) => (float[batch, 32] y, bool[batch] dropped)
        {{ y = {op}(x, weight) dropped = Not(keep) }}
    """
    model = ir.from_proto(onnx.parser.parse_model(text.replace(", weight", ", w0")))
    # The parser has no initializer here: add the weight by hand.
    weight = ir.Value(name="w0", const_value=ir.tensor(WEIGHT, name="w0"))
    weight.shape, weight.type = ir.Shape(WEIGHT.shape), ir.TensorType(ir.DataType.FLOAT)
    node = model.graph.node(0)
    node.replace_input_with(1, weight)
    model.graph.register_initializer(weight)
    return model


def feeds(batch: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {"x": rng.standard_normal((batch, 64)).astype(np.float32), "keep": np.arange(batch) % 2 == 0}


def test_matches_numpy():
    x = feeds()
    result = Session(linear_model()).run(x)
    # One float32 dot product of 64 terms: 64 · 2⁻²⁴ of the largest partial sum, below 1e-4 here.
    np.testing.assert_allclose(result["y"], x["x"].astype(np.float64) @ WEIGHT, atol=1e-4)
    np.testing.assert_array_equal(result["dropped"], ~x["keep"])
    assert result["dropped"].dtype == bool


def test_outputs_belong_to_the_caller():
    session = Session(linear_model())
    first = session.run(feeds())
    kept = first["y"].copy()
    session.run(feeds(5))
    np.testing.assert_array_equal(first["y"], kept)
    first["y"][:] = 0  # writable


def test_weights_are_shared_not_copied():
    model = linear_model()
    session = Session(model)
    array = model.graph.initializers["w0"].const_value.numpy()
    assert session._shared_weights["w0"].data_ptr() == array.ctypes.data


def test_the_model_is_not_changed():
    model = linear_model()
    tensor = model.graph.initializers["w0"].const_value
    Session(model).run(feeds())
    assert model.graph.initializers["w0"].const_value is tensor


def test_non_contiguous_input():
    x = feeds()
    strided = np.asfortranarray(x["x"])
    expected = Session(linear_model()).run(x)["y"]
    np.testing.assert_array_equal(Session(linear_model()).run({**x, "x": strided})["y"], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((3, 64))}, "input 'x': expected dtype float32, found float64"),
        ({"x": np.zeros((3, 63), np.float32)}, "input 'x': expected 64 on axis 1"),
        ({"x": np.zeros(64, np.float32)}, "input 'x': expected shape"),
        ({"z": np.zeros(1, np.float32)}, r"unknown \['z'\]"),
    ],
)
def test_feeds_that_do_not_fit(change, message):
    with pytest.raises(InputError, match=message):
        Session(linear_model()).run({**feeds(), **change})


def test_missing_input():
    with pytest.raises(InputError, match=r"missing \['keep'\]"):
        Session(linear_model()).run({"x": feeds()["x"]})


def test_an_op_that_onnxruntime_lacks():
    with pytest.raises(TargetError, match=r"onnxruntime .* cannot load the model.*— `planish inspect`"):
        Session(linear_model("NoSuchOp"))


def test_repeatable_runs_into_the_same_buffers():
    session = Session(linear_model())
    inputs = feeds()
    call = session.repeatable(inputs)
    outputs = {name: call._values[name].numpy() for name in session.output_names}
    expected = session.run(inputs)["y"]
    inputs["x"][:] = 2 * inputs["x"]  # inputs are read in place
    call()
    # Twice a float32 is exact, so is every product and sum of it.
    np.testing.assert_array_equal(call._values["y"].numpy(), 2 * expected)
    assert call._values["y"].numpy().ctypes.data == outputs["y"].ctypes.data


def test_scalar_inputs():
    text = """<ir_version: 11, opset_import: ["" : 23]>
        g (float[n] x, float factor) => (float[n] y) { y = Mul(x, factor) }"""
    session = Session(ir.from_proto(onnx.parser.parse_model(text)))
    inputs = {"x": np.ones(3, np.float32), "factor": np.array(2, np.float32)}
    np.testing.assert_array_equal(session.run(inputs)["y"], [2, 2, 2])
    session.repeatable(inputs)()
