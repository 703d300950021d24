"""Plans beside what then happens: what can be counted is the same, and costs are extrapolated as said."""

import dataclasses
import json
import pickle

import numpy as np
import onnx_ir as ir
import planish
import pytest
import torch
from planish.cli import app
from planish.ir.errors import InputError, PipelineError
from planish.passes.infrastructure.pipeline import Pipeline
from planish.planning import plan, rehearsal, worker
from planish.planning.layers import alike_layers, starred
from planish.planning.made_up_data import made_up_data
from planish.planning.quantities import quantities
from planish.planning.scaled_down import scaled_down
from planish.planning.task import Outcome, Phase
from planish.runtime.calibration import CalibrationData
from planish.runtime.provenance import Provenance
from small_decoders import small_decoder, traced_llama
from typer.testing import CliRunner

LAYERS = 7


class Stack(torch.nn.Module):
    """Residual layers that are alike but for one, which is wider."""

    def __init__(self, wide=None):
        super().__init__()
        torch.manual_seed(0)
        inner = [96 if layer == wide else 160 for layer in range(LAYERS)]
        self.first = torch.nn.Linear(32, 64)
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(64, size), torch.nn.GELU(), torch.nn.Linear(size, 64))
            for size in inner
        )

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.fixture(scope="module")
def stack():
    return planish.trace(Stack(), torch.ones(2, 5, 32))


@pytest.fixture(scope="module")
def uneven():
    return planish.trace(Stack(wide=2), torch.ones(2, 5, 32))


def canonical(model):
    model = model.clone()
    planish.compile(model, "canonicalize")
    return planish.compile(model, "canonicalize", target="portable").model


@pytest.fixture
def in_process(monkeypatch, tmp_path):
    """Small compilations in this process, which is faster; gives what was compiled."""
    compiled = []

    def compile_here(model, task, spill_from):
        folder = tmp_path / str(len(compiled))
        folder.mkdir()
        task = pickle.loads(pickle.dumps(task))
        rehearsal.write_facts(model, rehearsal.facts_of(model))
        planish.save(model, folder / worker.MODEL)
        compiled.append((model, task, spill_from))
        return worker._run(folder, task)

    monkeypatch.setattr(rehearsal, "_compile", compile_here)
    monkeypatch.setattr(rehearsal, "_WORTH_REPEATING", 0)
    return compiled


def actual(model, passes, tmp_path, **options):
    compiled = planish.compile(model, passes, **options)
    written = compiled.save(tmp_path / "actual.onnx")
    return compiled, Provenance.read(compiled.bound.model.metadata_props), written.stat().st_size


def check_structure(found, compiled, provenance, size):
    """What can be counted is what happens."""
    for planned, report in zip(found.passes, compiled.report.passes, strict=True):
        covered = report.coverage.covered if report.coverage else 0
        assert planned.covered == covered
        # Where a decoder asks for the length of its cache depends on which layers it has.
        assert planned.nodes == pytest.approx(report.nodes_after, abs=1)
        assert planned.weight_bytes == pytest.approx(report.weight_bytes_after, abs=64)
        skipped = report.coverage.skipped if report.coverage else ()
        assert sum(count for *_, count in planned.skipped) == len(skipped)
        assert {reason for _, reason, _ in planned.skipped} == {skip.reason for skip in skipped}
    counts = {}
    for kernel in provenance.kernels.values():
        counts[kernel] = counts.get(kernel, 0) + 1
    assert found.kernels == counts
    forms = {}
    for layer in provenance.after.layers:
        forms[layer.form] = forms.get(layer.form, 0) + layer.weights
    assert {form: count for form, (count, _) in found.forms.items()} == forms
    assert found.file_bytes == pytest.approx(size, rel=0.02)  # metadata have names of layers in them


