"""Loading: what is read, and the one clear error for everything that cannot be."""

from __future__ import annotations

import sys
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from onnx import TensorProto, helper, numpy_helper
from planish.ir import diff_models, infer_shapes, load, release, verify
from planish.ir.errors import ModelError

LINEAR = """
<ir_version: 8, opset_import: ["" : 17]>
linear (float[batch, 3] x) => (float[batch, 2] y)
<float[3, 2] w = {1, 2, 3, 4, 5, 6}>
{ y = MatMul(x, w) }
"""


def linear(weight: np.ndarray | None = None) -> onnx.ModelProto:
    model = onnx.parser.parse_model(LINEAR)
    if weight is not None:
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    return model


def write_external(folder: Path) -> Path:
    """The linear with its weight in ``weights.bin``."""
    model = linear(WEIGHT)
    onnx.save(model, folder / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    return folder / "m.onnx"


def weight_of(model: ir.Model) -> np.ndarray:
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    return tensor.numpy()


WEIGHT = np.array([[1, 2], [3, 4], [5, 6]], np.float32)


@pytest.fixture(params=["small file", "large file"])
def either_reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of reading a file: by protobuf, and by walking over its weights."""
    if request.param == "large file":
        monkeypatch.setattr(sys.modules["planish.ir.load"], "_MAPPED_FROM", 1)
        monkeypatch.setattr(sys.modules["planish.ir.skeleton"], "_LEFT_FROM", 1)


def test_a_path_a_message_and_a_model_give_the_same(tmp_path: Path) -> None:
    onnx.save(linear(), tmp_path / "m.onnx")
    for source in (tmp_path / "m.onnx", str(tmp_path / "m.onnx"), linear(), ir.from_proto(linear())):
        model = load(source)
        assert model.opset_imports[""] == 23
        assert [node.op_type for node in model.graph] == ["MatMul"]
        np.testing.assert_array_equal(weight_of(model), WEIGHT)


def test_a_model_that_is_passed_in_is_not_changed() -> None:
    source = ir.from_proto(linear())
    model = load(source)
    model.graph.outputs[0].dtype = ir.DataType.FLOAT16
    model.graph.initializers["w"].name = "renamed"
    assert source.opset_imports[""] == 17
    assert source.graph.outputs[0].dtype == ir.DataType.FLOAT
    assert "w" in source.graph.initializers


def test_a_message_is_not_changed_by_renaming_a_weight() -> None:
    source = linear()
    model = load(source)
    model.graph.initializers["w"].name = "renamed"
    ir.to_proto(model)
    assert source.graph.initializer[0].name == "w"


def test_external_weights_are_mapped(tmp_path: Path) -> None:
    model = load(write_external(tmp_path))
    np.testing.assert_array_equal(weight_of(model), WEIGHT)
    release(model.graph.initializers["w"].const_value)
    np.testing.assert_array_equal(weight_of(model), WEIGHT)


@pytest.mark.usefixtures("either_reader")
def test_files_with_their_weights_inside(tmp_path: Path) -> None:
    model = linear(WEIGHT)
    model.graph.initializer.insert(0, helper.make_tensor("c", TensorProto.FLOAT, [2], [7, 8]))
    model.graph.initializer.append(helper.make_tensor("t", TensorProto.STRING, [1], ["text"]))
    model.graph.initializer[1].doc_string = "kept"
    model.metadata_props.add(key="recipe", value="kept")
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    expected, found = load(model), load(path)
    path.unlink()  # a map outlives the name of its file
    assert not diff_models(expected, found)
    assert list(found.graph.initializers) == ["c", "w", "t"]
    np.testing.assert_array_equal(weight_of(found), WEIGHT)
    assert found.graph.initializers["w"].const_value.doc_string == "kept"  # type: ignore[union-attr]
    assert found.metadata_props == {"recipe": "kept"}


@given(content=st.binary(max_size=200))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.usefixtures("either_reader")
def test_any_bytes_end_in_one_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ModelError):
        load(tmp_path / "m.onnx")


def test_a_loaded_model_keeps_its_weights_when_the_file_is_replaced(tmp_path: Path) -> None:
    model = load(write_external(tmp_path), check_weights=False)
    other = tmp_path / "other.bin"
    other.write_bytes(bytes(24))
    other.replace(tmp_path / "weights.bin")
    np.testing.assert_array_equal(weight_of(model), WEIGHT)


def test_a_model_and_data_that_are_links_into_one_folder(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    write_external(blobs)
    (snapshot / "m.onnx").symlink_to(blobs / "m.onnx")
    (snapshot / "weights.bin").symlink_to(blobs / "weights.bin")
    np.testing.assert_array_equal(weight_of(load(snapshot / "m.onnx")), WEIGHT)


@pytest.mark.parametrize(
    "dtype", [TensorProto.INT4, TensorProto.UINT4, TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN]
)
def test_small_types_keep_their_values(tmp_path: Path, dtype: int) -> None:
    values = [0, 1, 2, 3, 4, 5, 6]
    tensor = helper.make_tensor("w", dtype, [7], values)
    cast = helper.make_node("Cast", ["w"], ["y"], to=TensorProto.FLOAT)
    graph = helper.make_graph(
        [cast], "g", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [7])], [tensor]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="d", size_threshold=0)
    for source in (model, tmp_path / "m.onnx"):
        np.testing.assert_array_equal(weight_of(load(source)).astype(np.float32), values)


def test_old_files_list_weights_as_inputs() -> None:
    model = linear()
    model.ir_version = 3
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [3, 2]))
    assert [value.name for value in load(model).graph.inputs] == ["x"]


def test_weights_that_are_inputs_of_newer_files_stay_overridable() -> None:
    model = linear()
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [3, 2]))
    assert [value.name for value in load(model).graph.inputs] == ["x", "w"]


# --- what cannot be loaded -----


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing\.onnx does not exist"):
        load(tmp_path / "nothing.onnx")


def test_folder_names_the_models_in_it(tmp_path: Path) -> None:
    onnx.save(linear(), tmp_path / "found.onnx")
    with pytest.raises(ModelError, match=r"is a folder.*found\.onnx"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"this is a text file\n", "is not an ONNX model"),
        (b"PK\x03\x04 and so on", "torch checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b'\x10\x00\x00\x00\x00\x00\x00\x00{"w":1}', "safetensors"),
    ],
)
def test_files_that_are_no_model(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load(tmp_path / "m.onnx")


@pytest.mark.usefixtures("either_reader")
def test_truncated_file_at_every_length(tmp_path: Path) -> None:
    content = linear().SerializeToString()
    for length in range(len(content)):
        (tmp_path / "m.onnx").write_bytes(content[:length])
        with pytest.raises(ModelError):
            load(tmp_path / "m.onnx")


def test_another_type_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot load a dict"):
        load({})  # type: ignore[arg-type]


def test_missing_data_file_is_named(tmp_path: Path) -> None:
    path = write_external(tmp_path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"weight 'w' is stored in .*weights\.bin, which does not exist"):
        load(path)


def test_short_data_file(tmp_path: Path) -> None:
    path = write_external(tmp_path)
    (tmp_path / "weights.bin").write_bytes(bytes(23))
    with pytest.raises(ModelError, match=r"weights\.bin, which is 23 bytes long"):
        load(path)


def test_data_of_another_length_than_the_shape_says(tmp_path: Path) -> None:
    path = write_external(tmp_path)
    model = onnx.load(path, load_external_data=False)
    next(e for e in model.graph.initializer[0].external_data if e.key == "length").value = "20"
    onnx.save(model, path)
    with pytest.raises(ModelError, match="needs 24 bytes, but its external data is 20"):
        load(path)


@pytest.mark.parametrize("location", ["../weights.bin", "link.bin"])
def test_data_outside_of_the_folder(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = write_external(folder)
    (folder / "weights.bin").rename(tmp_path / "weights.bin")
    (folder / "link.bin").symlink_to(tmp_path / "weights.bin")
    model = onnx.load(path, load_external_data=False)
    next(e for e in model.graph.initializer[0].external_data if e.key == "location").value = location
    onnx.save(model, path)
    with pytest.raises(ModelError, match="lies outside of its folder"):
        load(path)


def test_damaged_weight_inside_the_file() -> None:
    model = linear(WEIGHT)
    model.graph.initializer[0].raw_data = bytes(20)
    with pytest.raises(ModelError, match=r"weight 'w' .* needs 24 bytes, found 20"):
        load(model)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers(bad: float) -> None:
    weight = WEIGHT.copy()
    weight[2, 1] = bad
    with pytest.raises(ModelError, match=rf"weight 'w' holds {bad} at index \[2, 1\]"):
        load(linear(weight))
    load(linear(weight), check_weights=False)


def test_infinity_in_a_mask_is_no_defect() -> None:
    mask = np.array([0, -np.inf, 0], np.float32)
    model = onnx.parser.parse_model(
        LINEAR.replace("MatMul", "Add")
        .replace("[3, 2]", "[3]")
        .replace("{1, 2, 3, 4, 5, 6}", "{1, 2, 3}")
        .replace("[batch, 2]", "[batch, 3]")
    )
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(mask, "w"))
    np.testing.assert_array_equal(weight_of(load(model)), mask)


def test_old_opset() -> None:
    model = linear()
    model.opset_import[0].version = 12
    with pytest.raises(ModelError, match="opset 12; models of opset 13 or newer"):
        load(model)


def test_two_weights_of_one_name() -> None:
    model = linear()
    model.graph.initializer.append(model.graph.initializer[0])
    with pytest.raises(ModelError, match="two initializers are called 'w'"):
        load(model)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("MatMul(x, w)", "MatMul(x, nowhere)", "input 'nowhere' is no graph input"),
        ("y = MatMul(x, w)", "other = MatMul(x, w)", "output 'y' of graph 'linear' is not produced"),
        ("y = MatMul(x, w)", "y = Add(z, x) z = Relu(y)", "graph 'linear' has a cycle"),
        ("y = MatMul(x, w)", "y = MatMul(x, w) y = MatMul(x, w)", "'y'"),
        ("y = MatMul(x, w)", "y = custom.Op(x, w)", "domain 'custom' is not imported"),
    ],
)
def test_malformed_graphs(before: str, after: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(onnx.parser.parse_model(LINEAR.replace(before, after)))


def test_empty_graph() -> None:
    model = helper.make_model(helper.make_graph([], "g", [], []))
    with pytest.raises(ModelError, match="the graph is empty"):
        load(model)


def test_sparse_weights() -> None:
    model = linear()
    model.graph.sparse_initializer.add()
    with pytest.raises(ModelError, match="sparse"):
        load(model)


def test_loaded_models_are_sound() -> None:
    verify(load(linear()))


def test_unsorted_nodes_are_sorted() -> None:
    text = LINEAR.replace("y = MatMul(x, w)", "y = Relu(z) z = MatMul(x, w)")
    assert [node.op_type for node in load(onnx.parser.parse_model(text)).graph] == ["MatMul", "Relu"]


def test_kinds_of_values_that_the_ir_does_not_have() -> None:
    model = linear()
    model.graph.output[0].type.sequence_type.elem_type.map_type.key_type = TensorProto.INT64
    with pytest.raises(ModelError, match="not supported") as caught:
        load(model)
    assert len(str(caught.value).splitlines()) == 1


def test_text_that_is_no_text() -> None:
    content = linear(WEIGHT).SerializeToString().replace(b"linear", b"l\xffnear")
    with pytest.raises(ModelError, match="not UTF-8"):
        load(onnx.ModelProto.FromString(content))


def test_an_attribute_without_a_value() -> None:
    model = linear()
    model.graph.node[0].attribute.add(name="axis")
    with pytest.raises(ModelError, match="attribute 'axis' has no value"):
        load(model)


def test_a_weight_of_no_type() -> None:
    model = linear(WEIGHT)
    model.graph.initializer[0].data_type = TensorProto.UNDEFINED
    with pytest.raises(ModelError, match="weight 'w'"):
        load(model)


@given(position=st.integers(0, 10**6), byte=st.integers(0, 255))
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_one_damaged_byte_is_read_or_refused(position: int, byte: int) -> None:
    content = bytearray(linear(WEIGHT).SerializeToString())
    content[position % len(content)] = byte
    try:
        model = onnx.ModelProto.FromString(bytes(content))
    except DecodeError:
        return
    try:
        loaded = load(model)
    except ModelError:
        return
    infer_shapes(loaded)
    ir.to_proto(loaded).SerializeToString()


def test_text_weights_of_another_length() -> None:
    model = linear(WEIGHT)
    model.graph.initializer.append(helper.make_tensor("t", TensorProto.STRING, [1], ["text"]))
    model.graph.initializer[1].dims[0] = 2
    with pytest.raises(ModelError, match=r"weight 't' .* needs 2 strings, found 1"):
        load(model)


def test_a_message_finds_its_data_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = onnx.load(write_external(tmp_path), load_external_data=False)
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(weight_of(load(message)), WEIGHT)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"stored in weights\.bin, which does not exist"):
        load(message)


def test_a_model_that_opens_its_files_lazily_is_mapped(tmp_path: Path) -> None:
    source = ir.load(write_external(tmp_path))
    np.testing.assert_array_equal(weight_of(load(source)), WEIGHT)
    assert isinstance(source.graph.initializers["w"].const_value, ir.ExternalTensor)


def test_an_unsorted_model_in_memory_is_refused_and_not_changed() -> None:
    source = ir.from_proto(linear())
    extra = ir.node("Relu", [source.graph[0].outputs[0]], name="early")
    source.graph.insert_before(source.graph[0], extra)
    with pytest.raises(ModelError, match="'early': input 'y' is used before"):
        load(source)
    assert source.graph[0] is extra
