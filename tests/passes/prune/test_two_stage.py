"""2SSP: how a sparsity is divided, which neurons and modules go, what is left, and what is refused.

Speed-ups come from a stand-in that counts weights, so that no test depends on the machine.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from planish.codegen import get_target
from planish.ir import clone, verify
from planish.ir.errors import InputError, NothingCoveredError, PassError, PipelineError
from planish.ir.structure import discover
from planish.ir.trace import trace
from planish.passes.canonicalize import Canonicalize
from planish.passes.infrastructure.base import PassContext
from planish.passes.infrastructure.driver import run_pipeline
from planish.passes.infrastructure.pipeline import Pipeline
from planish.passes.prune.deployment import Deployment, Timing
from planish.passes.prune.two_stage import TwoStage, neuron_scores
from planish.passes.prune.two_stage_plan import Sizes, attention_count, make_plan
from planish.runtime.calibration import CalibrationData
from planish.runtime.reference import run_model

TARGET = get_target("portable")
LAYERS, HIDDEN, NEURONS, VOCABULARY = 3, 16, 24, 50
IDS = np.random.default_rng(0).integers(0, VOCABULARY, (6, 20))
DEAD = (2, 3, 5, 7, 11, 13)
"""Neurons whose outputs are zero in every layer."""
ATTENTION = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2 + HIDDEN  # q, o; k, v of half the heads; the norm
FFN = 3 * HIDDEN * NEURONS


def sizes(attention=4, ffn=8, count=4, neurons=100, droppable=None):
    names = [f"layer.{index}" for index in range(count)]
    return Sizes(
        attention=(attention,) * count,
        droppable=count if droppable is None else droppable,
        ffn=dict.fromkeys(names, ffn),
        neurons=dict.fromkeys(names, neurons),
    )


@pytest.mark.parametrize(
    ("count", "attention", "ffn", "sparsity", "expected"),
    [
        # Llama-2-7B: 32 blocks, P_mlp / P_attn = 3 · 11008 / (4 · 4096) = 2.0156, power 1.3438.
        (32, 4 * 4096**2, 3 * 4096 * 11008, 0.25, 5),  # 32 · 0.1552 = 4.97
        (32, 4 * 4096**2, 3 * 4096 * 11008, 0.375, 9),  # 32 · 0.2677 = 8.57
        (32, 4 * 4096**2, 3 * 4096 * 11008, 0.5, 13),  # 32 · 0.3940 = 12.61
        (12, 4, 8, 0.5, 5),  # a plain FFN of four times the width: 12 · 0.5^(4/3) = 4.76
        (12, 4, 8, 1.0, 12),
        (12, 4, 8, 0.0, 0),
    ],
)
def test_attention_modules_by_the_formula(count, attention, ffn, sparsity, expected):
    assert attention_count(sparsity, sizes(attention, ffn, count), 1.5) == expected


def test_the_rest_of_the_budget_comes_from_the_ffns():
    """Of 4 · 12 weights half go: 2 attention modules (4 · 0.397 = 1.59) and 16 of the FFNs' 32."""
    plan = make_plan(0.5, sizes(), alpha=1.5, multiple=1)
    assert plan.attention == 2
    assert plan.widths == {f"layer.{index}": 50 for index in range(4)}
    assert plan.sparsity(sizes()) == 0.5


def test_without_attention_only_width():
    alone = Sizes(attention=(), droppable=0, ffn={"a": 10, "b": 30}, neurons={"a": 10, "b": 20})
    plan = make_plan(0.3, alone, alpha=1.5, multiple=1)
    assert plan.widths == {"a": 7, "b": 14}
    assert plan.sparsity(alone) == pytest.approx(0.3)


def test_attention_never_takes_more_than_the_budget():
    """With FFNs smaller than attention, the power is below 1: 8 · 0.05^(1/6) would be 4.9 modules."""
    small = sizes(attention=8, ffn=2, count=8)
    assert attention_count(0.05, small, 1.5) == 5
    plan = make_plan(0.05, small, alpha=1.5, multiple=1)
    assert plan.attention == 0  # one has 0.1 of the weights
    assert plan.sparsity(small) == pytest.approx(0.05)