@pytest.mark.parametrize(
    "passes",
    [
        "canonicalize,fuse",
        "canonicalize,fuse,quantize{scheme=W4A16,group_size=32}",
        'canonicalize,fuse,quantize{scheme=W4A16,group_size=32,ignore=["re:layers.[05].*"]}',
        "canonicalize,fuse,quantize{scheme=W4A16,group_size=64,ignore=[first]}",  # 160 is no multiple of 64
    ],
)
def test_what_can_be_counted_is_what_happens(stack, passes, in_process, tmp_path):
    found = plan(stack, passes)
    check_structure(found, *actual(stack, passes, tmp_path))
    most, everything = found.layers
    assert most <= everything == LAYERS


def test_layers_of_several_kinds(uneven, in_process, tmp_path):
    passes = "canonicalize,fuse,quantize{scheme=W4A16,group_size=32}"
    found = plan(uneven, passes)
    check_structure(found, *actual(uneven, passes, tmp_path))


@pytest.mark.slow
def test_a_decoder_with_data(in_process, tmp_path):
    graph = planish.trace_causal_lm(small_decoder(num_hidden_layers=6))
    data = [{"input_ids": np.random.default_rng(n).integers(0, 64, (16, 100))} for n in range(6)]
    passes = "canonicalize,fuse,kv-cache{bits=8},quantize{scheme=W4A16,group_size=16,algorithm=gptq,sweeps=0}"
    found = plan(graph, passes, calibration=data)
    check_structure(found, *actual(graph, passes, tmp_path, calibration=data))
    assert {planned.name: planned.data for planned in found.passes}["quantize"] == ("calibration",)
    assert [len(task.calibration) for _, task, _ in in_process] == [1, 4, 1, 4]
    assert found.made_up == 0


def test_weights_are_not_read(stack):
    model = canonical(stack)
    for value in model.graph.initializers.values():
        if value.const_value.size >= 4096:
            value.const_value = ir.LazyTensor(
                lambda: pytest.fail("read"), dtype=value.const_value.dtype, shape=value.const_value.shape
            )
    pipeline = Pipeline.of("canonicalize,quantize")
    layers = alike_layers(model, pipeline)
    small = scaled_down(model, {alike.name: 2 for alike in layers}, layers)
    weights = [value.const_value for value in small.graph.initializers.values() if len(value.shape) == 2]
    assert len(weights) == 2 * 2 + 1
    first, second = (weight.numpy() for weight in weights[1:3])
    assert first.std() == pytest.approx(1 / np.sqrt(64), rel=0.05)
    assert not np.array_equal(first.reshape(-1)[:9], second.reshape(-1)[:9])


def test_layers_are_alike_in_all_but_numbers(stack, uneven):
    (alike,) = alike_layers(canonical(stack), Pipeline.of("canonicalize"))
    assert (len(alike), alike.name) == (LAYERS, "layers.0")
    kinds = alike_layers(canonical(uneven), Pipeline.of("canonicalize"))
    assert sorted(map(len, kinds)) == [1, LAYERS - 1]
    ignoring = Pipeline.of('canonicalize,quantize{ignore=["re:layers.[01].*"]}')
    assert sorted(map(len, alike_layers(canonical(stack), ignoring))) == [2, LAYERS - 2]
    assert starred("model.layers.12.mlp") == "model.layers.*.mlp"


def outcome(model, task, spill_from, *, seconds=lambda layers, work: 0.0):
    """What a compilation with these costs says."""
    layers = sum(1 for node in model.graph if node.op_type == "Add" and node.inputs[1].producer() is not None)
    work = len(task.calibration)
    provenance = Provenance.read(planish.compile(model, task.passes).bound.model.metadata_props)
    phases = (
        Phase("read", 1.0, 10),
        Phase("0 canonicalize", 0.0, 10),
        Phase("1 fuse", seconds(layers, work), round(100 + 7 * layers + 3 * work)),
        Phase("bind", 0.0, 10),
    )
    return Outcome(phases=phases, asked={}, provenance=provenance, file_bytes=0)


