"""Saving: whole files or none, and the same model back."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from onnx import TensorProto, helper, numpy_helper
from planish.ir import diff_models, load, save, verify
from planish.ir.errors import ModelError

RNG = np.random.default_rng(0)
BIG = RNG.standard_normal((3, 400)).astype(np.float32)  # 4,800 bytes: streamed
SMALL = RNG.standard_normal(400).astype(np.float32)  # streamed
TINY = np.array([2.0], np.float32)  # a part of the graph's message


def network(big: np.ndarray = BIG) -> onnx.ModelProto:
    """A linear, an If whose branch owns a weight, a model-local function and metadata."""
    branch = helper.make_graph(
        [helper.make_node("Add", ["scaled", "shift"], ["shifted"])],
        "then",
        [],
        [helper.make_tensor_value_info("shifted", TensorProto.FLOAT, ["batch", 400])],
        [numpy_helper.from_array(SMALL, "shift")],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["scaled"], ["same"])],
        "else",
        [],
        [helper.make_tensor_value_info("same", TensorProto.FLOAT, ["batch", 400])],
    )
    twice = helper.make_function(
        "local",
        "Twice",
        ["a"],
        ["b"],
        [helper.make_node("Add", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 23)],
    )
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "layer.weight"], ["product"], name="product"),
            helper.make_node("Mul", ["product", "factor"], ["scaled"], name="scale"),
            helper.make_node(
                "If", ["choice"], ["chosen"], name="choose", then_branch=branch, else_branch=other
            ),
            helper.make_node("Twice", ["chosen"], ["y"], domain="local", name="twice"),
        ],
        "network",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3]),
            helper.make_tensor_value_info("choice", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 400])],
        [numpy_helper.from_array(big, "layer.weight"), numpy_helper.from_array(TINY, "factor")],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("local", 1)],
        functions=[twice],
        ir_version=11,
    )
    helper.set_model_props(model, {"recipe": "none"})
    model.graph.node[0].metadata_props.add(key="module", value="layer")
    return model


def run(path: Path, choice: bool = True) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = np.array([[1, 2, 3]], np.float32)
    return session.run(None, {"x": x, "choice": np.array(choice)})[0]


def expected() -> np.ndarray:
    x = np.array([[1, 2, 3]], np.float64)
    return 2 * (x @ BIG.astype(np.float64) * 2 + SMALL)


@pytest.mark.parametrize("external", [None, False, True])
def test_saved_models_are_valid_and_the_same(tmp_path: Path, external: bool | None) -> None:
    model = load(network())
    path = tmp_path / "m.onnx"
    save(model, path, external_data=external)
    onnx.checker.check_model(str(path), full_check=True)
    # float32 sums of three products against float64: a few units in the last place
    np.testing.assert_allclose(run(path), expected(), rtol=1e-5, atol=1e-5)
    again = load(path)
    assert not diff_models(model, again)
    assert again.metadata_props == {"recipe": "none"}
    assert list(again.functions) == [("local", "Twice", "")]
    assert again.graph[0].metadata_props == {"module": "layer"}
    names = ["m.onnx", "m.onnx.data"] if external else ["m.onnx"]
    assert sorted(os.listdir(tmp_path)) == names


def test_weights_are_external_where_asked(tmp_path: Path) -> None:
    save(load(network()), tmp_path / "m.onnx", external_data=True)
    proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    places = {t.name: t.data_location for t in proto.graph.initializer}
    assert places == {"layer.weight": TensorProto.EXTERNAL, "factor": TensorProto.DEFAULT}
    assert (tmp_path / "m.onnx").stat().st_size < BIG.nbytes


def test_the_order_of_weights_is_kept(tmp_path: Path) -> None:
    save(load(network()), tmp_path / "m.onnx")
    assert [t.name for t in onnx.load(tmp_path / "m.onnx").graph.initializer] == ["layer.weight", "factor"]


def test_a_tensor_of_two_weights_is_written_once(tmp_path: Path) -> None:
    model = load(network())
    weight = model.graph.initializers["layer.weight"]
    twin = ir.Value(name="twin", type=weight.type, shape=weight.shape, const_value=weight.const_value)
    model.graph.register_initializer(twin)
    save(model, tmp_path / "m.onnx", external_data=True)
    assert (tmp_path / "m.onnx.data").stat().st_size < 2 * BIG.nbytes
    for name in ("layer.weight", "twin"):
        tensor = load(tmp_path / "m.onnx").graph.initializers[name].const_value
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), BIG)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_saving_over_the_files_that_the_model_came_from(tmp_path: Path, first: bool, second: bool) -> None:
    path = tmp_path / "m.onnx"
    save(load(network()), path, external_data=first)
    model = load(path)
    # Another tensor in front moves the first one in the file.
    extra = ir.Value(name="extra", const_value=ir.tensor(np.zeros(1000, np.float32), name="extra"))
    order = [extra, *model.graph.initializers.values()]
    model.graph.initializers.clear()
    for value in order:
        model.graph.initializers.add(value)
    save(model, path, external_data=second)
    for source in (model, load(path)):
        tensor = source.graph.initializers["layer.weight"].const_value
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), BIG)


def test_a_model_that_opens_its_file_lazily_survives_saving_over_it(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save(load(network()), path, external_data=True)
    model = ir.load(path)  # not planish's load: tensors that open the file when they are read
    model.graph.initializers["layer.weight"].name = "renamed"
    save(model, path, external_data=False)
    (tmp_path / "m.onnx.data").unlink()
    tensor = model.graph.initializers["renamed"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), BIG)


def test_lazy_weights_are_computed_once_each(tmp_path: Path) -> None:
    model = load(network())
    calls = []

    def compute() -> ir.TensorProtocol:
        calls.append(1)
        return ir.tensor(BIG)

    lazy = ir.LazyTensor(compute, dtype=ir.DataType.FLOAT, shape=ir.Shape(BIG.shape))
    model.graph.initializers["layer.weight"].const_value = lazy
    save(model, tmp_path / "m.onnx")
    assert len(calls) == 1
    np.testing.assert_allclose(run(tmp_path / "m.onnx"), expected(), rtol=1e-5, atol=1e-5)


class Interruption(BaseException):
    """Like KeyboardInterrupt, which pytest would take for its own."""


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("error", [Interruption, ValueError])
def test_an_interrupted_save_leaves_the_old_files(
    tmp_path: Path, external: bool, error: type[BaseException]
) -> None:
    path = tmp_path / "m.onnx"
    save(load(network()), path, external_data=external)
    before = {child.name: child.read_bytes() for child in tmp_path.iterdir()}

    def stop() -> ir.TensorProtocol:
        raise error

    model = load(network())
    weight = model.graph.initializers["layer.weight"]
    weight.const_value = lazy = ir.LazyTensor(stop, dtype=ir.DataType.FLOAT, shape=ir.Shape(BIG.shape))
    with pytest.raises(error):
        save(model, path, external_data=external)
    assert {child.name: child.read_bytes() for child in tmp_path.iterdir()} == before
    assert weight.const_value is lazy


def test_two_files_are_replaced_together_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    save(load(network()), path, external_data=True)
    before = {child.name: child.read_bytes() for child in tmp_path.iterdir()}
    replace = os.replace

    def fail_at_the_model(source: Path, target: Path) -> None:
        if Path(target) == path:
            raise Interruption
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_at_the_model)
    with pytest.raises(Interruption):
        save(load(network(big=BIG + 1)), path, external_data=True)
    assert {child.name: child.read_bytes() for child in tmp_path.iterdir()} == before


def test_a_weight_that_breaks_its_promise_is_named(tmp_path: Path) -> None:
    model = load(network())
    lazy = ir.LazyTensor(lambda: ir.tensor(SMALL), dtype=ir.DataType.FLOAT, shape=ir.Shape(BIG.shape))
    model.graph.initializers["layer.weight"].const_value = lazy
    with pytest.raises(ModelError, match=r"weight 'layer\.weight' .* promised 4800 bytes, but gave 1600"):
        save(model, tmp_path / "m.onnx")
    assert not os.listdir(tmp_path)


def test_targets_that_cannot_be_written(tmp_path: Path) -> None:
    model = load(network())
    with pytest.raises(ModelError, match="is a folder"):
        save(model, tmp_path)
    with pytest.raises(ModelError, match=r"the folder .*nowhere does not exist"):
        save(model, tmp_path / "nowhere" / "m.onnx")


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ModelError, match="cannot be written: No space left on device"):
        save(load(network()), tmp_path / "m.onnx")
    assert not os.listdir(tmp_path)


def test_too_large_for_one_file(tmp_path: Path) -> None:
    def refuse() -> ir.TensorProtocol:
        raise AssertionError("must not be computed")

    model = load(network())
    huge = ir.LazyTensor(refuse, dtype=ir.DataType.FLOAT, shape=ir.Shape([600_000_000]))
    model.graph.register_initializer(ir.Value(name="huge", const_value=huge))
    with pytest.raises(ModelError, match="do not fit into one"):
        save(model, tmp_path / "m.onnx", external_data=False)
    assert not os.listdir(tmp_path)


def test_large_models_get_a_data_file_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The name planish.ir.save is the function; its module is found among the loaded ones.
    monkeypatch.setattr(sys.modules["planish.ir.save"], "_EXTERNAL_ABOVE", 5000)
    save(load(network()), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").exists()


DTYPES = (
    *(ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE, ir.DataType.BOOL),
    *(ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT64),
    *(ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2, ir.DataType.COMPLEX64),
)


@st.composite
def weights(draw: st.DrawFn) -> ir.TensorProtocol:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 40), max_size=3))
    values = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 7, shape)
    return ir.tensor(values.astype(dtype.numpy()), dtype=dtype)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=st.lists(weights(), min_size=1, max_size=6), external=st.booleans())
def test_any_weights_come_back_the_same(
    tmp_path: Path, tensors: list[ir.TensorProtocol], external: bool
) -> None:
    values = [ir.Value(name=f"w{i}", const_value=tensor) for i, tensor in enumerate(tensors)]
    for value, tensor in zip(values, tensors, strict=True):
        value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape)
    nodes = [ir.node("Identity", [value], name=f"n{i}") for i, value in enumerate(values)]
    for node, value in zip(nodes, values, strict=True):
        node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
    graph = ir.Graph(
        [], [n.outputs[0] for n in nodes], nodes=nodes, initializers=values, opset_imports={"": 23}, name="g"
    )
    model = ir.Model(graph, ir_version=11)
    save(model, tmp_path / "m.onnx", external_data=external)
    again = load(tmp_path / "m.onnx", check_weights=False)
    verify(again)
    assert not diff_models(model, again)
    for value, tensor in zip(values, tensors, strict=True):
        found = again.graph.initializers[value.name or ""].const_value
        assert found is not None
        assert found.dtype == tensor.dtype
        assert found.tobytes() == tensor.tobytes()
