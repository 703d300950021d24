"""Bisection: what broken means, and that the culprit is found wherever it stands."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from planish.codegen import get_target
from planish.ir import clone
from planish.ir.errors import InputError
from planish.passes.infrastructure.base import Contract, Fact, Pass, PassContext, PassResult
from planish.passes.infrastructure.bisect import BisectResult, bisect
from planish.passes.infrastructure.pipeline import Pipeline
from planish.passes.infrastructure.rewriter import Rule, apply_rules


def load_benchmark():
    """The script in benchmarks/, whose wrong passes are the test's."""
    path = Path(__file__).parents[2] / "benchmarks" / "contract.py"
    spec = importlib.util.spec_from_file_location("benchmarks_contract", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


benchmark = load_benchmark()


@pytest.mark.parametrize(
    ("kind", "layer", "position"),
    [(kind, layer, 2 + 2 * (index % 4)) for index, (kind, layer) in enumerate(benchmark.WRONG_PASSES)],
    ids=[kind.name for kind, _ in benchmark.WRONG_PASSES],
)
def test_a_wrong_pass_among_ten_is_caught_named_and_found(kind, layer, position):
    model, examples = benchmark.build_model(), benchmark.make_examples()
    case = benchmark.run_case(kind(layer=layer), position, model, examples)
    assert len(case.pipeline) == 10
    assert case.caught is not None
    assert (case.caught.pass_name, case.caught.first.layer) == (kind.name, layer)
    assert case.caught.first.tensor.startswith(("model.layers.", "logits"))
    assert case.found.culprit == case.wrong
    assert case.found.position == position
    assert case.found.violation.first == case.caught.first
    assert case.is_right


def test_a_wrong_rewrite_is_found_inside_its_pass():
    model, examples = benchmark.build_model(), benchmark.make_examples()
    found = benchmark.run_case(benchmark.WrongRule(layer="model.layers.0.act"), 4, model, examples).found
    assert (found.rewrite.rule, found.rewrite.node) == ("gelu_to_relu", "model.layers.0.act.node")


def test_no_alarm_when_all_is_well():
    assert benchmark.is_silent_when_all_is_well(benchmark.build_model(), benchmark.make_examples())


def make_model() -> ir.Model:
    model = ir.from_proto(
        onnx.parser.parse_model(
            """<ir_version: 11, opset_import: ["": 23]>
            net (float[batch, 2] x) => (float[batch, 2] y)
            <float[2, 2] w = {1,2,3,4}>
            { h = MatMul(x, w)  a = Relu(h)  b = Neg(a)  c = Neg(b)  y = Neg(c) }"""
        )
    )
    for node in model.graph:
        node.name = f"{node.outputs[0].name}.node"
    return model


EXAMPLES = ({"x": np.array([[1.0, 2.0]], np.float32)},)


@dataclass(frozen=True, kw_only=True)
class Scale(Pass):
    """Claims to be exact and multiplies the weight."""

    name: ClassVar[str] = "scale"
    by: float = 1.0

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        value = model.graph.initializers["w"]
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(self.by), name="w")
        return PassResult(modified=True)


@dataclass(frozen=True, kw_only=True)
class Round(Scale):
    """Multiplies the weight too, and says so."""

    name: ClassVar[str] = "round"
    contract: ClassVar[Contract] = Contract.APPROXIMATE


@dataclass(frozen=True, kw_only=True)
class Crash(Pass):
    """Raises."""

    name: ClassVar[str] = "crash"

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        raise RuntimeError("boom")


def search(*passes: Pass, **arguments) -> BisectResult:
    arguments.setdefault("examples", EXAMPLES)
    return bisect(make_model(), Pipeline(passes), target=get_target("portable"), **arguments)


@pytest.mark.parametrize("position", range(10))
def test_the_culprit_is_found_at_every_position_in_a_logarithmic_number_of_runs(position):
    passes: list[Pass] = [Scale()] * 10
    passes[position] = Scale(by=1.1)
    result = search(*passes)
    assert result.position == position
    assert result.culprit == Scale(by=1.1)
    assert "output 'y' differs by 0.1" in result.reason
    # Two ends, four halvings of ten, the culprit once more with its contract checked, and two for rewrites.
    assert result.runs <= 2 + 4 + 1 + 2


