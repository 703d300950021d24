"""The structural rules: each one broken on purpose, and named with its node."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from planish.ir import clone, load, verify
from planish.ir.errors import VerificationError

TEXT = """
<ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
chain (float[n, 2] x, bool c) => (float[n, 2] y)
<float[2, 2] w = {1, 2, 3, 4}>
{
  [first] a = MatMul(x, w)
  [second] b = Relu(a)
  [choose] d = If <
    then_branch: graph = then () => (float[n, 2] t) { [inner] t = Neg(b) },
    else_branch: graph = else () => (float[n, 2] e) { e = Abs(b) }
  > (c)
  [call] y = planish.Scale <factor = 2.0> (d)
}
<domain: "planish", opset_import: ["" : 23]>
Scale <factor> (v) => (r)
{
  f = Constant <value_float: float = @factor> ()
  r = Mul(v, f)
}
"""


def chain() -> ir.Model:
    return load(onnx.parser.parse_model(TEXT))


def node(model: ir.Model, name: str) -> ir.Node:
    return next(n for n in model.graph.all_nodes() if n.name == name)


def use_before_definition(model: ir.Model) -> None:
    first = node(model, "first")
    model.graph.remove(first)
    model.graph.insert_after(node(model, "second"), first)


def value_from_nowhere(model: ir.Model) -> None:
    node(model, "second").replace_input_with(0, ir.Value(name="nowhere"))


def value_of_a_subgraph(model: ir.Model) -> None:
    node(model, "call").replace_input_with(0, node(model, "inner").outputs[0])


def removed_node(model: ir.Model) -> None:
    second = node(model, "second")
    node(model, "inner").replace_input_with(0, second.inputs[0])
    model.graph.remove(second)


def stale_reader(model: ir.Model) -> None:
    ir.node("Neg", [node(model, "first").outputs[0]])


def one_name_twice(model: ir.Model) -> None:
    node(model, "second").outputs[0].name = "a"


def inner_name_of_an_outer_value(model: ir.Model) -> None:
    node(model, "inner").outputs[0].name = "x"


def unnamed_value(model: ir.Model) -> None:
    node(model, "second").outputs[0].name = ""


def unknown_domain(model: ir.Model) -> None:
    node(model, "second").domain = "elsewhere"


def missing_function(model: ir.Model) -> None:
    node(model, "call").op_type = "Shift"


def missing_attribute(model: ir.Model) -> None:
    del node(model, "call").attributes["factor"]


def too_many_operands(model: ir.Model) -> None:
    call = node(model, "call")
    call.resize_inputs(2)
    call.replace_input_with(1, model.graph.inputs[0])


def weight_without_data(model: ir.Model) -> None:
    model.graph.initializers["w"].const_value = None


def weight_of_another_shape(model: ir.Model) -> None:
    model.graph.initializers["w"].const_value = ir.tensor(np.ones((3, 3), np.float32))


def weight_of_another_type(model: ir.Model) -> None:
    model.graph.initializers["w"].const_value = ir.tensor(np.ones((2, 2), np.float16))


def unproduced_output(model: ir.Model) -> None:
    model.graph.outputs.append(ir.Value(name="more"))


def function_with_weights(model: ir.Model) -> None:
    (function,) = model.functions.values()
    function.graph.register_initializer(ir.Value(name="w", const_value=ir.tensor([1.0])))


def function_that_reads_the_graph(model: ir.Model) -> None:
    (function,) = model.functions.values()
    function.graph[1].replace_input_with(1, model.graph.inputs[0])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (use_before_definition, "node Relu 'second': input 'a' is used before the node that produces it"),
        (value_from_nowhere, "node Relu 'second': input 'nowhere' is no graph input"),
        (value_of_a_subgraph, "node Scale 'call': input 't' is produced in a graph that is not around"),
        (removed_node, "'b' is produced in a graph that is not around this one"),
        (stale_reader, "node MatMul 'first': 'a' is read 1 times, but lists 2 uses"),
        (one_name_twice, "node Relu 'second': two values are called 'a'"),
        (inner_name_of_an_outer_value, "node Neg 'inner': two values are called 'x'"),
        (unnamed_value, "node Relu 'second': output 0 is used but has no name"),
        (unknown_domain, "node Relu 'second': domain 'elsewhere' is not imported"),
        (missing_function, "node Shift 'call': the model has no function planish::Shift"),
        (missing_attribute, "node Scale 'call': Scale needs the attribute 'factor'"),
        (too_many_operands, "node Scale 'call': Scale has 1 inputs and 1 outputs, the node 2 and 1"),
        (weight_without_data, "initializer 'w' of graph 'chain' has no data"),
        (weight_of_another_shape, r"initializer 'w' of graph 'chain' has shape \[2,2\], but its data"),
        (weight_of_another_type, "initializer 'w' of graph 'chain' is FLOAT, but its data is FLOAT16"),
        (unproduced_output, "output 'more' of graph 'chain' is not produced"),
        (function_with_weights, "function planish::Scale owns initializers"),
        (function_that_reads_the_graph, "node Mul .*: input 'x' is no graph input"),
    ],
)
def test_a_broken_rule_is_named(break_it: Callable[[ir.Model], None], message: str) -> None:
    model = chain()
    verify(model)
    break_it(model)
    with pytest.raises(VerificationError, match=message):
        verify(model)


def test_the_nodes_around_are_shown() -> None:
    model = chain()
    unknown_domain(model)
    with pytest.raises(VerificationError) as caught:
        verify(model)
    (note,) = caught.value.__notes__
    lines = note.splitlines()
    assert [line.startswith(">") for line in lines] == [False, True, False, False]
    assert "= MatMul(x, w)" in lines[0]
    assert "# second" in lines[1]


def test_optional_outputs_need_no_name() -> None:
    text = TEXT.replace("b = Relu(a)", "b, _ = Dropout(a)")
    model = onnx.parser.parse_model(text)
    model.graph.node[1].output[1] = ""
    verify(load(model))


def test_a_branch_may_return_an_outer_value() -> None:
    model = chain()
    branch = node(model, "choose").attributes["then_branch"].as_graph()
    inner = node(model, "inner")
    branch.outputs[0] = node(model, "second").outputs[0]
    branch.remove(inner, safe=True)
    verify(model)


def test_branches_may_share_names() -> None:
    model = chain()
    for branch in ("then_branch", "else_branch"):
        node(model, "choose").attributes[branch].as_graph()[0].outputs[0].name = "same"
    verify(model)


def test_a_clone_is_independent_and_shares_tensors() -> None:
    model = chain()
    model.meta["note"] = "kept"
    model.metadata_props["recipe"] = "kept"
    copy = clone(model)
    verify(copy)
    assert copy.meta["note"] == "kept"
    assert copy.metadata_props["recipe"] == "kept"
    assert copy.graph.initializers["w"].const_value is model.graph.initializers["w"].const_value
    copy.graph.inputs[0].dtype = ir.DataType.FLOAT16
    copy.graph.inputs[0].shape[0] = 5
    node(copy, "inner").outputs[0].dtype = ir.DataType.FLOAT16
    node(copy, "call").attributes.pop("factor")
    copy.functions.clear()
    copy.graph.outputs[0].name = "changed"
    assert model.graph.inputs[0].dtype == ir.DataType.FLOAT
    assert str(model.graph.inputs[0].shape) == "[n,2]"
    assert node(model, "inner").outputs[0].dtype == ir.DataType.FLOAT
    assert model.graph.outputs[0].name == "y"
    verify(model)


def test_cloning_an_unsorted_graph_says_so() -> None:
    model = chain()
    use_before_definition(model)
    with pytest.raises(VerificationError, match="used before"):
        clone(model)
