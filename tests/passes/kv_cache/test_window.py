"""Windows: the same tokens from a cache that does not grow, and what is refused."""

import functools
import json

import numpy as np
import planish
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from planish.ir import clone
from planish.ir.errors import InputError, PassError, PipelineError
from planish.ir.views.caches import cached_layers
from planish.ir.views.masks import causal_mask
from planish.passes.kv_cache import KVCache, RaiseCache, Window
from planish.runtime.generate import PromptLookup
from planish.runtime.generate.cache import WINDOW_SLACK, CacheSlot
from small_decoders import SIZES, small_decoder

TARGET = planish.get_target("onnxruntime-cpu", threads=1)
WINDOW, NEW = 8, 100


def mistral(window=WINDOW, **options):
    return small_decoder("Mistral", sliding_window=window, **options)


def wide_mistral():
    return mistral(head_dim=32)


def llama():
    """The same weights, without the window."""
    return small_decoder()


def gemma():
    """With a window in the first of two layers."""
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        **SIZES, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    )
    return transformers.Gemma3ForCausalLM(config).eval()


@functools.cache
def traced(build):
    """Tracing takes seconds; what is traced is not to be changed."""
    return planish.trace_causal_lm(build())


def windowed(build, *passes):
    return planish.compile(clone(traced(build)), ["canonicalize", "fuse", *passes], target=TARGET)


@pytest.fixture(scope="module")
def module():
    return mistral()


@pytest.fixture(scope="module")
def compiled():
    return windowed(mistral, Window())


@pytest.fixture(scope="module")
def prompts():
    """Three prompts of different lengths, padded on the left."""
    ids = torch.randint(1, 64, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :2] = 0, 0
    return ids * mask, mask


def expected(module, ids, mask=None, new=NEW):
    return module.generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None
    ).numpy()


def test_the_window_of_a_traced_mask_is_found(compiled):
    for layer in cached_layers(compiled.model):
        mask = causal_mask(layer.attention.inputs[3])
        assert mask.window == WINDOW
        assert [value.name for value in mask.others] == ["attention_mask"]


def test_the_kernel_reads_no_further_back():
    """Without the pass, too; the cache then still holds everything."""
    whole = windowed(mistral, RaiseCache())
    kernels = [node for node in whole.bound.model.graph if node.op_type == "GroupQueryAttention"]
    assert {node.attributes["local_window_size"].as_int() for node in kernels} == {WINDOW}
    assert not any("sliding_window_cache" in node.attributes for node in kernels)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_tokens_are_those_of_transformers(module, compiled, prompts, batch):
    """The text is much longer than the buffers, in which tokens are moved several times."""
    ids, mask = (tensor[:batch] for tensor in prompts)
    decoder = compiled.decoder(batch=batch, capacity=1000)
    found = compiled.generate(ids.numpy(), NEW, attention_mask=mask.numpy(), decoder=decoder)
    np.testing.assert_array_equal(found, expected(module, ids, mask))
    assert {value.shape()[2] for value in decoder.cache.buffers.values()} == {WINDOW + WINDOW_SLACK}


def test_a_prompt_that_is_longer_than_the_buffers(module, compiled):
    ids = torch.randint(1, 64, (1, 100), generator=torch.Generator().manual_seed(1))
    for chunk in (7, 512):
        found = compiled.generate(ids.numpy(), 20, chunk=chunk)
        np.testing.assert_array_equal(found, expected(module, ids, new=20))


def test_a_short_text_in_a_buffer_of_the_window_s_length(module, compiled, prompts):
    ids = prompts[0][:1, :3]
    decoder = compiled.decoder(capacity=5)
    np.testing.assert_array_equal(
        compiled.generate(ids.numpy(), 3, decoder=decoder), expected(module, ids, new=3)
    )
    assert {value.shape()[2] for value in decoder.cache.buffers.values()} == {WINDOW}


def test_drafts_change_nothing(module, compiled):
    ids = torch.tensor([[5, 6, 7, 8] * 6])
    found = compiled.generate(ids.numpy(), NEW, draft=PromptLookup(shortest=1))
    np.testing.assert_array_equal(found, expected(module, ids))


def test_texts_with_the_same_beginning(module, compiled, prompts):
    """What the window forgot is run again; what it holds is not."""
    ids = prompts[0][:1]
    decoder = compiled.decoder(capacity=300)
    for new in (20, NEW, 20):
        found = compiled.generate(ids.numpy(), new, decoder=decoder)
        np.testing.assert_array_equal(found, expected(module, ids, new=new))


