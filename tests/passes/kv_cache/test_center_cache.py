"""Centring a cache: exact in float64, centred on the data, and refused where it would not be exact."""

import numpy as np
import planish
import pytest
import torch
import transformers
from planish.ir import clone, verify
from planish.passes import Pipeline
from planish.passes.infrastructure.driver import run_pipeline
from planish.passes.kv_cache import CenterCache
from planish.runtime.calibration import CalibrationData
from planish.runtime.session import Session

pytestmark = pytest.mark.slow

PORTABLE = planish.get_target("portable")
VOCABULARY, LAYERS, KV_HEADS, SIZE = 64, 2, 2, 8
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED = {**_SIZES, "intermediate_size": 64, "num_key_value_heads": KV_HEADS}
CONFIGS = {
    "Llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**_GROUPED, head_dim=SIZE)),
    "Qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**_GROUPED)),
    "OPT": (
        transformers.OPTForCausalLM,
        transformers.OPTConfig(**_SIZES, ffn_dim=64, word_embed_proj_dim=32),
    ),
}
TOLERANCE = {"OPT": 1e-12, "Llama": 1e-5, "Qwen2": 1e-5}
"""Relative to the largest logit: rounding in float64; sums of at most 64 float32 products in two layers."""


@pytest.fixture(scope="module", params=["Llama", "OPT", pytest.param("Qwen2", marks=pytest.mark.exhaustive)])
def canonical(request):
    """The graph, with values that are far from zero in the mean; in float64 where nothing is rotated."""
    torch.manual_seed(0)
    kind, config = CONFIGS[request.param]
    module = kind(config).eval()
    if request.param == "OPT":
        module = module.double()
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            if name.endswith(("k_proj.bias", "v_proj.bias")):
                tensor.add_(3.0)
    return request.param, planish.compile(module, "canonicalize", target="portable").model


@pytest.fixture(scope="module")
def calibration(canonical):
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (8, 24))
    return CalibrationData.read([{"input_ids": ids}], canonical[1])


def centred(model, calibration, *passes):
    result = run_pipeline(
        model, Pipeline(list(passes) or [CenterCache()]), target=PORTABLE, calibration=calibration
    )
    verify(model)
    return result


def outputs(model, feeds):
    return Session(model, target=PORTABLE).run(feeds)


def test_logits_stay_and_caches_are_centred(canonical, calibration):
    name, original = canonical
    model = clone(original)
    before = outputs(model, calibration[0])
    centred(model, calibration)
    after = outputs(model, calibration[0])
    scale = np.abs(before["logits"]).max()
    np.testing.assert_allclose(after["logits"], before["logits"], atol=TOLERANCE[name] * scale)
    for layer in range(LAYERS):
        values = after[f"present.{layer}.value"]
        # Means are those of float32 rows.
        np.testing.assert_allclose(values.mean((0, 2)), 0, atol=1e-6)
        keys = after[f"present.{layer}.key"]
        if name == "OPT":
            np.testing.assert_allclose(keys.mean((0, 2)), 0, atol=1e-6)
        else:  # rotated
            np.testing.assert_allclose(keys, before[f"present.{layer}.key"], atol=1e-5)


def test_a_cache_that_is_gone_on_with(canonical, calibration):
    """Two runs on top of each other give what one run of the original does."""
    name, original = canonical
    model = clone(original)
    centred(model, calibration)
    whole = calibration[0]
    expected = outputs(original, whole)["logits"]
    session = Session(model, target=PORTABLE)
    length = whole["input_ids"].shape[1]
    first = {
        key: array[:, :10] if key in ("input_ids", "position_ids", "attention_mask") else array
        for key, array in whole.items()
    }
    begun = session.run(first)
    rest = {
        key: array[:, 10:] if key in ("input_ids", "position_ids") else array for key, array in whole.items()
    }
    rest |= {
        key: begun[key.replace("past_key_values", "present")]
        for key in whole
        if key.startswith("past_key_values")
    }
    found = session.run(rest)["logits"]
    assert found.shape[1] == length - 10
    np.testing.assert_allclose(found, expected[:, 10:], atol=TOLERANCE[name] * np.abs(expected).max())


def test_merged_projections_are_skipped():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    module = transformers.GPT2LMHeadModel(config).eval()
    with pytest.raises(planish.PlanishError, match="no projections of their own"):
        planish.compile(
            module,
            "canonicalize,center-cache",
            target="portable",
            calibration=[{"input_ids": np.zeros((1, 4), np.int64)}],
        )
