"""The printer and the differ."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from planish.ir import clone, diff_models, format_model, format_node, load
from planish.ir.printer import format_bytes, module_scope

TEXT = """
<ir_version: 10, opset_import: ["" : 23, "local" : 1], metadata_props: ["recipe": "W4A16"]>
model (float[n, 2] x, bool c) => (float[n, 3] y)
<float[2, 3] layer.weight = {1, 2, 3, 4, 5, 6}, float[8] other = {0, 0, 0, 0, 0, 0, 0, 0}>
{
  [product] p = MatMul(x, layer.weight)
  [choose] v = If (c) <
    then_branch: graph = yes () => (float[n, 3] t) { [inner] t = Neg(p) },
    else_branch: graph = no () => (float[n, 3] e) { e = Abs(p) }
  >
  [call] y = local.Scale <factor = 2.0> (v)
}
<domain: "local", opset_import: ["" : 23]>
Scale <factor> (a) => (b) { f = Constant <value_float: float = @factor> ()  b = Mul(a, f) }
"""


def model() -> ir.Model:
    text = TEXT.replace("layer.weight", "layer_weight")  # the parser's identifiers have no dots
    result = load(onnx.parser.parse_model(text))
    result.graph.initializers["layer_weight"].name = "layer.weight"
    return result


def test_a_node_is_one_line() -> None:
    graph = model().graph
    assert format_node(graph[0]) == "p: ?[…] = MatMul(x, layer.weight)  # product"
    assert format_node(graph[2]) == "y: FLOAT[n,3] = local::Scale(v) {factor=2.0}  # call"


def test_a_model_is_all_of_its_parts() -> None:
    lines = [line.strip() for line in format_model(model()).splitlines()]
    for expected in (
        "model 'model'  IR 11  opset ai.onnx 23, local 1",
        "recipe: W4A16",
        "input  x: FLOAT[n,2]",
        "weight layer.weight: FLOAT[2,3] = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]",
        "weight other: FLOAT[8]  (32 B)",
        "graph 'yes'",
        "t: FLOAT[n,3] = Neg(p)  # inner",
        "output y: FLOAT[n,3]",
        "function local::Scale(a) -> (b)",
        "f: ?[…] = Constant() {value_float=@factor}",
    ):
        assert any(line.startswith(expected) for line in lines), expected


def test_long_graphs_can_be_cut() -> None:
    text = format_model(model(), max_nodes=1)
    assert "… 2 more nodes" in text
    assert "# call" not in text


def test_nodes_stand_under_their_modules() -> None:
    source = model()
    source.graph[0].metadata_props["pkg.torch.onnx.name_scopes"] = (
        "['', 'layers.0', 'layers.0.proj', 'linear']"
    )
    assert module_scope(source.graph[0]) == "layers.0.proj"
    assert module_scope(source.graph[1]) is None
    assert "# layers.0.proj\n  p: " in format_model(source)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (3 * 10**12, "3000.0 GB")]
)
def test_sizes(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_a_copy_does_not_differ() -> None:
    source = model()
    difference = diff_models(source, clone(source))
    assert not difference
    assert str(difference) == "no differences"


def test_a_tensor_of_the_same_content_does_not_differ() -> None:
    source, copy = model(), model()
    assert source.graph.initializers["other"].const_value is not copy.graph.initializers["other"].const_value
    assert not diff_models(source, copy)


def test_every_kind_of_change_is_found() -> None:
    before = model()
    after = clone(before)
    graph = after.graph
    graph.inputs[0].shape = ir.Shape([4, 2])
    graph[2].attributes["factor"] = ir.AttrFloat32("factor", 3.0)
    graph[0].op_type = "Gemm"
    extra = ir.node("Relu", [graph[0].outputs[0]], name="extra")
    extra.outputs[0].name = "r"
    graph.insert_after(graph[0], extra)
    weight = graph.initializers["layer.weight"]
    weight.const_value = ir.tensor(np.ones((2, 3), np.float32))
    graph.initializers["other"].name = "another"
    difference = diff_models(before, after)
    assert [(c.name, c.before, c.after) for c in difference.interface] == [
        ("input x", "x: FLOAT[n,2]", "x: FLOAT[4,2]")
    ]
    assert difference.ops == {"Gemm": 1, "MatMul": -1, "Relu": 1}
    assert [change.name for change in difference.changed_nodes] == ["product", "call"]
    assert "factor=3.0" in difference.changed_nodes[1].after
    assert difference.added_nodes == ("r: ?[…] = Relu(p)  # extra",)
    assert difference.removed_nodes == ()
    assert (difference.removed_weights, difference.added_weights) == (("other",), ("another",))
    (change,) = difference.changed_weights
    assert change.name == "weight layer.weight"
    assert change.before.startswith("FLOAT[2,3] ")
    assert change.before != change.after
    text = str(difference)
    assert "nodes: 1 added, 0 removed, 2 changed" in text
    assert "+ r: ?[…] = Relu(p)  # extra" in text
    assert not diff_models(before, after, check_content=False).changed_weights


def test_changes_of_size_and_inside_of_branches() -> None:
    before = model()
    after = clone(before)
    half = ir.tensor(np.zeros(8, np.float16))
    after.graph.initializers["other"].const_value = half
    next(node for node in after.graph.all_nodes() if node.name == "inner").op_type = "Abs"
    difference = diff_models(before, after)
    assert difference.bytes_before - difference.bytes_after == 16
    assert [change.name for change in difference.changed_nodes] == ["inner"]
    assert difference.changed_weights[0].after.startswith("FLOAT16[8]")


def test_long_lists_are_cut() -> None:
    before = model()
    after = clone(before)
    for i in range(20):
        after.graph.register_initializer(ir.Value(name=f"w{i}", const_value=ir.tensor([float(i)])))
    assert "+ … 12 more" in str(diff_models(before, after))