def test_costs_are_affine_in_layers_and_data(stack, monkeypatch):
    def seconds(layers, work):
        return 3 + 2 * layers + 5 * work + 0.5 * layers * work

    def peak(layers, work):
        return 1000 + 20 * layers + 50 * work

    layers_in_adds = []

    def compile_here(model, task, spill_from):
        layers_in_adds.append(sum(node.op_type == "Gelu" for node in model.graph))
        found = outcome(model, task, spill_from)
        at = (layers_in_adds[-1], len(task.calibration))
        phases = tuple(
            dataclasses.replace(phase, seconds=seconds(*at), peak=peak(*at))
            if phase.name == "1 fuse"
            else phase
            for phase in found.phases
        )
        return dataclasses.replace(found, phases=phases)

    monkeypatch.setattr(rehearsal, "_compile", compile_here)
    data = [{"x": np.zeros((60, 5, 32), np.float32)} for _ in range(4)]
    found = plan(stack, "canonicalize,fuse", calibration=data)
    batches = len(CalibrationData.read(data, stack))
    assert batches > 4
    assert set(layers_in_adds) == {1, 3}
    assert found.passes[1].seconds == pytest.approx(seconds(LAYERS, batches))
    assert found.peak_memory == peak(LAYERS, batches)


def test_noise_gives_no_time_back(stack, monkeypatch):
    calls = []

    def compile_here(model, task, spill_from):
        calls.append(model)
        return outcome(model, task, spill_from, seconds=lambda *_: 90.0 / len(calls))

    monkeypatch.setattr(rehearsal, "_compile", compile_here)
    found = plan(stack, "canonicalize,fuse")
    assert len(calls) == 2
    assert found.passes[1].seconds == 90.0


def test_short_compilations_are_timed_twice(stack, monkeypatch):
    calls = []

    def compile_here(model, task, spill_from):
        calls.append(model)
        return outcome(model, task, spill_from, seconds=lambda *_: float(3 - len(calls) % 2))

    monkeypatch.setattr(rehearsal, "_compile", compile_here)
    found = plan(stack, "canonicalize,fuse")
    assert len(calls) == 4
    assert found.passes[1].seconds == 2.0


def test_data_is_made_up_where_it_is_needed(stack, in_process):
    found = plan(stack, "canonicalize,fuse,quantize{algorithm=gptq,group_size=32}", samples=7)
    assert found.made_up == 7
    assert found.inputs[0].startswith("x float")
    assert plan(stack, "canonicalize,fuse").made_up == 0


def test_made_up_samples_of_a_decoder_leave_caches_out():
    model = traced_llama()
    data = made_up_data(model, 3)
    assert sum(feeds["input_ids"].shape[0] for feeds in data) == 3
    assert data[0]["past_key_values.0.key"].shape[2] == 0
    with pytest.raises(InputError, match="samples: expected at least 1, found 0"):
        made_up_data(model, 0)


def test_what_fails_with_a_few_layers_is_tried_with_all(stack, in_process, tmp_path):
    # Three blocks cannot go where one is left; and a pass that counts blocks needs all of them.
    passes = "canonicalize,drop-blocks{count=3,protect=[]},fuse"
    data = [{"x": np.random.default_rng(0).standard_normal((8, 5, 32), np.float32)}]
    found = plan(stack, passes, calibration=data)
    assert found.error is None
    assert found.layers == (LAYERS, LAYERS)
    check_structure(found, *actual(stack, passes, tmp_path, calibration=data))


def test_what_will_fail_is_said(stack, in_process):
    found = plan(stack, "canonicalize,fuse,quantize{ignore=['re:.*']}")
    assert "pass 'quantize'" in found.error
    assert "covered nothing" in found.error
    assert found.passes == ()


def test_an_illegal_pipeline_names_a_legal_one(stack):
    with pytest.raises(PipelineError, match='use "canonicalize,rotate,quantize"'):
        plan(stack, "canonicalize,quantize,rotate")