def test_more_attention_where_the_ffns_have_no_more_to_give():
    """Widths of 64 at least: FFNs give 0.36 of 32 weights each; half of the 48 needs 4 attention modules."""
    plan = make_plan(0.5, sizes(), alpha=1.5, multiple=64)
    assert plan.attention == 4
    assert set(plan.widths.values()) == {64}


def test_attention_that_cannot_go_stays():
    assert make_plan(1.0, sizes(droppable=3), alpha=1.5, multiple=1).attention == 3


@given(
    st.floats(0.0, 1.0),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 8),
    st.sampled_from([1, 4, 16]),
)
def test_plans_meet_the_sparsity_as_nearly_as_widths_allow(sparsity, attention, ffn, count, multiple):
    """More goes only where one attention module less, and the narrowest FFNs, would not be enough."""
    whole = sizes(attention, ffn, count)
    plan = make_plan(sparsity, whole, alpha=1.5, multiple=multiple)
    assert all(width % multiple == 0 or width == 100 for width in plan.widths.values())
    assert min(plan.widths.values()) >= multiple
    most = make_plan(1.0, whole, alpha=1.5, multiple=multiple).sparsity(whole)
    rounding = (multiple / 100) * ffn / (attention + ffn)
    assert plan.sparsity(whole) >= min(sparsity, most) - rounding - 1e-9
    if plan.sparsity(whole) > sparsity + rounding + 1e-9:
        assert set(plan.widths.values()) == {100}
        less = (plan.attention - 1) * attention + (1 - multiple / 100) * ffn * count
        assert less < sparsity * whole.total


@pytest.fixture(scope="module")
def torch_llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=NEURONS, max_position_embeddings=64,
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in llama.model.layers:
            for parameter in layer.parameters():
                parameter.mul_(10 if parameter.ndim == 2 else 1)  # so that blocks matter beside the embedding
            layer.mlp.up_proj.weight[list(DEAD)] = 0
        llama.model.layers[1].self_attn.o_proj.weight.zero_()
    return llama


@pytest.fixture(scope="module")
def llama(torch_llama):
    model = trace(torch_llama)
    run_pipeline(model, Pipeline.of(Canonicalize()), target=TARGET)
    return model


@pytest.fixture(scope="module")
def data(llama):
    return CalibrationData.read([{"input_ids": IDS}], llama)


def two_stage(model, data, original=None, **options):
    ctx = PassContext(target=TARGET, calibration=data, original=original)
    result = TwoStage(**options).run(model, ctx)
    verify(model)
    remarks = {}
    for remark in ctx.remarks:
        remarks.setdefault(remark.subject, remark.text)
    return result, remarks


def widths_of(model):
    return {
        name.removesuffix(".down_proj.weight"): value.const_value.shape[0]
        for name, value in model.graph.initializers.items()
        if name.endswith("down_proj.weight")
    }


