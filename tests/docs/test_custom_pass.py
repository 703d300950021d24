"""The pass that the documentation writes, step by step: a graph before, the graph expected, and twins."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime
import planish
import pytest
from docs_helpers import example
from planish.passes import PassContext, Pipeline
from planish.passes.infrastructure.options import format_pass

custom_pass = example("custom_pass")
MultiplyByReciprocals = custom_pass.MultiplyByReciprocals
CONTEXT = PassContext(target=planish.get_target("portable"))


# --8<-- [start:helpers]
def graph(body: str, constants: dict[str, list[float]], kind: str = "float") -> ir.Model:
    """y from x and s, with constants; ``body`` is ONNX text."""
    dtype = {"float": np.float32, "int64": np.int64}[kind]
    signature = f"({kind}[n, 3] x, {kind}[3] s) => ({kind}[n, 3] y)"
    model = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["": 23]> g {signature} {{ {body} }}')
    for name, values in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(values, dtype), name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def nodes(model: ir.Model) -> list[tuple[str, ...]]:
    """Each node as its op, what it reads, and what it gives."""
    return [(node.op_type, *(v.name for v in (*node.inputs, *node.outputs))) for node in model.graph]


def run(model: ir.Model, **feeds: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return session.run(None, feeds)[0]


# --8<-- [end:helpers]


# --8<-- [start:match]
def test_division_by_a_constant_becomes_a_multiplication():
    before = graph("y = Div(x, c)", {"c": [2.0, 4.0, 5.0]})
    expected = graph("y = Mul(x, c_reciprocal)", {"c_reciprocal": [0.5, 0.25, 0.2]})
    x, s = np.float32([[1, 2, 3], [4, 5, 6]]), np.ones(3, np.float32)
    y = run(before, x=x, s=s)

    result = MultiplyByReciprocals().run(before, CONTEXT)

    assert result.modified
    assert str(result.coverage) == "1 of 1 divisions"
    assert nodes(before) == nodes(expected)
    np.testing.assert_array_equal(run(before, x=x, s=s), run(expected, x=x, s=s))
    np.testing.assert_allclose(run(before, x=x, s=s), y, rtol=1e-6)


# --8<-- [end:match]


# --8<-- [start:twins]
@pytest.mark.parametrize(
    ("body", "constants", "kind", "why"),
    [
        ("y = Div(x, s)", {}, "float", "the divisor is computed"),
        ("y = Div(x, c)", {"c": [2, 4, 5]}, "int64", "the divisor is INT64"),
        ("y = Div(x, c)", {"c": [2.0, 0.0, 5.0]}, "float", "a reciprocal is infinite"),
    ],
    ids=["computed", "integers", "zero"],
)
def test_twins_that_must_not_match(body, constants, kind, why):
    model = graph(body, constants, kind)
    before = nodes(model)
    result = MultiplyByReciprocals().run(model, CONTEXT)
    assert not result.modified
    assert nodes(model) == before
    assert [skipped.reason for skipped in result.coverage.skipped] == [why]


# --8<-- [end:twins]


def test_exact_leaves_divisors_that_are_no_powers_of_two():
    model = graph("h = Div(x, c) y = Div(h, d)", {"c": [2.0, 0.25, 1024.0], "d": [2.0, 3.0, 4.0]})
    result = MultiplyByReciprocals(exact=True).run(model, CONTEXT)
    assert [op for op, *_ in nodes(model)] == ["Mul", "Div"]
    assert [skipped.reason for skipped in result.coverage.skipped] == ["the divisor is no power of two"]


def test_its_options_are_those_of_pipelines():
    assert format_pass(MultiplyByReciprocals(exact=True)) == "multiply-by-reciprocals{exact=true}"
    assert [p.name for p in Pipeline.of(["canonicalize", MultiplyByReciprocals()])][
        1
    ] == "multiply-by-reciprocals"