@pytest.mark.slow
def test_a_window_that_a_model_does_not_have(prompts):
    """A Llama with a window of 8 is a Mistral with the same weights and that window."""
    compiled = windowed(llama, Window(tokens=WINDOW))
    ids, mask = prompts
    found = compiled.generate(ids.numpy(), NEW, attention_mask=mask.numpy())
    np.testing.assert_array_equal(found, expected(mistral(), ids, mask))


def test_a_narrower_window(prompts):
    compiled = windowed(mistral, Window(tokens=5))
    ids, mask = prompts
    found = compiled.generate(ids.numpy(), NEW, attention_mask=mask.numpy())
    np.testing.assert_array_equal(found, expected(mistral(5), ids, mask))


def test_a_wider_window_stays():
    compiled = windowed(mistral, Window(tokens=100))
    assert {layer.attention.attributes["window"].as_int() for layer in cached_layers(compiled.model)} == {8}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "size", "capacity"),
    [
        *((8, 8, 111), (4, 8, 111)),
        *(pytest.param(bits, 32, 72, marks=pytest.mark.exhaustive) for bits in (8, 4)),
    ],
)
def test_integers_in_a_window(bits, size, capacity):
    """The same numbers as from a cache that holds everything, as it does where heads are too small."""
    graph = traced(mistral if size == 8 else wide_mistral)
    calibration = [{"input_ids": np.random.default_rng(0).integers(0, 64, (8, 24))}]
    ids = np.random.default_rng(1).integers(1, 64, (1, 12))
    whole, short = (
        planish.compile(
            clone(graph),
            ["canonicalize", "fuse", KVCache(bits=bits), *window],
            target=TARGET,
            calibration=calibration,
        )
        for window in ([], [Window()])
    )
    decoder = short.decoder(capacity=111)
    np.testing.assert_array_equal(short.generate(ids, NEW, decoder=decoder), whole.generate(ids, NEW))
    assert {value.shape()[2] for value in decoder.cache.buffers.values()} == {capacity}


@pytest.mark.slow
def test_layers_without_a_window_are_reported():
    """Gemma 3 has windows in some of its layers."""
    compiled = windowed(gemma, Window())
    ids = torch.randint(1, 64, (1, 12), generator=torch.Generator().manual_seed(0))
    decoder = compiled.decoder(capacity=300)
    np.testing.assert_array_equal(
        compiled.generate(ids.numpy(), NEW, decoder=decoder), expected(gemma(), ids)
    )
    lengths = [decoder.cache.buffers[f"past_key_values.{layer}.key"].shape()[2] for layer in (0, 1)]
    assert lengths == [WINDOW + WINDOW_SLACK, 300]
    assert compiled.memory(1, 300).cache == decoder.cache.bytes


def test_the_file_for_genai_tells_of_windows(compiled, tmp_path):
    compiled.save(tmp_path / "mistral")
    config = json.loads((tmp_path / "mistral" / "genai_config.json").read_text())
    assert config["model"]["decoder"]["sliding_window"] == {
        "window_size": WINDOW,
        "slide_key_value_cache": False,
        "slide_inputs": False,
        "layers": [0, 1],
        "cache_slack": WINDOW_SLACK,
    }


def test_a_model_that_sees_everything_has_no_window():
    with pytest.raises(PassError, match="it sees all tokens"):
        windowed(llama, Window())


def test_a_negative_window():
    with pytest.raises(PipelineError, match="cannot be negative"):
        Window(tokens=-1)


def slot(window):
    return CacheSlot("past", "present", 0, 2, 8, np.dtype(np.float32), True, window)


@given(window=st.integers(1, 20), slack=st.integers(0, 20), tokens=st.integers(0, 200))
def test_what_a_window_s_buffer_holds(window, slack, tokens):
    """Token by token: a full buffer first loses as many tokens as make room for slack and the new one."""
    capacity, held = window + slack, 0
    for _ in range(tokens):
        if held == capacity:
            held -= slack + 1
        held += 1
    assert slot(window).held(tokens, capacity) == held
    assert min(tokens, window) <= held <= min(tokens, capacity)


def test_what_was_forgotten_cannot_be_gone_back_to(compiled, prompts):
    decoder = compiled.decoder(capacity=1000)
    compiled.generate(prompts[0][:1].numpy(), 100, decoder=decoder)
    held = decoder.cache.revocable
    assert decoder.cache.can_drop(decoder.length - decoder.length)
    assert not decoder.cache.can_drop(decoder.length - 5)
    assert 0 <= held <= WINDOW_SLACK
    decoder.truncate(5)
    assert decoder.length == 0


def test_two_windows_are_too_many_for_genai(tmp_path):
    compiled = windowed(gemma, Window(tokens=40))
    with pytest.raises(InputError, match=r"one length of windows, found \[8, 40\]"):
        compiled.save(tmp_path / "gemma")