def test_useless_neurons_and_attention_go_first_and_generation_goes_on(torch_llama, llama, data):
    """Expected: layer 1 without attention, all FFNs without the dead neurons, the logits those of torch."""
    model = clone(llama)
    # One attention module: 3 · s^(1152/784/1.5) = 3 · s^0.98, and a quarter of each FFN.
    sparsity = (ATTENTION + LAYERS * FFN * len(DEAD) / NEURONS) / (LAYERS * (ATTENTION + FFN))
    result, remarks = two_stage(model, data, sparsity=sparsity)
    assert result.statistics == {"narrowed FFNs": 3, "dropped attention modules": 1}
    assert str(result.coverage) == "6 of 6 FFNs and attention modules"
    assert remarks["model.layers.1.self_attn"] == "dropped: loss 0 without it and those before"
    assert remarks["model.layers.0.mlp"] == "18 of 24 neurons stay"
    assert remarks["all FFNs and attention modules"] == (
        f"sparsity {sparsity:.4g}: 1 of 3 attention modules dropped, 3 of 3 FFNs narrowed"
    )
    assert widths_of(model) == {f"model.layers.{layer}.mlp": 18 for layer in range(LAYERS)}
    alive = np.setdiff1d(np.arange(NEURONS), DEAD)
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        kept, dense = (m.graph.initializers[name].const_value.numpy() for m in (model, llama))
        np.testing.assert_array_equal(kept, dense[alive])
    with torch.no_grad():
        expected = torch_llama(torch.from_numpy(IDS)).logits.numpy()
    (prefill,) = CalibrationData.read([{"input_ids": IDS[:, :-1]}], model)
    first = run_model(model, prefill)
    caches = [value.name for value in model.graph.inputs if value.name.startswith("past")]
    assert caches == [f"past_key_values.{layer}.{part}" for layer in (0, 2) for part in ("key", "value")]
    step = {
        "input_ids": IDS[:, -1:],
        "attention_mask": np.ones(IDS.shape, np.int64),
        "position_ids": np.full((len(IDS), 1), IDS.shape[1] - 1),
    } | {name: first[name.replace("past_key_values", "present")] for name in caches}
    found = np.concatenate([first["logits"], run_model(model, step)["logits"]], axis=1)
    tolerance = 1e-4 * np.abs(expected).max()  # three layers of float32 sums of at most 24 terms
    np.testing.assert_allclose(found, expected, atol=tolerance)


def test_neurons_are_scored_by_the_mean_of_their_norms(torch_llama, llama):
    """Against hooks in torch; two samples of other lengths, the shorter one padded on the left."""
    mask = np.ones((2, 8), np.int64)
    mask[1, :3] = 0
    ids = IDS[:2, :8]
    read = {}
    hooks = [
        layer.mlp.down_proj.register_forward_hook(
            lambda _, args, out, index=index: read.update({index: args[0]})
        )
        for index, layer in enumerate(torch_llama.model.layers)
    ]
    with torch.no_grad():
        torch_llama(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
    for hook in hooks:
        hook.remove()
    samples = CalibrationData.read([{"input_ids": ids, "attention_mask": mask}], llama)
    groups = [group for group in discover(llama).groups if group.kind == "ffn"]
    scores = neuron_scores(llama, groups, samples, PassContext(target=TARGET))
    assert list(scores) == [f"model.layers.{layer}.mlp" for layer in range(LAYERS)]
    for layer, score in enumerate(scores.values()):
        values = read[layer].double().numpy()
        expected = (np.linalg.norm(values[0], axis=0) + np.linalg.norm(values[1, 3:], axis=0)) / 2
        np.testing.assert_allclose(score, expected, rtol=1e-4, atol=1e-5)  # float32 activations
        assert not score[list(DEAD)].any()


def test_attention_goes_by_the_loss_of_the_narrowed_model(llama, data):
    """Two modules: what remains is the better of the two that matter, seen with the FFNs as they are then."""
    model = clone(llama)
    _, remarks = two_stage(model, data, sparsity=0.66, attention_samples=6)
    dropped = [name for name, text in remarks.items() if text.startswith("dropped")]
    assert dropped[0] == "model.layers.1.self_attn"
    assert len(dropped) == 2
    reference = run_model(llama, data[0])["logits"]
    other = clone(llama)
    kept = {"model.layers.0.self_attn", "model.layers.2.self_attn"} - {dropped[1]}
    losses = {}
    for name in ("model.layers.0.self_attn", "model.layers.2.self_attn"):
        other = clone(llama)
        for layer in range(LAYERS):
            weights = [f"model.layers.{layer}.mlp.down_proj.weight"]
            dense = other.graph.initializers[weights[0]].const_value.numpy()
            stay = model.graph.initializers[weights[0]].const_value.numpy()
            masked = np.where((dense[:, None] == stay[None]).all(-1).any(1)[:, None], dense, 0)
            other.graph.initializers[weights[0]].const_value = ir.tensor(masked, name=weights[0])
        for gone in ("model.layers.1.self_attn", name):
            weight = f"{gone}.o_proj.weight"
            zeros = np.zeros_like(other.graph.initializers[weight].const_value.numpy())
            other.graph.initializers[weight].const_value = ir.tensor(zeros, name=weight)
        losses[name] = divergence(run_model(other, data[0])["logits"], reference)
    assert losses[dropped[1]] < losses[kept.pop()]
    assert float(remarks[dropped[1]].split()[2]) == pytest.approx(losses[dropped[1]], rel=1e-3)  # four digits


def divergence(changed, dense):
    log_q, log_p = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (changed, dense))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.fixture
