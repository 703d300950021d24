"""What passes cost, as it is shown while they run and in the table afterwards."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from planish.codegen import get_target
from planish.ir import load
from planish.passes.infrastructure.base import (
    Contract,
    Coverage,
    Fact,
    LayerErrors,
    Pass,
    PassContext,
    PassResult,
)
from planish.passes.infrastructure.driver import run_pipeline
from planish.passes.infrastructure.instruments import (
    ContractCheck,
    LatencyAfterEachPass,
    OutlineBefore,
    ProgressBars,
    peak_memory_bytes,
)
from planish.passes.infrastructure.instruments.progress import TimeLeftColumn
from planish.passes.infrastructure.pipeline import Pipeline
from planish.passes.infrastructure.report import PipelineReport
from rich.console import Console
from rich.progress import Progress

HUNGER = 3 * 10**8
"""Bytes."""
EXAMPLES = ({"x": np.ones((2, 8), np.float32)},)


def make_model() -> ir.Model:
    """y = Relu(x·W), W as Identity of an initializer until it is canonical."""
    weight = ",".join(map(str, range(32)))
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 21]>
        net (float[batch, 8] x) => (float[batch, 4] y) <float[8, 4] w = {{{weight}}}>
        {{ v = Identity(w)  h = MatMul(x, v)  y = Relu(h) }}"""
    )
    return load(proto)


@dataclass(frozen=True, kw_only=True)
class Loop(Pass):
    """Counts to three, and says what it did to a layer."""

    name: ClassVar[str] = "loop"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    seconds: float = 0.0

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        for _ in ctx.progress(range(3), "count"):
            time.sleep(self.seconds)
        layers = {"w": LayerErrors(0.25, None), "v": LayerErrors(float("inf"), 0.5)}
        return PassResult(modified=True, coverage=Coverage(unit="layers", covered=2), layers=layers)


@dataclass(frozen=True, kw_only=True)
class Hungry(Pass):
    """Needs memory and gives it back."""

    name: ClassVar[str] = "hungry"

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        np.ones(HUNGER, np.uint8)
        return PassResult(modified=False)


def run(*passes: object, instruments=()) -> PipelineReport:
    return run_pipeline(
        make_model(),
        Pipeline.of(list(passes)),
        target=get_target("portable"),
        examples=EXAMPLES,
        instruments=instruments,
    )


def test_bars_show_what_runs_how_far_it_is_and_how_long_it_still_takes():
    text = io.StringIO()
    with ProgressBars(Console(file=text, force_terminal=True, width=120)) as bars:
        run(Loop(seconds=0.3), "canonicalize", instruments=[bars])
    shown = text.getvalue()
    for word in ("loop", "  count", "2/3", "0:00:00 left", "choose kernels"):
        assert word in shown


def test_the_time_left_is_judged_by_all_steps_however_long_they_take():
    now = 0.0
    progress = Progress(get_time=lambda: now)
    task = progress.add_task("loop", total=10, is_even=True)
    column, state = TimeLeftColumn(), progress.tasks[0]
    assert column.render(state).plain == ""
    now = 200.0
    progress.advance(task)
    assert column.render(state).plain == "0:30:00 left"
    now = 1000.0
    progress.update(task, completed=9)
    assert column.render(state).plain == "0:01:51 left"
    passes = progress.add_task("passes", total=3, completed=1, is_even=False)
    assert column.render(progress.tasks[passes]).plain == ""


def test_latencies_are_measured_before_and_after_every_pass():
    latency = LatencyAfterEachPass(EXAMPLES, repeats=2)
    report = run("canonicalize", Loop(), instruments=[latency, ContractCheck(EXAMPLES)])
    for row in report.passes:
        assert row.latency_ms_before > 0
        assert row.latency_ms_after > 0
    assert "latency_ms_after" in report.as_dict()["passes"][0]
    assert "latency_ms_after" not in report.as_dict(costs=False)["passes"][0]
    heading = str(report).splitlines()[2].split()
    assert (
        heading[:9]
        == ["pass", "did", "nodes", "weights", "latency", "error", "cosine", "s", "memory"][: len(heading)]
    )
    assert " ms" in str(report)


def test_columns_that_nobody_measured_stay_away():
    text = str(run("canonicalize"))
    assert "latency" not in text
    assert "cosine" not in text
    assert " s " in text


IN_A_PROCESS = """
import sys
import test_infrastructure_costs as costs
hungry = costs.Hungry()
report = costs.run(hungry, hungry)
print(report.as_dict())
print(report)
"""


@pytest.mark.skipif(peak_memory_bytes() is None, reason="the system does not say")
def test_the_memory_of_a_pass_is_what_it_added_to_the_peak():
    """In a process of its own, whose peak no other test has raised."""
    text = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    ).stdout
    as_dict, *table = text.splitlines()
    first, second = (row["peak_memory_growth"] for row in ast.literal_eval(as_dict)["passes"])
    assert first > HUNGER / 2
    assert second < first / 10
    assert "MB" in table[4]
    assert "s in all, peak memory" in text


def test_errors_of_layers_travel_in_the_report():
    (row,) = run(Loop()).as_dict(costs=False)["passes"]
    assert row["layers"] == {"w": {"weight": 0.25, "output": None}, "v": {"weight": None, "output": 0.5}}


@pytest.mark.parametrize(("passes", "layers"), [(("canonicalize", Loop()), 1), ((Loop(),), 0)])
def test_the_outline_before_is_of_the_canonical_form_where_there_is_one(passes, layers):
    """The weight behind an Identity is no layer before it is folded."""
    before = OutlineBefore()
    run(*passes, instruments=[before])
    assert len(before.outline.layers) == layers


def test_the_outline_before_is_of_the_first_pass_alone():
    establish = type("Establish", (Loop,), {"name": "establish", "establishes": frozenset({Fact.CANONICAL})})
    before = OutlineBefore()
    run(Loop(), establish(), "canonicalize", instruments=[before])
    assert before.outline.layers == ()
