"""The hash of a model's weights: the same in whatever way they are read, another for every change."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from planish.ir import load
from planish.ir.content_hash import content_hash
from planish.ir.load import LOADED_KEY

WEIGHTS = {
    "w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
    "half": np.arange(6, dtype=np.float16),
    "count": np.array([1, 2, 3], np.int64),
    "long": np.arange((1 << 20) + 3, dtype=np.float32),  # read in two pieces
    "scalar": np.array(2.0, np.float32),
    "empty": np.zeros((0, 4), np.float32),
}


def model_of(weights: dict[str, np.ndarray]) -> ir.Model:
    """A graph that holds these weights and reads none of them."""
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    nodes = [onnx.helper.make_node("Identity", ["x"], ["y"])]
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], tensors)
    return ir.from_proto(
        onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 23)])
    )


def test_it_is_made_of_the_reading_that_checks_the_weights():
    loaded = load(model_of(WEIGHTS), hash_weights=True)
    assert loaded.meta[LOADED_KEY] == content_hash(loaded)
    assert LOADED_KEY not in load(model_of(WEIGHTS)).meta


def test_it_is_the_hash_of_names_types_shapes_and_bytes():
    expected = hashlib.sha256()
    for name in sorted(WEIGHTS):
        array = WEIGHTS[name]
        dtype, shape = ir.DataType.from_numpy(array.dtype), tuple(array.shape)
        own = hashlib.sha256(f"{name}:{dtype}:{shape};".encode())
        own.update(array.tobytes())
        expected.update(own.digest())
    assert content_hash(load(model_of(WEIGHTS))) == f"sha256:{expected.hexdigest()}"


@pytest.mark.parametrize(
    "changed",
    [
        {"w": WEIGHTS["w"] + np.float32(1e-6)},
        {"w": WEIGHTS["w"].reshape(4, 3)},
        {"count": WEIGHTS["count"].astype(np.int32)},
        {"more": np.zeros(2, np.float32)},
    ],
    ids=["number", "shape", "type", "name"],
)
def test_any_change_makes_another(changed):
    models = load(model_of(WEIGHTS), hash_weights=True), load(model_of(WEIGHTS | changed), hash_weights=True)
    assert models[0].meta[LOADED_KEY] != models[1].meta[LOADED_KEY]