def test_a_better_order_is_told(stack, in_process):
    data = [{"x": np.ones((2, 5, 32), np.float32)}]
    found = plan(stack, "canonicalize,fuse,distill{steps=3},sparsify{sparsity=0.5,steps=3}", calibration=data)
    assert found.better.index("sparsify") < found.better.index("distill")
    assert "what was pruned before it" in found.reasons[0]


def test_steps_are_rehearsed_in_part(stack, in_process):
    data = [{"x": np.ones((2, 5, 32), np.float32)}]
    plan(stack, "canonicalize,fuse,distill{steps=500}", calibration=data)
    assert {task.passes for _, task, _ in in_process} == {
        f"canonicalize,fuse,distill{{steps={steps}}}" for steps in (2, 6)
    }


def test_steps_of_what_is_not_trained_say_nothing(stack, in_process):
    data = [{"x": np.ones((2, 5, 32), np.float32)}]
    plan(stack, "canonicalize,rotate{rotations=[R4]}", calibration=data)
    assert {task.passes for _, task, _ in in_process} == {"canonicalize,rotate{rotations=[R4]}"}


def test_large_models_are_rehearsed_in_a_file(stack, in_process, monkeypatch):
    plan(stack, "canonicalize,fuse")
    monkeypatch.setenv("PLANISH_SPILL_FROM", "1000")
    plan(stack, "canonicalize,fuse")
    spills = [spill_from for *_, spill_from in in_process]
    assert spills[0] > 1000
    assert spills[-1] == 0
    monkeypatch.setenv("PLANISH_SPILL_FROM", "much")
    with pytest.raises(InputError, match="PLANISH_SPILL_FROM: expected bytes, found 'much'"):
        plan(stack, "canonicalize,fuse")


def test_quantities_of_equal_names_add_up(stack):
    compiled = planish.compile(stack, "canonicalize,fuse,quantize{group_size=64}")
    found = quantities(
        Outcome(
            phases=(),
            asked={},
            provenance=Provenance.read(compiled.bound.model.metadata_props),
            file_bytes=5,
        )
    )
    skipped = {key: count for key, count in found.items() if key[0] == "skipped"}
    assert sum(skipped.values()) == sum(len(r.coverage.skipped) for r in compiled.report.passes if r.coverage)
    assert any(key[2] == "layers.*.2" and count == LAYERS for key, count in skipped.items())
    assert found["file",] == 5


@pytest.mark.slow
def test_the_command_plans_in_processes_of_its_own(stack, tmp_path, monkeypatch):
    monkeypatch.setenv("PLANISH_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "stack.onnx"
    planish.save(stack, path)
    passes = "canonicalize,fuse,quantize{scheme=W4A16,group_size=64}"
    run = CliRunner().invoke(app, ["plan", str(path), "-p", passes, "--json"])
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    compiled, _, size = actual(path, passes, tmp_path)
    assert found["file_bytes"] == pytest.approx(size, rel=0.02)
    assert found["passes"][2]["covered"] == compiled.report.passes[2].coverage.covered
    assert 0 < found["seconds"] < 600
    assert found["peak_memory"] > 1 << 20
    assert list((tmp_path / "cache").glob("planish-plan-*")) == []


def test_the_command_prints_and_fails_as_the_compilation_will(stack, in_process, tmp_path):
    path = tmp_path / "stack.onnx"
    planish.save(stack, path)
    shown = CliRunner().invoke(app, ["plan", str(path), "-p", "canonicalize,fuse,quantize{group_size=64}"])
    assert shown.exit_code == 0, shown.output
    for text in ("will skip layers.*.2 (7)", "int4, groups of 64", "peak memory", "of 7 layers"):
        assert text in shown.output
    failing = CliRunner().invoke(app, ["plan", str(path), "-p", "canonicalize,quantize{ignore=['re:.*']}"])
    assert failing.exit_code == 1
    assert "this will fail" in failing.output