@pytest.mark.parametrize("position", [0, 2, 4])
def test_approximate_passes_around_the_culprit_do_not_hide_it(position):
    passes: list[Pass] = [Scale(), Round(by=1.3), Scale(), Round(by=0.8), Scale()]
    passes[position] = Scale(by=1.01)
    assert search(*passes).position == position


def test_an_approximate_pass_is_no_culprit_until_its_outputs_are_not_finite():
    assert search(Scale(), Round(by=3.0), Scale()).culprit is None
    result = search(Scale(), Round(by=float("inf")), Scale())
    assert result.position == 1
    assert result.reason.startswith(
        "pass 'round' broke its contract (approximate): output 'y' differs in that it is no longer finite; "
        "first difference: tensor 'h' (MatMul node 'h.node') differs"
    )


def test_errors_below_what_a_stretch_is_allowed_are_found_pass_by_pass():
    # 2e-4 is within the 5e-4 that five passes are allowed together, and above the 1e-4 of each.
    result = search(Scale(), Scale(), Scale(by=1.0002), Scale(), Scale())
    assert result.position == 2
    assert result.violation is not None
    assert result.violation.pass_name == "scale"


def test_a_tolerance_measures_against_the_input_model():
    result = search(Round(by=1.04), Round(by=1.04), Round(by=1.04), tolerance=0.06)
    assert result.position == 1
    assert search(Round(by=1.04), tolerance=0.06).culprit is None


def test_a_check_of_the_users_decides():
    def is_small(model: ir.Model) -> bool:
        return model.graph.initializers["w"].const_value.numpy().max() < 10

    result = search(Scale(by=2.0), Scale(by=2.0), Scale(by=2.0), check=is_small)
    assert (result.position, result.reason) == (1, "the check fails")
    with pytest.raises(InputError, match="fails on the input model already"):
        search(Scale(), check=lambda model: False)


def test_a_pass_that_raises_is_the_culprit():
    result = search(Scale(), Scale(), Crash(), Scale())
    assert result.position == 2
    assert result.reason == "pass 'crash': RuntimeError: boom"


def test_the_model_is_not_changed():
    model = make_model()
    before = clone(model)
    bisect(model, Pipeline((Scale(by=2.0),)), target=get_target("portable"), examples=EXAMPLES)
    assert np.array_equal(
        model.graph.initializers["w"].const_value.numpy(), before.graph.initializers["w"].const_value.numpy()
    )


class _DropNeg(Rule):
    """Wrong for one node: the others cancel."""

    name = "drop_neg"
    roots = ("Neg",)

    def apply(self, node: ir.Node) -> bool:
        if node.outputs[0].is_graph_output():
            return False
        node.outputs[0].replace_all_uses_with(node.inputs[0])
        return True


@dataclass(frozen=True, kw_only=True)
class DropNegations(Pass):
    """Drops an even number of negations, of which each alone would be wrong."""

    name: ClassVar[str] = "drop_negations"

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        hits = apply_rules(model, [_DropNeg()])
        return PassResult(modified=True, statistics=hits)


@dataclass(frozen=True, kw_only=True)
class DropAndScale(DropNegations):
    """Its rules are right as a whole; what breaks the model is not a rule."""

    name: ClassVar[str] = "drop_and_scale"

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        Scale(by=2.0).run(model, ctx)
        return super().run(model, ctx)


def test_no_rewrite_is_blamed_for_what_a_pass_does_besides():
    result = search(Scale(), DropAndScale())
    assert (result.position, result.rewrite) == (1, None)


def test_facts_of_the_input_model_are_kept():
    need = type("Need", (Scale,), {"name": "need", "requires": frozenset({Fact.CANONICAL})})
    establish = type("Establish", (Scale,), {"name": "establish", "establishes": frozenset({Fact.CANONICAL})})
    assert search(establish(), need(by=2.0)).position == 1
