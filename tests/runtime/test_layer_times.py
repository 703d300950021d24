"""Times of nodes: taken from onnxruntime's profiler, and put together by layer."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest
from planish.ir.errors import InputError
from planish.runtime.layer_times import NodeTime, by_layer, node_times


@pytest.fixture
def path(tmp_path):
    text = """<ir_version: 10, opset_import: ["": 21]>
        net (float[b, 64] x) => (float[b, 64] y) { h = Tanh(x)  y = Exp(h) }"""
    model = onnx.parser.parse_model(text)
    for node, name in zip(model.graph.node, ("first", "second"), strict=True):
        node.name = name
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_every_node_is_timed_in_the_order_of_the_run(path, tmp_path):
    before = set(tmp_path.iterdir())
    times = node_times(path, {"x": np.ones((256, 64), np.float32)}, {}, repeats=3, warmup=1)
    assert [(time.node, time.op) for time in times] == [("first", "Tanh"), ("second", "Exp")]
    assert all(0 < time.ms < 1000 for time in times)
    assert set(tmp_path.iterdir()) == before  # the profile is gone


def test_inputs_that_do_not_fit_are_an_input_error(path):
    with pytest.raises(InputError, match="inputs do not match"):
        node_times(path, {"z": np.ones((2, 64), np.float32)}, {})


def test_times_of_nodes_go_to_the_layer_that_they_replaced():
    times = [NodeTime("/fc", "MatMul", 1.0), NodeTime("/fc.Mul.1/MatMulScaleFusion", "Mul", 0.5)]
    times += [NodeTime("/fc2", "Relu", 0.25), NodeTime("other", "Relu", 0.25)]
    found = {(time.name, time.nodes, time.ms, time.is_layer) for time in by_layer(times, {"/fc": "model.fc"})}
    assert found == {("model.fc", 2, 1.5, True), ("Relu", 2, 0.5, False)}
