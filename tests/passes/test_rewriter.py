"""The op-indexed driver: hits, fixed point, names, metadata, subgraphs, and the traps of foreign patterns."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from onnxscript.rewriter import pattern
from planish.ir.errors import PassError
from planish.passes.infrastructure.rewriter import (
    ANY_OP,
    PatternRule,
    Replacement,
    Rule,
    apply_rules,
    match_statistics,
    missed,
    rewriting,
)


def model_of(text: str, opset: int = 23) -> ir.Model:
    header = f'<ir_version: 11, opset_import: ["" : {opset}, "local" : 1]>\n'
    return ir.from_proto(onnx.parser.parse_model(header + text))


def ops(graph: ir.Graph) -> list[str]:
    return [node.op_type for node in graph]


class NegNegToNothing(Rule):
    """−(−x) → x."""

    name = "neg-neg"
    roots = ("Neg",)

    def apply(self, node: ir.Node) -> bool:
        inner = node.inputs[0].producer()
        if inner is None or inner.op_type != "Neg":
            return False
        if len(inner.outputs[0].uses()) > 1:
            return missed(node, "the inner Neg has other users")
        return Replacement(node).finish(inner.inputs[0])


class ReluToMax(Rule):
    """relu(x) → max(x, 0): two new things, one of them an initializer."""

    name = "relu-max"
    roots = ("Relu",)

    def apply(self, node: ir.Node) -> bool:
        replacement = Replacement(node)
        zero = replacement.initializer("zero", ir.tensor(np.zeros((), np.float32)))
        kept = replacement.op("Identity", node.inputs[0], like=node.inputs[0])
        return replacement.finish(replacement.op("Max", kept, zero, like=node.outputs[0]))


def test_chain_collapses_to_a_fixed_point():
    body = "".join(f"t{i + 1} = Neg(t{i})\n" for i in range(40))
    model = model_of(f"g (float[2] t0) => (float[2] y) {{ {body} y = Abs(t40) }}")
    assert apply_rules(model, [NegNegToNothing()]) == {"neg-neg": 20}
    assert ops(model.graph) == ["Abs"]
    assert model.graph[0].inputs[0] is model.graph.inputs[0]


def test_chain_whose_end_is_the_output_keeps_the_output_name():
    model = model_of("g (float[2] x) => (float[2] y) { a = Neg(x) y = Neg(a) }")
    apply_rules(model, [NegNegToNothing()])
    assert ops(model.graph) == ["Identity"]
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert model.graph.inputs[0].name == "x"


def test_non_match_is_left_alone_and_says_why():
    model = model_of("g (float[2] x) => (float[2] y, float[2] z) { a = Neg(x) y = Neg(a) z = Abs(a) }")
    with match_statistics() as statistics:
        assert apply_rules(model, [NegNegToNothing()]) == {"neg-neg": 0}
    assert ops(model.graph) == ["Neg", "Neg", "Abs"]
    assert statistics["neg-neg"].tries == 2
    assert statistics["neg-neg"].hits == 0
    assert list(statistics["neg-neg"].misses.values()) == ["the inner Neg has other users"]


def test_statistics_count_tries_and_hits_and_stop_outside_the_block():
    model = model_of("g (float[2] x) => (float[2] y) { a = Neg(x) b = Neg(a) y = Abs(b) }")
    with match_statistics() as statistics:
        apply_rules(model, [NegNegToNothing()])
    apply_rules(model_of("g (float[2] x) => (float[2] y) { y = Neg(x) }"), [NegNegToNothing()])
    assert (statistics["neg-neg"].tries, statistics["neg-neg"].hits) == (2, 1)
    assert statistics["neg-neg"].seconds > 0


def test_new_nodes_and_values_are_named_after_what_they_replace():
    model = model_of("g (float[2] x) => (float[2] z) <float zero = {5.0}> { y = Relu(x) z = Add(y, zero) }")
    model.graph[0].outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    model.graph[0].name = "encoder.act"
    model.graph[0].metadata_props["scope"] = "encoder.layer.0"
    apply_rules(model, [ReluToMax()])
    identity, maximum, _ = model.graph
    assert (maximum.name, maximum.outputs[0].name) == ("encoder.act", "y")
    assert (identity.name, identity.outputs[0].name) == ("encoder.act.Identity", "y.Identity")
    assert identity.metadata_props == maximum.metadata_props == {"scope": "encoder.layer.0"}
    assert maximum.inputs[1].name == "zero_2", "an initializer of that name was there before"
    assert float(model.graph.initializers["zero"].const_value.numpy()) == 5.0
    assert maximum.outputs[0].dtype == ir.DataType.FLOAT


def test_two_rewrites_do_not_share_names():
    model = model_of("g (float[2] x) => (float[2] y) { a = Relu(x) y = Relu(a) }")
    assert apply_rules(model, [ReluToMax()]) == {"relu-max": 2}
    names = [value.name for node in model.graph for value in node.outputs] + list(model.graph.initializers)
    assert len(names) == len(set(names)) == 6


def test_subgraphs_are_rewritten_and_functions_are_not():
    model = model_of(
        """g (bool c, float[2] x) => (float[2] y) {
             t = local.Twice(x)
             y = If (c) <then_branch = a () => (float[2] p) { p0 = Neg(t) p1 = Neg(p0) p = Abs(p1) },
                         else_branch = b () => (float[2] q) { q = Abs(t) }>
           }
           <domain: "local", opset_import: ["" : 23]> Twice (x) => (y) {
             a = Neg(x) b = Neg(a) y = Add(b, b) }"""
    )
    assert apply_rules(model, [NegNegToNothing()]) == {"neg-neg": 1}
    branch = model.graph[1].attributes["then_branch"].as_graph()
    assert ops(branch) == ["Abs"]
    (function,) = model.functions.values()
    assert [node.op_type for node in function] == ["Neg", "Neg", "Add"]


def test_wildcard_rules_see_every_op_in_the_given_order():
    seen = []

    class Look(Rule):
        name = "look"
        roots = (ANY_OP,)

        def apply(self, node: ir.Node) -> bool:
            seen.append(node.op_type)
            return False

    model = model_of("g (float[2] x) => (float[2] y) { a = Neg(x) b = Neg(a) y = Abs(b) }")
    apply_rules(model, [NegNegToNothing(), Look()])
    assert seen == ["Neg", "Abs", "Abs"]


def test_rules_that_undo_each_other_are_named():
    class Swap(Rule):
        def __init__(self, old: str, new: str) -> None:
            self.name, self.roots, self.new = f"{old}-{new}", (old,), new

        def apply(self, node: ir.Node) -> bool:
            replacement = Replacement(node)
            return replacement.finish(replacement.op(self.new, node.inputs[0], like=node.outputs[0]))

    model = model_of("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    with pytest.raises(PassError, match=r"does not end: rule (Neg-Abs|Abs-Neg)"):
        apply_rules(model, [Swap("Neg", "Abs"), Swap("Abs", "Neg")])


def test_an_op_that_the_opset_lacks_is_refused():
    model = model_of("g (float[2] x) => (float[2] y) { y = Neg(x) }", opset=17)
    with rewriting(model), pytest.raises(PassError, match="Gelu, which opset 17"):
        Replacement(model.graph[0]).op("Gelu", model.graph.inputs[0])


def test_a_replacement_outside_of_a_run_says_what_to_do():
    model = model_of("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    with pytest.raises(PassError, match="with rewriting"):
        Replacement(model.graph[0])


def tanh_gelu_rule() -> pattern.RewriteRule:
    """A pattern whose replacement brings an initializer with a fixed name and an op of opset 20."""

    def target(op, x):
        return op.Mul(x, op.Sigmoid(x))

    def replacement(op, x):
        scale = op.initializer(ir.tensor(np.ones((), np.float32)), name="scale")
        return op.Mul(op.Gelu(x), scale)

    return pattern.RewriteRule(target, replacement, name="to-gelu")


TWO_SWISH = "g (float[2] x) => (float[2] y) { a = Sigmoid(x) b = Mul(x, a) c = Sigmoid(b) y = Mul(b, c) }"


def test_pattern_rule_rewrites_and_keeps_initializers_apart():
    model = model_of(TWO_SWISH)
    assert apply_rules(model, [PatternRule(tanh_gelu_rule())]) == {"to-gelu": 2}
    assert ops(model.graph) == ["Gelu", "Mul", "Gelu", "Mul"]
    assert sorted(model.graph.initializers) == ["scale", "scale_2"]
    assert [value.name for value in model.graph.outputs] == ["y"]
    onnx.checker.check_model(ir.to_proto(model))


def test_pattern_rule_refuses_ops_that_the_opset_lacks_and_leaves_no_trace():
    model = model_of(TWO_SWISH, opset=17)
    with match_statistics() as statistics:
        assert apply_rules(model, [PatternRule(tanh_gelu_rule())]) == {"to-gelu": 0}
    assert ops(model.graph) == ["Sigmoid", "Mul", "Sigmoid", "Mul"]
    assert "Gelu, which opset 17" in str(statistics["to-gelu"].misses)
    assert len(model.graph.inputs[0].uses()) == 2, "the refused nodes must not count as users"


def test_pattern_rule_does_not_reach_into_another_graph():
    model = model_of(
        """g (bool c, float[2] x) => (float[2] y) {
             s = Sigmoid(x)
             y = If (c) <then_branch = a () => (float[2] p) { p = Mul(x, s) },
                         else_branch = b () => (float[2] q) { q = Abs(x) }>
           }"""
    )
    assert apply_rules(model, [PatternRule(tanh_gelu_rule())]) == {"to-gelu": 0}
    assert ops(model.graph) == ["Sigmoid", "If"]


def test_pattern_with_two_roots_is_refused():
    rule = pattern.RewriteRule(lambda op, x: (op.Neg(x), op.Abs(x)), lambda op, x: (x, x), name="two")
    with pytest.raises(PassError, match="several roots"):
        PatternRule(rule)
