"""Windows of a graph: what they read, what they give, and that they compute the same."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from planish.ir import infer_shapes, load, verify
from planish.ir.errors import InputError
from planish.ir.window import window
from planish.runtime.reference import run_model

FEEDS = {"x": np.array([1.0, -2.0, 3.0], np.float32), "flag": np.array(True)}


def make_model() -> ir.Model:
    """Five nodes, of which one reads a weight and one captures a value in its subgraphs."""
    model = load(
        onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["": 21]>
            net (float[n] x, bool flag) => (float[n] y, float[n] z) <float[1] w = {2.0}>
            { a = Neg(x)  b = Mul(a, w)
              c = If (flag) <then_branch = yes () => (float[n] t) { t = Abs(b) },
                             else_branch = no () => (float[n] e) { e = Exp(x) }>
              y = Neg(c)  z = Add(y, a) }"""
        )
    )
    infer_shapes(model)
    return model


@pytest.mark.parametrize(
    ("start", "stop", "inputs", "outputs"),
    [
        (0, 5, ["x", "flag"], ["y", "z"]),
        (0, 1, ["x"], ["a"]),
        (1, 2, ["a"], ["b"]),
        (2, 3, ["flag", "b", "x"], ["c"]),
        (1, 4, ["a", "flag", "x"], ["y"]),
        (3, 5, ["c", "a"], ["y", "z"]),
    ],
)
def test_a_window_reads_what_comes_from_before_and_computes_the_same(start, stop, inputs, outputs):
    model = make_model()
    found = window(model, start, stop)
    verify(found)
    assert [value.name for value in found.graph.outputs] == outputs
    assert sorted(value.name for value in found.graph.inputs) == sorted(inputs)
    values = {**FEEDS, **run_model(model, FEEDS, ["a", "b", "c"])}
    given = run_model(found, {name: values[name] for name in inputs})
    expected = run_model(model, FEEDS, outputs)
    for name in outputs:
        np.testing.assert_array_equal(given[name], expected[name])


def test_only_what_an_output_needs_stays():
    found = window(make_model(), 0, 5, ["b"])
    assert [node.op_type for node in found.graph] == ["Neg", "Mul"]
    assert [value.name for value in found.graph.inputs] == ["x"]


def test_the_model_is_left_alone_and_shares_its_weights():
    model = make_model()
    found = window(model, 1, 2)
    found.graph.initializers["w"].name = "other"
    found.graph.inputs[0].shape = ir.Shape([1])
    assert [node.op_type for node in model.graph] == ["Neg", "Mul", "If", "Neg", "Add"]
    assert "w" in model.graph.initializers


def test_a_window_that_gives_nothing_is_refused():
    with pytest.raises(InputError, match="nothing reads"):
        window(make_model(), 0, 1, ["missing"])
