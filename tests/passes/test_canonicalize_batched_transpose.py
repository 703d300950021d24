"""Keys transposed by way of a flat batch: one Transpose after, and twins that must stay."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from planish.codegen import get_target
from planish.passes.canonicalize import Canonicalize
from planish.passes.infrastructure.base import PassContext
from planish.runtime.reference import run_model

X = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)


def model_of(*, flat="[6, 4, 5]", perm="[0, 2, 1]", shape="[2, 3, 5, 4]") -> ir.Model:
    def vector(text: str) -> str:
        numbers = [int(part) for part in text.strip("[]").split(",")]
        return f"int64[{len(numbers)}] NAME = {{{', '.join(map(str, numbers))}}}"

    text = f"""<ir_version: 10, opset_import: ["" : 23]>
        g (float[2, 3, 4, 5] x) => (y)
        <{vector(flat).replace("NAME", "flat")}, {vector(shape).replace("NAME", "shape")}>
        {{ f = Reshape(x, flat) t = Transpose <perm = {perm}> (f) y = Reshape(t, shape) }}"""
    return ir.from_proto(onnx.parser.parse_model(text))


def canonicalize(model: ir.Model) -> list[str]:
    Canonicalize().run(model, PassContext(target=get_target("portable")))
    return [node.op_type for node in model.graph]


def test_becomes_one_transpose():
    model = model_of()
    before = run_model(model, {"x": X})["y"]
    assert canonicalize(model) == ["Transpose"]
    # Moving elements rounds nothing.
    np.testing.assert_array_equal(run_model(model, {"x": X})["y"], before)
    np.testing.assert_array_equal(before, np.swapaxes(X, 2, 3))


@pytest.mark.parametrize(
    "change",
    [
        {"perm": "[1, 2, 0]"},  # another transposition
        {"flat": "[2, 12, 5]", "shape": "[2, 3, 5, 4]"},  # the flat batch is not batch times heads
        {"shape": "[3, 2, 5, 4]"},  # comes back with other leading axes
        {"shape": "[2, 3, 4, 5]"},  # comes back with the axes as they were
    ],
)
def test_other_shapes_are_left_alone(change):
    model = model_of(**change)
    before = run_model(model, {"x": X})["y"]
    assert canonicalize(model) == ["Reshape", "Transpose", "Reshape"]
    np.testing.assert_array_equal(run_model(model, {"x": X})["y"], before)


def test_unknown_shape_is_left_alone():
    text = """<ir_version: 10, opset_import: ["" : 23]>
        g (float[a, b, s, 5] x, int64[3] flat, int64[4] shape) => (y)
        { f = Reshape(x, flat) t = Transpose <perm = [0, 2, 1]> (f) y = Reshape(t, shape) }"""
    assert canonicalize(ir.from_proto(onnx.parser.parse_model(text))) == ["Reshape", "Transpose", "Reshape"]
