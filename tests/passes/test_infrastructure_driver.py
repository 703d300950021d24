"""The driver and its instruments: order, errors, reports, and what each instrument leaves behind."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import pytest
from planish.codegen import get_target
from planish.ir import infer_shapes, load
from planish.ir.errors import (
    ContractError,
    NothingCoveredError,
    PassError,
    PipelineError,
    TargetError,
    VerificationError,
)
from planish.passes.infrastructure.base import (
    Contract,
    Coverage,
    Fact,
    Pass,
    PassContext,
    PassResult,
    Skipped,
)
from planish.passes.infrastructure.driver import run_pipeline
from planish.passes.infrastructure.facts import facts_of
from planish.passes.infrastructure.instruments import (
    BisectLimit,
    ContractBrokenError,
    ContractCheck,
    CrashReproducer,
    DumpAfterEachPass,
    Instrument,
    Invocation,
    PrintDiff,
    ProgressBars,
    RewriteStatistics,
    VerifyAfterEachPass,
)
from planish.passes.infrastructure.instruments.contract import without_past
from planish.passes.infrastructure.pipeline import Pipeline
from planish.passes.infrastructure.rewriter import Rule, apply_rules, missed
from rich.console import Console


def make_model() -> ir.Model:
    """y = Relu(x·W1)·W2, with names as a torch model has them."""
    model = ir.from_proto(
        onnx.parser.parse_model(
            """<ir_version: 11, opset_import: ["": 23]>
            net (float[batch, 4] x) => (float[batch, 2] y)
            <float[4, 3] "l0.weight" = {1,2,3,4,5,6,7,8,9,1,2,3}, float[3, 2] "l1.weight" = {1,2,3,4,5,6}>
            { h = MatMul(x, "l0.weight")  a = Relu(h)  y = MatMul(a, "l1.weight") }"""
        )
    )
    for node in model.graph:
        node.name = f"{node.outputs[0].name}.node"
    return model


EXAMPLES = ({"x": np.array([[1.0, -2.0, 3.0, 0.5]], np.float32)},)


UNCHANGED = PassResult(modified=False)


@dataclass(frozen=True, kw_only=True)
class Recorded(Pass):
    """Does what its option says."""

    name: ClassVar[str] = "recorded"
    result: PassResult = UNCHANGED

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        return self.result


@dataclass(frozen=True, kw_only=True)
class Scale(Pass):
    """Multiplies a weight."""

    name: ClassVar[str] = "scale"
    by: float = 2.0
    weight: str = "l1.weight"

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        value = model.graph.initializers[self.weight]
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(self.by), name=value.name)
        return PassResult(modified=True)


@dataclass(frozen=True, kw_only=True)
class Round(Scale):
    """Multiplies a weight, and says that this changes the outputs."""

    name: ClassVar[str] = "round"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED})


@dataclass(frozen=True, kw_only=True)
class Raise(Pass):
    """Raises."""

    name: ClassVar[str] = "raise"
    error: BaseException

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        raise self.error


def run(model: ir.Model, *passes: Pass, **arguments: Any):
    return run_pipeline(model, Pipeline(passes), target=get_target("portable"), **arguments)


def test_the_report_says_what_each_pass_did():
    model = make_model()
    coverage = Coverage(unit="linears", covered=1, skipped=(Skipped("l0", "too small"),))
    result = PassResult(modified=True, coverage=coverage, statistics={"fold": 2, "idle": 0})
    report = run(model, Recorded(result=result), Scale(by=3.0))
    first, second = report.passes
    assert (first.name, first.modified, first.coverage) == ("recorded", True, coverage)
    assert (first.nodes_before, first.nodes_after) == (3, 3)
    assert first.weight_bytes_before == first.weight_bytes_after == 4 * (12 + 6)
    assert second.options == {"by": 3.0}
    assert first.seconds >= 0
    assert report.seconds == first.seconds + second.seconds

    data = json.loads(report.to_json())
    assert [row["name"] for row in data["passes"]] == ["recorded", "scale"]
    assert data["passes"][0]["coverage"] == {
        "unit": "linears",
        "covered": 1,
        "total": 2,
        "skipped": [{"name": "l0", "reason": "too small"}],
    }
    assert data["passes"][0]["statistics"] == {"fold": 2}

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report)
    text = console.export_text()
    assert "1 of 2 linears; 1 skipped: too small" in text
    assert "cosine" not in text  # nothing was measured


def test_facts_follow_the_passes():
    model = make_model()
    run(model, Round())
    assert facts_of(model) == {Fact.QUANTIZED}


def test_an_illegal_order_is_refused_before_anything_runs():
    model = make_model()
    need = type("Need", (Recorded,), {"name": "need", "requires": frozenset({Fact.FUSED})})()
    with pytest.raises(PipelineError, match="pass 'need'"):
        run(model, Scale(), need)
    assert model.graph.initializers["l1.weight"].const_value.numpy()[0, 0] == 1.0


def test_covering_nothing_is_an_error_only_where_work_was_asked_for():
    nothing = Coverage(unit="linears", covered=0, skipped=(Skipped("l0", "ignored"),))
    with pytest.raises(NothingCoveredError, match=r"pass 'recorded': covered nothing: 0 of 1 linears"):
        run(make_model(), Recorded(result=PassResult(modified=False, coverage=nothing)))
    empty = Coverage(unit="linears", covered=0)
    with pytest.raises(NothingCoveredError, match=r"covered nothing: the model has no linears"):
        run(make_model(), Recorded(result=PassResult(modified=False, coverage=empty)))
    run(make_model(), Recorded(result=PassResult(modified=False, coverage=replace(nothing, required=False))))


def test_any_exception_names_the_pass():
    cause = KeyError("missing")
    with pytest.raises(PassError, match=r"pass 'raise': KeyError: 'missing'") as caught:
        run(make_model(), Raise(error=cause))
    assert caught.value.__cause__ is cause


def test_planish_errors_keep_their_class_and_hint():
    with pytest.raises(TargetError) as caught:
        run(make_model(), Raise(error=TargetError("no kernel", hint="choose another")))
    assert str(caught.value) == "pass 'raise': no kernel — choose another"


def test_a_keyboard_interrupt_goes_through_untouched():
    with pytest.raises(KeyboardInterrupt):
        run(make_model(), Raise(error=KeyboardInterrupt()), instruments=[VerifyAfterEachPass()])


def test_a_pass_that_returns_something_else_is_told():
    with pytest.raises(PassError, match="pass 'recorded': expected a PassResult, found None"):
        run(make_model(), Recorded(result=None))


class _Log(Instrument):
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def before(self, invocation: Invocation, model: ir.Model) -> None:
        self.log.append(f"{self.name} before {invocation.label}")

    def after(self, invocation: Invocation, model: ir.Model, result: PassResult) -> None:
        self.log.append(f"{self.name} after {invocation.label}")

    def failed(self, invocation: Invocation, model: ir.Model, error: Exception) -> None:
        self.log.append(f"{self.name} failed {invocation.label}: {type(error).__name__}")


def test_instruments_nest_like_brackets_and_hear_of_failures():
    log: list[str] = []
    with pytest.raises(PassError):
        run(make_model(), Scale(), Raise(error=OSError()), instruments=[_Log("A", log), _Log("B", log)])
    assert log == [
        "A before 001_scale",
        "B before 001_scale",
        "B after 001_scale",
        "A after 001_scale",
        "A before 002_raise",
        "B before 002_raise",
        "A failed 002_raise: PassError",
        "B failed 002_raise: PassError",
    ]


@dataclass(frozen=True, kw_only=True)
class Draw(Pass):
    """Puts a random number into the model."""

    name: ClassVar[str] = "draw"
    drawn: list[float]

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        self.drawn.append(float(ctx.rng.random()))
        return PassResult(modified=False)


def test_randomness_depends_on_seed_name_and_repetition_and_not_on_other_passes():
    first: list[float] = []
    second: list[float] = []
    third: list[float] = []
    run(make_model(), Draw(drawn=first), Draw(drawn=first), seed=1)
    run(make_model(), Scale(), Draw(drawn=second), Scale(), Draw(drawn=second), seed=1)
    run(make_model(), Draw(drawn=third), Draw(drawn=third), seed=2)
    assert first == second
    assert len({*first, *third}) == 4


@dataclass(frozen=True, kw_only=True)
class Read(Pass):
    """Counts calibration batches."""

    name: ClassVar[str] = "read"
    counts: list[int]

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        self.counts.append(sum(1 for _ in ctx.calibration))
        return PassResult(modified=False)


def test_a_one_shot_iterator_calibrates_every_pass():
    counts: list[int] = []
    run(make_model(), Read(counts=counts), Read(counts=counts), calibration=iter([*EXAMPLES, *EXAMPLES]))
    assert counts == [2, 2]


@dataclass(frozen=True, kw_only=True)
class Loop(Pass):
    """Loops under a progress bar."""

    name: ClassVar[str] = "loop"

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        for name in ctx.progress(["a", "b"], "layers"):
            ctx.remark(name, "seen")
        return PassResult(modified=False)


class _Progress(Instrument):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def progress(
        self, invocation: Invocation, items: Iterator[Any], total: int, description: str
    ) -> Iterator[Any]:
        for item in items:
            self.seen.append(f"{invocation.pass_.name} {description} {item} of {total}")
            yield item


def test_progress_reaches_the_instruments_and_remarks_the_report():
    progress = _Progress()
    report = run(make_model(), Loop(), instruments=[progress])
    assert progress.seen == ["loop layers a of 2", "loop layers b of 2"]
    assert [(remark.subject, remark.text) for remark in report.passes[0].remarks] == [
        ("a", "seen"),
        ("b", "seen"),
    ]


def test_progress_bars_draw_nothing_outside_a_terminal(capsys):
    with ProgressBars(Console(force_terminal=False)) as bars:
        run(make_model(), Loop(), instruments=[bars])
    assert capsys.readouterr().out.strip() == ""


@dataclass(frozen=True, kw_only=True)
class Break(Pass):
    """Leaves a node behind that reads a value of no one."""

    name: ClassVar[str] = "break"

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        stray = ir.val("stray", ir.DataType.FLOAT, [1, 4])
        model.graph.node("h.node").replace_input_with(0, stray)
        return PassResult(modified=True)


def test_verify_names_the_pass_that_broke_the_graph():
    with pytest.raises(VerificationError, match=r"pass 'break': .*stray"):
        run(make_model(), Scale(), Break(), Scale(), instruments=[VerifyAfterEachPass()])


def test_the_contract_check_names_pass_output_layer_tensor_and_weight():
    passes = (Recorded(), Scale(weight="l0.weight", by=1.5))
    with pytest.raises(ContractBrokenError) as caught:
        run(make_model(), *passes, instruments=[ContractCheck(EXAMPLES)])
    error = caught.value
    assert isinstance(error, ContractError)
    assert (error.pass_name, error.output) == ("scale", "y")
    assert error.error == pytest.approx(0.5)
    assert error.first is not None
    assert (error.first.tensor, error.first.layer, error.first.op) == ("h", "l0", "MatMul")
    assert error.first.changed_weights == ("l0.weight",)
    assert str(error).startswith(
        "pass 'scale' broke its contract (exact to 0.0001): output 'y' differs by 0.5 relative to its "
        "largest value; first difference: tensor 'h' (layer 'l0', MatMul node 'h.node') differs by 0.5 "
        "relative to its largest value; weight 'l0.weight' has changed"
    )


HALF = """<ir_version: 11, opset_import: ["": 23]>
net (float[batch, 4] x) => (float[batch, 2] y)
<float16[4, 3] "l0.weight" = {1,2,3,4,5,6,7,8,9,1,2,3}, float[3, 2] "l1.weight" = {1,2,3,4,5,6}>
"""
IN_HALF = """{ half = Cast<to = 10>(x)  h = MatMul(half, "l0.weight")  a = Cast<to = 1>(h)
              y = MatMul(a, "l1.weight") }"""
ONLY_STORED = """{ w = Cast<to = 1>("l0.weight")  h = MatMul(x, w)  y = MatMul(h, "l1.weight") }"""


@pytest.mark.parametrize(("body", "broken"), [(IN_HALF, False), (ONLY_STORED, True)])
def test_a_model_that_computes_in_half_may_answer_to_its_rounding(body, broken):
    """Its output is float32; where the weights are only stored in half, the arithmetic is float32, too."""
    model = load(onnx.parser.parse_model(HALF + body))
    infer_shapes(model)
    with pytest.raises(ContractBrokenError) if broken else contextlib.nullcontext():
        run(model, Scale(by=1 + 2e-3), instruments=[ContractCheck(EXAMPLES)])
    with pytest.raises(ContractBrokenError):
        run(model, Scale(by=1.05), instruments=[ContractCheck(EXAMPLES)])


def test_the_contract_check_accepts_what_stays_within_the_tolerance():
    run(make_model(), Scale(by=1 + 5e-5), instruments=[ContractCheck(EXAMPLES)])


def test_the_contract_check_measures_approximate_passes():
    report = run(make_model(), Recorded(), Round(by=1.5), instruments=[ContractCheck(EXAMPLES)])
    exact, approximate = report.passes
    assert exact.errors["y"].max_relative == 0.0
    assert approximate.errors["y"].max_relative == pytest.approx(0.5)
    assert approximate.errors["y"].cosine_min == pytest.approx(1.0)
    assert report.as_dict()["passes"][1]["errors"]["y"]["max_relative"] == pytest.approx(0.5)


def test_the_contract_check_makes_up_inputs_when_there_are_none():
    with pytest.raises(ContractBrokenError):
        run(make_model(), Scale(), instruments=[ContractCheck()])


@dataclass(frozen=True, kw_only=True)
class RenameOutput(Pass):
    """Renames the output."""

    name: ClassVar[str] = "rename_output"

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        model.graph.outputs[0].name = "z"
        return PassResult(modified=True)


def test_a_lost_output_breaks_the_contract():
    with pytest.raises(ContractBrokenError, match="output 'y' differs in that it is no longer an output"):
        run(make_model(), RenameOutput(), instruments=[ContractCheck(EXAMPLES)])


CACHED = """
<ir_version: 11, opset_import: ["" : 23]>
cached (float[1, 1, p, 2] past_key_values_0_key, float[1, 1, s, 2] x)
  => (float[1, 1, t, 2] present, float[1, 1, s, 2] y) {
  present = Concat <axis = 2> (past_key_values_0_key, x)
  y = ReduceSum <keepdims = 1> (present, axis)
}
"""


def cached_model() -> ir.Model:
    """y sums a cache; the sum of a cache whose two channels are swapped, swapped back, is the same."""
    proto = onnx.parser.parse_model(CACHED)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2]), "axis"))
    model = ir.from_proto(proto)
    model.graph.inputs[0].name = "past_key_values.0.key"
    return model


@dataclass(frozen=True, kw_only=True)
class SwapChannels(Pass):
    """Keeps the cache with its channels in another order, and the result in the old one."""

    name: ClassVar[str] = "swap_channels"
    declares: bool = True

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        order = ir.val("order", const_value=ir.tensor(np.array([1, 0]), name="order"))
        model.graph.register_initializer(order)
        concat, total = list(model.graph)
        before = ir.node("Gather", [concat.inputs[1], order], {"axis": 3}, name="swap")
        model.graph.insert_before(concat, before)
        concat.replace_input_with(1, before.outputs[0])
        after = ir.node("Gather", [total.outputs[0], order], {"axis": 3}, name="swap_back")
        model.graph.insert_after(total, after)
        total.outputs[0].name, after.outputs[0].name = "swapped", "y"
        model.graph.outputs[1] = after.outputs[0]
        redefined = frozenset({"present"}) if self.declares else frozenset()
        return PassResult(modified=True, redefined_outputs=redefined)


CACHED_EXAMPLES = [
    {
        "past_key_values.0.key": np.array([[[[1, 5], [2, 7]]]], np.float32),
        "x": np.array([[[[3, 4]]]], np.float32),
    }
]


def test_an_output_that_is_redefined_on_purpose_keeps_the_contract_and_the_others_are_checked():
    swap = SwapChannels()
    report = run(cached_model(), swap, Recorded(), instruments=[ContractCheck(CACHED_EXAMPLES)])
    assert set(report.passes[0].errors) == {"y"}
    with pytest.raises(ContractBrokenError, match="'present'"):
        run(cached_model(), SwapChannels(declares=False), instruments=[ContractCheck(CACHED_EXAMPLES)])


def test_an_empty_cache_has_no_part_in_the_mask():
    feeds = {**CACHED_EXAMPLES[0], "attention_mask": np.array([[0, 1, 1]])}
    assert without_past(feeds)["attention_mask"].tolist() == [[1]]
    assert without_past(feeds)["past_key_values.0.key"].shape == (1, 1, 0, 2)


def test_dumps_are_numbered_and_a_pipeline_can_go_on_from_one(tmp_path):
    run(make_model(), Scale(), Round(), instruments=[DumpAfterEachPass(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "000_input.onnx",
        "000_input.txt",
        "001_scale.onnx",
        "001_scale.txt",
        "002_round.onnx",
        "002_round.txt",
    ]
    assert "MatMul" in (tmp_path / "001_scale.txt").read_text()
    assert facts_of(load(tmp_path / "002_round.onnx")) == {Fact.QUANTIZED}


def test_text_dumps_leave_the_weights_out(tmp_path):
    run(make_model(), Scale(), instruments=[DumpAfterEachPass(tmp_path, text_only=True)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000_input.txt", "001_scale.txt"]


def test_diffs_are_printed_for_each_pass():
    written: list[str] = []
    run(make_model(), Recorded(), Scale(), instruments=[PrintDiff(written.append)])
    assert written[0].startswith("--- 001_recorded")
    assert "l1.weight" not in written[0]
    assert written[1].startswith("--- 002_scale")
    assert "l1.weight" in written[1]


class _DropRelu(Rule):
    name = "drop_relu"
    roots = ("Relu", "MatMul")

    def apply(self, node: ir.Node) -> bool:
        if node.op_type == "MatMul":
            return missed(node, "it is a MatMul")
        node.outputs[0].replace_all_uses_with(node.inputs[0])
        return True


@dataclass(frozen=True, kw_only=True)
class Rules(Pass):
    """Applies a rule."""

    name: ClassVar[str] = "rules"

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        hits = apply_rules(model, [_DropRelu()])
        return PassResult(modified=True, statistics={**hits, "by_hand": 3})


def test_statistics_show_hits_tries_and_near_misses_of_every_rewrite():
    statistics = RewriteStatistics()
    run(make_model(), Rules(), instruments=[statistics])
    rules = statistics.by_pass["001_rules"]
    assert rules["drop_relu"].hits == 1
    assert rules["drop_relu"].tries >= 3
    assert rules["by_hand"].hits == 3
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(statistics)
    assert "it is a MatMul (2)" in console.export_text()


def test_the_reproducer_holds_the_model_before_the_pass_and_a_command_that_fails_again(tmp_path):
    folder = tmp_path / "crash"
    reproducer = CrashReproducer(folder, check="contract", examples=EXAMPLES)
    passes = (Round(by=2.0), Scale(weight="l0.weight", by=1.5))
    with pytest.raises(ContractBrokenError) as caught:
        run(make_model(), *passes, seed=7, instruments=[reproducer, ContractCheck(EXAMPLES)])
    before = load(folder / "before.onnx")
    assert before.graph.initializers["l1.weight"].const_value.numpy()[0, 0] == 2.0  # after the first pass
    assert before.graph.initializers["l0.weight"].const_value.numpy()[0, 0] == 1.0  # before the second
    assert facts_of(before) == {Fact.QUANTIZED}
    assert (folder / "pipeline.txt").read_text() == "scale{by=1.5,weight=l0.weight}\n"
    assert np.load(folder / "inputs.npz")["x"].tolist() == EXAMPLES[0]["x"].tolist()
    command = (folder / "reproduce.sh").read_text().splitlines()[1]
    assert command.startswith(f"planish compile {folder}/before.onnx")
    assert "--passes 'scale{by=1.5,weight=l0.weight}' --target portable --check contract --seed 7" in command
    assert caught.value.__notes__ == [f"reproduce with: {command}"]
    syntax = subprocess.run(["sh", "-n", str(folder / "reproduce.sh")], check=False)
    assert syntax.returncode == 0


def test_no_failure_leaves_no_reproducer(tmp_path):
    run(make_model(), Scale(), instruments=[CrashReproducer(tmp_path / "crash")])
    assert not (tmp_path / "crash").exists()


def test_the_bisect_limit_runs_only_the_first_passes():
    lines: list[str] = []
    model = make_model()
    report = run(model, Scale(), Scale(), Scale(), instruments=[BisectLimit(2, lines.append)])
    assert len(report.passes) == 2
    assert model.graph.initializers["l1.weight"].const_value.numpy()[0, 0] == 4.0
    assert lines == [
        "BISECT: running pass (1) scale",
        "BISECT: running pass (2) scale",
        "BISECT: NOT running pass (3) scale",
    ]
