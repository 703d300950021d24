"""Bisection goes down to the layer, and what it leaves behind is small and fails again."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx.helper
import onnx.numpy_helper
import onnx_ir as ir
import pytest
from planish import cli
from planish.codegen import get_target
from planish.ir import load
from planish.passes.infrastructure import registry
from planish.passes.infrastructure.base import Contract, Fact, Pass, PassContext, PassResult
from planish.passes.infrastructure.bisect import BisectResult, bisect
from planish.passes.infrastructure.bisect_reproducer import Case, Trial, smallest_case, write_case
from planish.passes.infrastructure.facts import facts_of
from planish.passes.infrastructure.patterns import matches
from planish.passes.infrastructure.pipeline import Pipeline
from planish.passes.infrastructure.rewriter import Replacement, Rule, apply_rules
from planish.runtime.reference import run_model
from typer.testing import CliRunner

LAYERS, WIDTH = 8, 16
CULPRIT = "layers.5.fc"
FEEDS = {"x": np.random.default_rng(1).standard_normal((4, WIDTH)).astype(np.float32)}
PORTABLE = get_target("portable")


def build_model() -> ir.Model:
    """x ← x + tanh(x · W + b) eight times."""
    rng = np.random.default_rng(0)
    nodes, weights, x = [], [], "x"
    for index in range(LAYERS):
        layer = f"layers.{index}.fc"
        for name, shape in (("weight", (WIDTH, WIDTH)), ("bias", (WIDTH,))):
            array = (rng.standard_normal(shape) / 4).astype(np.float32)
            weights.append(onnx.numpy_helper.from_array(array, f"{layer}.{name}"))
        out = "y" if index == LAYERS - 1 else f"layers.{index}.out"
        names = (f"{layer}.product", layer, f"layers.{index}.act", out)
        inputs = [[x, f"{layer}.weight"], [names[0], f"{layer}.bias"], [names[1]], [x, names[2]]]
        for op, given, made in zip(("MatMul", "Add", "Tanh", "Add"), inputs, names, strict=True):
            nodes.append(onnx.helper.make_node(op, given, [made], name=f"{made}.node"))
        x = out
    graph = onnx.helper.make_graph(
        nodes,
        "net",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", WIDTH])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", WIDTH])],
        weights,
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    return ir.from_proto(proto)


@dataclass(frozen=True, kw_only=True)
class Damage(Pass):
    """Multiplies weights by 1 + 1e-7, and that of one layer by 1.5."""

    name: ClassVar[str] = "damage"
    contract: ClassVar[Contract] = Contract.EXACT
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ("layers.0.fc",)

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        for name, value in model.graph.initializers.items():
            layer = name.removesuffix(".weight")
            chosen = not matches(layer, self.ignore) and (not self.targets or matches(layer, self.targets))
            if name.endswith(".weight") and chosen:
                factor = np.float32(1.5 if layer == CULPRIT else 1 + 1e-7)
                value.const_value = ir.tensor(value.const_value.numpy() * factor, name=name)
        return PassResult(modified=True)


@dataclass(frozen=True, kw_only=True)
class Coarse(Damage):
    """The same, and it says that the outputs change."""

    name: ClassVar[str] = "coarse"
    contract: ClassVar[Contract] = Contract.APPROXIMATE


@dataclass(frozen=True, kw_only=True)
class Crash(Damage):
    """Raises when it may touch the culprit."""

    name: ClassVar[str] = "crash"

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        if f"{CULPRIT}.weight" in model.graph.initializers and not matches(CULPRIT, self.ignore):
            raise RuntimeError("boom")
        return PassResult(modified=False)


class _Mark(Rule):
    """Marks every Tanh, and makes one of them a Sigmoid."""

    name = "mark"
    roots = ("Tanh",)

    def apply(self, node: ir.Node) -> bool:
        if node.name == "layers.5.act.node":
            replacement = Replacement(node)
            return replacement.finish(replacement.op("Sigmoid", node.inputs[0], like=node.outputs[0]))
        is_new = "marked" not in node.metadata_props
        node.metadata_props["marked"] = "yes"
        return is_new


@dataclass(frozen=True, kw_only=True)
class WrongRule(Pass):
    """Rewrites by a rule that is wrong at one node."""

    name: ClassVar[str] = "wrong-rule"

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        return PassResult(modified=True, statistics=apply_rules(model, [_Mark()]))


def search(*passes: Pass, **arguments) -> tuple[ir.Model, Pipeline, BisectResult]:
    model, pipeline = build_model(), Pipeline.of(["canonicalize", *passes, "canonicalize"])
    arguments.setdefault("examples", (FEEDS,))
    return model, pipeline, bisect(model, pipeline, target=PORTABLE, **arguments)


def reduce(model: ir.Model, pipeline: Pipeline, result: BisectResult, **arguments) -> tuple[Case, Trial]:
    examples = arguments.pop("examples", (FEEDS,))
    trial = Trial(target=PORTABLE, error=result.error, **arguments)
    case = smallest_case(model, pipeline, result, trial, examples=examples)
    assert trial.fails(case)
    return case, trial


def test_the_layer_is_found_and_its_subgraph_is_all_that_is_left():
    model, pipeline, result = search(Damage())
    assert (result.culprit, result.position, result.layer) == (Damage(), 1, CULPRIT)
    case, _ = reduce(model, pipeline, result)
    assert [node.op_type for node in case.model.graph] == ["MatMul"]
    assert list(case.model.graph.initializers) == [f"{CULPRIT}.weight"]
    assert str(case.pipeline) == "damage"
    assert facts_of(case.model) == {Fact.CANONICAL}
    # It is run on what the layer reads in the whole model.
    (name,) = case.examples[0]
    np.testing.assert_array_equal(case.examples[0][name], run_model(model, FEEDS, [name])[name])


def test_a_layer_of_an_approximate_pass_is_found_by_a_tolerance():
    model, pipeline, result = search(Coarse(), tolerance=0.05)
    assert (result.position, result.layer) == (1, CULPRIT)
    case, _ = reduce(model, pipeline, result, tolerance=0.05)
    assert [node.op_type for node in case.model.graph] == ["MatMul"]


def test_a_pass_that_raises_is_cut_to_what_it_raises_at():
    model, pipeline, result = search(Crash())
    assert (result.layer, [kind.__name__ for kind in result.error]) == (
        CULPRIT,
        ["PassError", "RuntimeError"],
    )
    case, _ = reduce(model, pipeline, result)
    assert list(case.model.graph.initializers) == [f"{CULPRIT}.weight"]
    assert len(case.model.graph) == 1


def test_a_wrong_rewrite_names_its_layer_too():
    model, pipeline, result = search(WrongRule())
    assert (result.rewrite.rule, result.rewrite.node) == ("mark", "layers.5.act.node")
    assert result.layer == CULPRIT  # the nearest one that the node depends on
    case, _ = reduce(model, pipeline, result)
    assert [node.op_type for node in case.model.graph] == ["Tanh"]


def test_a_check_that_knows_the_whole_model_gets_the_whole_model():
    def is_good(model: ir.Model) -> bool:
        if "x" not in {value.name for value in model.graph.inputs}:
            return False  # as a program fails that is given other inputs than it knows
        return bool(np.abs(run_model(model, FEEDS)["y"] - reference).max() < 0.01)

    reference = run_model(build_model(), FEEDS)["y"]
    model, pipeline, result = search(Coarse(), check=is_good, examples=())
    assert (result.position, result.layer, result.reason) == (1, CULPRIT, "the check fails")
    case, _ = reduce(model, pipeline, result, check=is_good, examples=())
    assert {value.name for value in case.model.graph.outputs} == {"y"}
    assert str(case.pipeline).startswith("coarse{ignore=[layers.0.fc,")


def test_errors_that_only_add_up_keep_all_passes():
    @dataclass(frozen=True, kw_only=True)
    class Drift(Damage):
        name: ClassVar[str] = "drift"
        contract: ClassVar[Contract] = Contract.APPROXIMATE

        def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
            value = model.graph.initializers["layers.7.fc.bias"]
            value.const_value = ir.tensor(value.const_value.numpy() + np.float32(0.05), name=value.name)
            return PassResult(modified=True)

    model, pipeline, result = search(Drift(), Drift(), Drift(), tolerance=0.03)
    assert result.position > 1
    case, _ = reduce(model, pipeline, result, tolerance=0.03)
    assert case.pipeline.passes == pipeline.passes[: result.position + 1]


def test_calibration_data_go_with_the_window(tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class NeedsData(Damage):
        name: ClassVar[str] = "needs-data"

        def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
            assert len(ctx.calibration) == 2
            for feeds in ctx.calibration:
                run_model(model, feeds)  # they fit
            return super().run(model, ctx)

    model, pipeline = build_model(), Pipeline.of(["canonicalize", NeedsData()])
    batches = ({"x": FEEDS["x"] * 2}, {"x": FEEDS["x"] * 3})
    result = bisect(model, pipeline, target=PORTABLE, examples=(FEEDS,), calibration=batches)
    trial = Trial(target=PORTABLE)
    case = smallest_case(model, pipeline, result, trial, examples=(FEEDS,), calibration=batches)
    assert len(case.model.graph) == 1
    assert len(case.calibration) == 2
    command = write_case(tmp_path / "crash", case, trial)
    assert sorted(path.name for path in (tmp_path / "crash").iterdir()) == [
        "calibration_0.npz",
        "calibration_1.npz",
        "inputs.npz",
        "model.onnx",
        "pipeline.txt",
        "reproduce.sh",
    ]
    assert command.count("--calibration") == 2


@pytest.fixture
def registered(monkeypatch):
    """The wrong passes as a plug-in would bring them."""

    @dataclass(frozen=True)
    class Entry:
        kind: type[Pass]
        value: str = "here"

        def load(self) -> type[Pass]:
            return self.kind

    entries = {**registry._entry_points(), **{kind.name: Entry(kind) for kind in (Damage, Coarse, WrongRule)}}
    monkeypatch.setattr(registry, "_entry_points", lambda: entries)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("damage", (), ("layer:   layers.5.fc",)),
        ("coarse", ("--tolerance", "0.05"), ("layer:   layers.5.fc",)),
        ("wrong-rule", (), ("rewrite: mark at node layers.5.act.node",)),
    ],
)
def test_the_command_that_is_left_finds_the_same(registered, tmp_path, monkeypatch, name, options, expected):
    monkeypatch.setattr(cli.out, "_width", 160)
    ir.save(build_model(), tmp_path / "model.onnx")
    np.savez(tmp_path / "inputs.npz", **FEEDS)
    words = ["bisect", tmp_path / "model.onnx", "-p", f"canonicalize,{name},canonicalize", "-t", "portable"]
    words += ["--inputs", tmp_path / "inputs.npz", "--reproducer", tmp_path / "crash", *options]
    found = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert found.exit_code == 0, found.output
    for line in (f"culprit: {name}, pass 2 of 3", *expected, "reproducer: 1 of 32 nodes in"):
        assert line in found.stdout
    command = (tmp_path / "crash" / "reproduce.sh").read_text()
    assert command.strip() in found.stdout
    again = CliRunner().invoke(cli.app, shlex.split(command)[1:])
    assert again.exit_code == 0, again.output
    for line in (f"culprit: {name}, pass 1 of 1", *expected):
        assert line in again.stdout
    assert len(load(tmp_path / "crash" / "model.onnx").graph) == 1


def test_tolerance_and_program_exclude_one_another(tmp_path):
    ir.save(build_model(), tmp_path / "model.onnx")
    words = ["bisect", str(tmp_path / "model.onnx"), "--tolerance", "0.1", "--check-command", "true"]
    found = CliRunner().invoke(cli.app, words)
    assert found.exit_code == 1
    assert "and not both" in found.stderr
