"""The pass `prune`: goals are met, impossible ones refused, shapes shrink, runs go on where they were.

Times come from a stand-in clock that counts what a model computes, so that no test depends on the machine.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import planish
import pytest
import torch
import transformers
from planish.codegen import get_target
from planish.ir import clone, verify
from planish.ir.errors import InputError, NothingCoveredError, PassError, PipelineError
from planish.passes.infrastructure.driver import run_pipeline
from planish.passes.infrastructure.pipeline import Pipeline
from planish.passes.prune import Prune, candidates, deployment, time_goal
from planish.passes.prune.spdy import search
from planish.runtime.calibration import CalibrationData
from planish.runtime.latency_table import LatencyTable
from planish.runtime.stitched_model import StitchedModel
from planish.runtime.work_cache import WorkCache

TARGET = get_target("portable")
DEPLOYMENT = {"batch": 1, "sequence": 8, "deployed_with": ""}
OVERHEAD = 2_000.0
"""Of the stand-in clock: what a call takes that no pruning removes, in weights."""


def small_llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def llama() -> planish.CompiledModel:
    return planish.compile(small_llama(), "canonicalize", target=TARGET)


@pytest.fixture
def model(llama: planish.CompiledModel) -> ir.Model:
    return clone(llama.model)


@pytest.fixture(scope="module")
def calibration(llama: planish.CompiledModel) -> CalibrationData:
    ids = np.random.default_rng(0).integers(0, 64, (8, 16))
    return CalibrationData.read([{"input_ids": ids}], llama.model)


def weights_of(model: ir.Model) -> int:
    """In layers, embeddings and the head apart."""
    return sum(
        value.const_value.size
        for name, value in model.graph.initializers.items()
        if "layers" in name and name.endswith("proj.weight")
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[ir.Model]:
    """Time is weights to the power of 1.1, which the table, linear in what is kept, does not know of."""
    measured: list[ir.Model] = []

    def seconds(model: ir.Model) -> float:
        return (OVERHEAD + weights_of(model)) ** 1.1 * 1e-6

    def measure(
        self: deployment.Deployment, candidate: ir.Model, *, careful: bool = False
    ) -> deployment.Timing:
        measured.append(candidate)
        return deployment.Timing(seconds(self._original), seconds(candidate))

    def table(model: ir.Model, structure, units, place, progress) -> LatencyTable:
        rows = {
            unit.name: {
                count: 1e-6 * count / unit.counts[0] * (6144 if unit.group.kind == "attention" else 9216)
                for count in unit.counts
            }
            for unit in units
        }
        return LatencyTable(
            target=place.target.name,
            machine="stand-in",
            runtime="stand-in",
            threads=None,
            batch=place.batch,
            sequence=place.sequence,
            deployed_with=place.deployed_with,
            total=seconds(model),
            seconds=rows,
        )

    monkeypatch.setattr(deployment.Deployment, "measure", measure)
    monkeypatch.setattr(time_goal, "measured_table", table)
    return measured


def prune(model: ir.Model, calibration: CalibrationData, cache=None, **options):
    options = {"evaluations": 6, "samples": 2, **DEPLOYMENT, **options}
    return run_pipeline(
        model, Pipeline([Prune(**options)]), target=TARGET, calibration=calibration, cache=cache
    )


def run_once(model: ir.Model, ids: np.ndarray, past: dict[str, np.ndarray] | None = None):
    (feeds,) = CalibrationData.read([{"input_ids": ids, **(past or {})}], model)
    bound = TARGET.bind(model)
    from planish.runtime.session import Session

    return Session(bound, target=TARGET).run(feeds)


@pytest.mark.parametrize("speedup", [1.3, 2.0, 3.0])
def test_the_measured_speedup_is_the_one_asked_for(model, calibration, clock, speedup):
    dense = weights_of(model)
    prune(model, calibration, speedup=(speedup,))
    measured = ((OVERHEAD + dense) / (OVERHEAD + weights_of(model))) ** 1.1
    assert measured == pytest.approx(speedup, rel=0.03)  # the pass's default deviation
    verify(model)


def test_a_search_that_is_repeated_takes_fewer_evaluations(model, calibration, clock, monkeypatch):
    asked = []

    def spied(*arguments, evaluations, **options):
        asked.append(evaluations)
        return search(*arguments, evaluations=evaluations, **options)

    monkeypatch.setattr(candidates, "search", spied)
    prune(model, calibration, speedup=(2.0,), evaluations=8, deviation=1e-9, corrections=2)
    assert asked == [8, 2, 2]


def test_latency_in_milliseconds_is_the_same_goal(model, calibration, clock):
    dense = (OVERHEAD + weights_of(model)) ** 1.1 * 1e-3
    prune(model, calibration, latency_ms=(dense / 2,))
    measured = (OVERHEAD + weights_of(model)) ** 1.1 * 1e-3
    assert measured == pytest.approx(dense / 2, rel=0.03)


def test_several_targets_are_alternatives(model, calibration, clock):
    dense = weights_of(model)
    report = prune(model, calibration, speedup=(1.5, 2.5))
    assert list(report.alternatives) == ["1.5x"]
    for found, speedup in ((model, 2.5), (report.alternatives["1.5x"].model, 1.5)):
        measured = ((OVERHEAD + dense) / (OVERHEAD + weights_of(found))) ** 1.1
        assert measured == pytest.approx(speedup, rel=0.03)


@pytest.mark.slow
def test_a_model_that_is_fast_enough_stays_as_it_is(llama, model, calibration, clock):
    faster = clone(llama.model)
    prune(faster, calibration, speedup=(2.0,))
    before = weights_of(faster)
    # The second pass of a pipeline, which measures against the model before the first.
    pipeline = Pipeline(
        [
            Prune(speedup=(2.0,), evaluations=6, samples=2, **DEPLOYMENT),
            Prune(speedup=(1.5,), evaluations=6, samples=2, **DEPLOYMENT),
        ]
    )
    report = run_pipeline(model, pipeline, target=TARGET, calibration=calibration)
    assert weights_of(model) == before
    (remark,) = [remark for remark in report.passes[1].remarks if remark.subject == "1.5x"]
    assert remark.text.startswith("already 2.0")
    assert "nothing is removed" in remark.text


def test_an_impossible_target_is_refused_with_the_fastest_one(model, calibration, clock):
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    with pytest.raises(PassError, match=r"speed-up of 50 .* is out of reach: .* is \d+\.\d+ times as fast"):
        prune(model, calibration, speedup=(50.0,))
    assert {name: value.const_value for name, value in model.graph.initializers.items()} == before


def test_without_modules_less_is_possible(model, calibration, clock):
    with pytest.raises(PassError, match="out of reach"):
        prune(model, calibration, speedup=(8.0,), structures=("attention", "ffn"), smallest_level=0.5)


@pytest.mark.parametrize("criterion", ["obs", "magnitude", "wanda", "taylor", "random"])
def test_sparsity_removes_that_share_of_the_weights(model, calibration, criterion):
    dense = weights_of(model)
    report = prune(model, calibration, sparsity=(0.5,), criterion=criterion)
    # Levels of 12 multiples of 8 and 4 KV groups: at most one level of a layer, 6 per cent, is left over.
    assert 0.44 <= weights_of(model) / dense <= 0.5
    assert report.passes[0].coverage.covered == 6


def test_the_pruned_decoder_runs_on_through_its_cache(model, calibration):
    """Two tokens after six give the same logits as eight at once, whatever each layer lost."""
    prune(model, calibration, sparsity=(0.6,))
    ids = np.arange(8)[None] * 5 % 64
    whole = run_once(model, ids)
    first = run_once(model, ids[:, :6])
    past = {
        name.replace("present", "past_key_values"): array
        for name, array in first.items()
        if name.startswith("present")
    }
    rest = run_once(model, ids[:, 6:], past)
    np.testing.assert_allclose(rest["logits"], whole["logits"][:, 6:], atol=1e-5)  # float32, logits below 1


def test_compile_prunes_and_quantizes_and_can_be_called_like_the_module(llama, calibration):
    compiled = planish.compile(
        llama.model,
        "canonicalize,prune{sparsity=0.7,evaluations=6,samples=2},fuse,quantize{scheme=W8A16,algorithm=gptq}",
        calibration=calibration,
        target=TARGET,
        check="contract",
        example_inputs=dict(calibration[0]),
    )
    assert compiled.report.passes[1].coverage.covered == 6
    assert all(np.isfinite(array).all() for array in compiled.run(_own(compiled, calibration[0])).values())


def _own(compiled: planish.CompiledModel, feeds):
    from planish.runtime.calibration.data import fitted

    return fitted(feeds, compiled.model)


@pytest.mark.slow
def test_a_decoder_without_some_layers_is_called_like_the_module(llama, calibration):
    """The cache that comes back has the layers that are left, and is taken again."""
    compiled = planish.compile(
        small_llama(),
        "canonicalize,prune{sparsity=0.4,structures=[attention],evaluations=2,samples=2},drop-blocks{count=3}",
        calibration=calibration,
        target=TARGET,
    )
    ids = torch.arange(8)[None] * 5 % 64
    whole = compiled(ids)
    first = compiled(input_ids=ids[:, :6])
    rest = compiled(ids[:, 6:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, whole.logits[:, 6:], atol=1e-5, rtol=0)
    assert len(rest.past_key_values.layers) < 3


def test_obs_loses_less_than_random(model, calibration):
    """The same sizes: only what goes, and the refit of the rest, differ."""
    losses = {}
    for criterion in ("obs", "random"):
        copy = clone(model)
        options = {"sparsity": (0.5,), "structures": ("ffn",), "evaluations": 1}
        report = prune(copy, calibration, criterion=criterion, **options)
        remark = next(remark for remark in report.passes[0].remarks if remark.subject == "0.5")
        losses[criterion] = float(remark.text.split("loss ")[1].split()[0])
    assert losses["obs"] < losses["random"]


def test_a_second_run_measures_no_loss_again(llama, calibration, clock, tmp_path, monkeypatch):
    first, second = clone(llama.model), clone(llama.model)
    prune(first, calibration, cache=WorkCache(tmp_path), speedup=(2.0,))
    timed = len(clock)

    def forbidden(*_: object) -> float:
        raise AssertionError("a loss was measured again")

    monkeypatch.setattr(StitchedModel, "loss", forbidden)
    prune(second, calibration, cache=WorkCache(tmp_path), speedup=(2.0,))
    assert len(clock) == timed
    assert first.graph.initializers.keys() == second.graph.initializers.keys()
    for name, value in first.graph.initializers.items():
        np.testing.assert_array_equal(
            value.const_value.numpy(), second.graph.initializers[name].const_value.numpy()
        )


def test_the_seed_decides(llama, calibration):
    found = []
    for _ in range(2):
        model = clone(llama.model)
        prune(model, calibration, sparsity=(0.5,), criterion="random")
        found.append({name: value.const_value.numpy() for name, value in model.graph.initializers.items()})
    for name, array in found[0].items():
        np.testing.assert_array_equal(array, found[1][name])


def test_ignored_groups_stay(model, calibration):
    prune(model, calibration, sparsity=(0.3,), ignore=("re:.*layers\\.1\\..*",))
    shapes = {
        name: tuple(value.shape)
        for name, value in model.graph.initializers.items()
        if "layers.1." in name and name.endswith("proj.weight")
    }
    assert shapes["model.layers.1.mlp.down_proj.weight"] == (96, 32)
    assert shapes["model.layers.1.self_attn.o_proj.weight"] == (64, 32)


def test_nothing_to_prune_says_why(model, calibration):
    with pytest.raises(NothingCoveredError, match="covered nothing"):
        prune(model, calibration, sparsity=(0.3,), targets=("no such layer",))


def test_calibration_data_is_needed(model):
    with pytest.raises(InputError, match=r"pass 'prune': .* calibration data, and there is none"):
        prune(model, (), sparsity=(0.3,))


def test_a_table_from_another_machine_is_refused_unless_forced(model, calibration, clock, tmp_path):
    other = clone(model)
    prune(other, calibration, cache=WorkCache(tmp_path), speedup=(1.5,))
    (path,) = tmp_path.rglob("latency-*.json")
    with pytest.raises(InputError, match="machine"):
        prune(model, calibration, speedup=(1.5,), latency_table=path)
    prune(model, calibration, speedup=(1.5,), latency_table=path, force_latency_table=True)
    assert weights_of(model) == weights_of(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected one of speedup, latency_ms, sparsity, found none"),
        ({"speedup": (2.0,), "sparsity": (0.5,)}, "found speedup and sparsity"),
        ({"speedup": (1.0,)}, "out of range"),
        ({"speedup": (float("nan"),)}, "out of range"),
        ({"latency_ms": (0.0,)}, "out of range"),
        ({"sparsity": (0.0,)}, "out of range"),
        ({"sparsity": (1.0,)}, "out of range"),
        ({"speedup": (2.0,), "level_factor": 1.0}, "between 0 and 1"),
        ({"speedup": (2.0,), "evaluations": 0}, "must be positive"),
        ({"speedup": (2.0,), "damp": -1.0}, "must not be negative"),
        ({"speedup": (2.0,), "deployed_with": "no-such-pass"}, "deployed_with"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(PipelineError, match=message):
        Prune(**options)


def test_the_text_form_round_trips():
    (pass_,) = Pipeline.of("prune{speedup=[1.5,2],batch=8,structures=[ffn,module]}")
    assert pass_ == Prune(speedup=(1.5, 2.0), batch=8, structures=("ffn", "module"))
    (single,) = Pipeline.of("prune{speedup=2}")
    assert single == Prune(speedup=(2.0,))