def weights_clock(monkeypatch):
    """Time is the number of weights in layers, and an overhead."""
    measured = []

    def seconds(model):
        layers = [v.const_value.size for name, v in model.graph.initializers.items() if "layers" in name]
        return 500 + sum(layers)

    def measure(self, candidate):
        measured.append(seconds(candidate))
        return Timing(seconds(self._original), seconds(candidate))

    monkeypatch.setattr(Deployment, "measure", measure)
    return measured


@pytest.mark.parametrize("speedup", [1.2, 1.5, 2.0, 3.0])
def test_speedup_is_met(speedup, llama, data, weights_clock):
    model = clone(llama)
    _, remarks = two_stage(model, data, clone(llama), speedup=speedup, sequence=8, deployed_with="")
    dense, pruned = (
        500 + sum(v.const_value.size for name, v in m.graph.initializers.items() if "layers" in name)
        for m in (llama, model)
    )
    # One neuron of each FFN is 0.024 of the weights, so 3 % are not always met: then the next faster.
    assert speedup * 0.97 <= dense / pruned <= speedup * 1.1
    measured = remarks["all FFNs and attention modules"]
    assert measured == f"measured speed-up {dense / pruned:.3g} for the target {speedup:g}"
    assert len(weights_clock) <= 10


def test_unreachable_speedup_is_refused_with_the_fastest(llama, data, weights_clock):
    with pytest.raises(PassError, match=r"speedup=50 cannot be reached: .* — the fastest .* speedup=9\.18$"):
        two_stage(clone(llama), data, clone(llama), speedup=50.0, sequence=8, deployed_with="")


def test_unreachable_sparsity_is_refused_with_the_highest(llama, data):
    with pytest.raises(
        PassError, match=r"sparsity=0.99 .* without 3 attention modules and with 4 neurons .* it is"
    ):
        two_stage(clone(llama), data, sparsity=0.99, multiple=4)


def test_no_data_is_refused(llama):
    with pytest.raises(InputError, match="two-stage: neurons are scored on calibration data"):
        two_stage(clone(llama), [], sparsity=0.5)


def test_a_model_without_ffns_says_so():
    model = ir.Model(
        ir.Graph([], [], nodes=[], opset_imports={"": 23}, name="empty"),
        ir_version=11,
    )
    pipeline = Pipeline.of("canonicalize,two-stage{sparsity=0.5}")
    with pytest.raises(NothingCoveredError, match="the model has no FFNs and attention modules"):
        run_pipeline(model, pipeline, target=TARGET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected one target, sparsity or speedup, found none"),
        ({"sparsity": 0.5, "speedup": 2.0}, "found both"),
        ({"sparsity": 1.0}, "sparsity must be between 0 and 1"),
        ({"speedup": 0.5}, "speedup must be above 1"),
        ({"sparsity": 0.5, "multiple": 0}, "multiple must be positive"),
        ({"sparsity": 0.5, "deployed_with": "nothing"}, "two-stage: deployed_with: unknown pass 'nothing'"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(PipelineError, match=message):
        TwoStage(**options)
