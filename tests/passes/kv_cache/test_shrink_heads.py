"""Fewer numbers per key and value: exact where what goes does not matter, the best otherwise, or refused."""

import functools

import numpy as np
import planish
import pytest
import torch
import transformers
from planish.ir import clone, verify
from planish.ir.errors import InputError, PassError, PipelineError
from planish.passes import Pipeline
from planish.passes.infrastructure.driver import run_pipeline
from planish.passes.kv_cache import KVCache, ShrinkHeads
from planish.passes.kv_cache.shrink_heads import important_channels, principal_axes
from small_decoders import small_decoder

pytestmark = pytest.mark.slow

TARGET = planish.get_target("onnxruntime-cpu", threads=1)
HEADS, KV_HEADS, SIZE = 4, 2, 16
IDS = np.random.default_rng(0).integers(0, 64, (2, 9))
DATA = [{"input_ids": np.random.default_rng(1).integers(0, 64, (8, 24))}]
UNUSED = np.array([1, 2, 5, 7])
"""Pairs of channels that keys do not use."""


def build(kind="Llama", **options):
    """A decoder whose keys use half of the pairs, and whose values lie in half of the dimensions."""
    sizes = {"hidden_size": 64, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    sizes["head_dim"] = None if kind in ("Qwen2", "Phi3") else SIZE
    module = small_decoder(kind, **sizes, **options)
    if kind == "Phi3":
        return module
    with torch.no_grad():
        for layer in module.model.layers:
            attention = layer.self_attn
            for tensor in (attention.k_proj.weight, attention.k_proj.bias):
                if tensor is not None:
                    tensor.normal_(0, 0.3)
                    heads = tensor.view(KV_HEADS, SIZE, -1)
                    heads[:, np.concatenate([UNUSED, UNUSED + SIZE // 2])] = 0
            basis = torch.linalg.qr(torch.randn(KV_HEADS, SIZE, SIZE))[0][..., : SIZE // 2]
            for tensor in (attention.v_proj.weight, attention.v_proj.bias):
                if tensor is not None:
                    tensor.normal_(0, 0.3)
                    heads = tensor.view(KV_HEADS, SIZE, -1)
                    heads.copy_(basis @ basis.mT @ heads)
    return module


@functools.cache
def traced(kind="Llama", **options):
    """Tracing takes seconds; what is traced is not to be changed."""
    return planish.trace_causal_lm(build(kind, **options))


def logits(compiled):
    return compiled.decoder(batch=len(IDS), capacity=IDS.shape[1]).forward(IDS)


@pytest.mark.parametrize("kind", ["Llama", pytest.param("Qwen2", marks=pytest.mark.exhaustive)])
def test_what_is_not_used_is_not_missed(kind):
    graph = clone(traced(kind))
    whole = planish.compile(clone(graph), target=TARGET)
    compiled = planish.compile(
        graph, "canonicalize,shrink-heads{keep=0.5},fuse,raise-cache", target=TARGET, calibration=DATA
    )
    verify(compiled.model)
    # Float32 products of 64 numbers, through two layers and a change of basis.
    np.testing.assert_allclose(logits(compiled), logits(whole), atol=5e-5)
    for value in compiled.model.graph.inputs:
        if value.name.startswith("past_key_values"):
            assert list(value.shape)[1::2] == [KV_HEADS, SIZE // 2]
    assert {binding.kernel for binding in compiled.bound.bindings if "Cached" in binding.op} == {
        "GroupQueryAttention"
    }
    np.testing.assert_array_equal(compiled.generate(IDS[:1], 12), whole.generate(IDS[:1], 12))


def test_layers_may_have_sizes_of_their_own(tmp_path):
    """And are generated with, quantised and from a folder, whose memory is the sum of theirs."""
    passes = "canonicalize,shrink-heads{keep=0.5,layers=[1]},fuse,kv-cache"
    compiled = planish.compile(clone(traced()), passes, target=TARGET, calibration=DATA)
    sizes = [value.shape[3] for value in compiled.model.graph.inputs if value.name.endswith(".key")]
    assert sizes == [SIZE, SIZE // 2]
    assert compiled.memory(1, 32).bytes_per_token == 2 * KV_HEADS * (SIZE + SIZE // 2)
    compiled.save(tmp_path / "decoder")
    opened = planish.CompiledModel.open(tmp_path / "decoder", target=TARGET)
    np.testing.assert_array_equal(opened.generate(IDS[:1], 8), compiled.generate(IDS[:1], 8))


def test_layers_that_there_are_not():
    with pytest.raises(PassError, match=r"expected numbers from 0 to 1, found \[2\]"):
        planish.compile(
            clone(traced()), "canonicalize,shrink-heads{layers=[0,2]}", target="portable", calibration=DATA
        )


def test_a_cache_of_fewer_numbers_can_be_quantised():
    compiled = planish.compile(
        clone(traced()),
        ["canonicalize", ShrinkHeads(keep=0.5), "fuse", KVCache(bits=8)],
        target=TARGET,
        calibration=DATA,
    )
    assert compiled.generate(IDS[:1], 8).shape == (1, 17)


def test_without_rotation():
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=64,
        hidden_size=64,
        ffn_dim=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=64,
    )
    module = transformers.OPTForCausalLM(config).eval()
    compiled = planish.compile(
        module, "canonicalize,shrink-heads{keep=0.5},fuse", target=TARGET, calibration=DATA
    )
    assert np.isfinite(compiled(torch.as_tensor(IDS)).logits.numpy()).all()


def test_pairs_with_the_largest_products_stay():
    queries = np.array([[1, 9, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 9, 1, 1]], float)
    keys = np.array([[1, 1, 25, 1, 1, 1, 1, 1]], float)
    # Pair 1 by both heads of queries, pair 2 by the keys.
    assert important_channels(queries, keys, 4, in_pairs=True).tolist() == [1, 2, 5, 6]
    assert important_channels(queries, keys, 3, in_pairs=False).tolist() == [1, 2, 5]


def test_principal_axes_are_the_best_projection():
    rng = np.random.default_rng(0)
    values = (
        rng.standard_normal((100, 6)) * [5, 1, 3, 0.5, 2, 0.1] @ np.linalg.qr(rng.standard_normal((6, 6)))[0]
    )
    (axes,) = principal_axes(np.einsum("td,te->de", values, values)[None], 3)
    lost = np.square(values - values @ axes @ axes.T).sum()
    singular = np.linalg.svd(values, compute_uv=False)
    assert lost == pytest.approx(np.square(singular[3:]).sum())


@pytest.mark.parametrize(
    ("kind", "options", "passes", "reason"),
    [
        ("Qwen3", {}, "shrink-heads", "something else lies between"),
        pytest.param(
            *("Phi3", {"pad_token_id": 0}, "shrink-heads", "no projections of their own"),
            marks=pytest.mark.exhaustive,
        ),
        ("Llama", {}, "shrink-heads{keep=0.9}", "are all of them"),
    ],
)
def test_what_cannot_be_shrunk(kind, options, passes, reason):
    model = clone(traced(kind, **options))
    with pytest.raises(PassError, match=reason):
        planish.compile(model, f"canonicalize,{passes}", target="portable", calibration=DATA)


def test_it_needs_data():
    model = clone(traced())
    with pytest.raises(InputError, match="needs calibration data"):
        run_pipeline(model, Pipeline.of("canonicalize,shrink-heads"), target=TARGET)


@pytest.mark.parametrize("keep", [0.0, 1.0, -1.0])
def test_shares_that_make_no_sense(keep):
    with pytest.raises(PipelineError, match="between 0 and 1"):
        ShrinkHeads(keep=keep)
