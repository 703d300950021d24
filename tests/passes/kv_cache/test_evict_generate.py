"""Generation with eviction: against transformers with a cache cut by hand, and as users run it."""

import numpy as np
import planish
import pytest
import torch
import transformers
from evictions import TARGET, gathered, kept_by, reference
from planish.ir import clone
from planish.ir.errors import InputError
from planish.passes.kv_cache import Evict
from planish.passes.kv_cache.evict.policies import POLICIES
from planish.runtime.generate import PromptLookup
from small_decoders import KV_HEADS, SIZE, VOCABULARY, small_decoder

pytestmark = pytest.mark.slow

IDS = np.random.default_rng(5).integers(0, VOCABULARY, (1, 40))


class CutCache:
    """transformers with a cache whose tokens were chosen by a policy, by hand."""

    def __init__(self, module):
        self.module = module

    def tokens(self, ids, new, choose):
        with torch.no_grad():
            result = self.module(torch.as_tensor(ids))
            cache = transformers.DynamicCache()
            for index, layer in enumerate(result.past_key_values.layers):
                keys, values = layer.keys.numpy(), layer.values.numpy()
                kept = choose(keys, values)
                cache.update(torch.tensor(gathered(keys, kept)), torch.tensor(gathered(values, kept)), index)
            found, position = list(ids[0]), ids.shape[1]
            token = int(result.logits[0, -1].argmax())
            for _ in range(new):
                found.append(token)
                logits = self.module(
                    torch.tensor([[token]]),
                    past_key_values=cache,
                    position_ids=torch.tensor([[position]]),
                    attention_mask=torch.ones(1, cache.get_seq_length() + 1, dtype=torch.int64),
                ).logits
                token, position = int(logits[0, -1].argmax()), position + 1
        return found


@pytest.mark.parametrize("target", [TARGET, planish.get_target("portable")], ids=["in place", "portable"])
def test_decoding_goes_on_as_with_a_cache_cut_by_hand(fused, module, calibration, target):
    options = Evict(policy="knorm", keep=0.3, sinks=2, recent=4)
    compiled = planish.compile(clone(fused), ["canonicalize", "fuse", options], target=target)
    expected = CutCache(module).tokens(
        IDS, 20, lambda keys, _values: kept_by(reference("knorm", keys, None, None, 1), 12, 2, 4)
    )
    for chunk in (512, 7):
        found = compiled.generate(IDS, 20, chunk=chunk)
        assert found[0].tolist() == expected
    # The check can fail: with the whole cache other tokens come.
    whole = planish.compile(clone(fused), target=target).generate(IDS, 20)
    assert whole[0].tolist() != expected


@pytest.mark.parametrize("policy", list(POLICIES))
def test_keeping_everything_changes_nothing(fused, calibration, policy):
    compiled = planish.compile(
        clone(fused),
        ["canonicalize", "fuse", Evict(policy=policy, keep=1.0)],
        target=TARGET,
        calibration=[dict(calibration[0])],
    )
    expected = planish.compile(clone(fused), target=TARGET).generate(IDS, 16)
    np.testing.assert_array_equal(compiled.generate(IDS, 16, evict_every=3), expected)


def test_a_cache_that_evicts_stays_small_and_is_gone_on_with(fused):
    compiled = planish.compile(
        clone(fused),
        ["canonicalize", "fuse", Evict(policy="recent", keep=0.25, sinks=2, recent=4)],
        target=TARGET,
    )
    decoder = compiled.decoder(capacity=40)
    compiled.generate(IDS, 12, decoder=decoder, evict_every=4)
    # 51 tokens were run; after 48, at most ⌈48 / 4⌉ stayed.
    assert decoder.length == 51
    assert decoder.cache.lengths.tolist() == [15, 15]
    assert decoder.cache.bytes == 2 * 2 * KV_HEADS * SIZE * 4 * 16
    buffers = dict(decoder.cache.buffers)
    decoder.evict(room=3)
    # As many tokens again: they go where those before were, and nothing is allocated.
    assert all(decoder.cache.buffers[name] is buffer for name, buffer in buffers.items())
    first = compiled.generate(IDS, 12, decoder=decoder, evict_every=4)
    again = compiled.generate(IDS, 12, evict_every=4)
    np.testing.assert_array_equal(first, again)
    longer = np.concatenate([first, IDS[:, :30]], axis=1)
    assert compiled.generate(longer, 5, decoder=decoder).shape == (1, 87)


def test_the_decoder_is_called_as_the_module_was(module):
    options = Evict(policy="snapkv", keep=0.5, window=4, recent=4)
    compiled = planish.compile(module, ["canonicalize", "fuse", options], target=TARGET)
    ids = torch.tensor(IDS[:, :8])
    with torch.no_grad():
        first = module(ids)
        expected = module(ids, past_key_values=first.past_key_values).logits
    found = compiled(ids)
    assert found.keys() == first.keys()
    again = compiled(ids, past_key_values=found.past_key_values).logits
    # Sums of 32 float32 products in another order, through two layers.
    torch.testing.assert_close(again, expected, rtol=0, atol=2e-5)
    with pytest.raises(InputError, match="takes no padding"):
        compiled(ids, attention_mask=torch.zeros_like(ids))


def test_another_text_is_evicted_as_the_first_was(fused):
    """Queries are kept again from the start of a text, though none were after the last eviction."""
    compiled = planish.compile(clone(fused), "evict{policy=snapkv,window=4,keep=0.5,recent=4}", target=TARGET)
    decoder = compiled.decoder(capacity=24)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (1, 17))
    found = []
    for _ in range(2):
        decoder.truncate(0)
        decoder.forward(ids[:, :16])
        decoder.evict(room=4)
        found.append(decoder.forward(ids[:, 16:]))
    np.testing.assert_array_equal(*found)


def test_folders_hold_both_models(fused, tmp_path, caplog):
    compiled = planish.compile(
        clone(fused), ["canonicalize", "fuse", Evict(policy="snapkv", window=4)], target=TARGET
    )
    assert not caplog.records  # as onnx_ir's, of values without a type
    with pytest.raises(InputError, match="two models"):
        compiled.save(tmp_path / "model.onnx")
    compiled.save(tmp_path / "decoder")
    assert sorted(file.name for file in (tmp_path / "decoder").iterdir()) == ["evict.onnx", "model.onnx"]
    opened = planish.CompiledModel.open(tmp_path / "decoder", target=TARGET)
    np.testing.assert_array_equal(opened.generate(IDS, 8), compiled.generate(IDS, 8))
    (tmp_path / "decoder" / "evict.onnx").unlink()
    with pytest.raises(planish.ModelError, match="copy the whole folder"):
        planish.CompiledModel.open(tmp_path / "decoder", target=TARGET)


def test_at_run_time(fused):
    evicting = planish.compile(clone(fused), ["canonicalize", "fuse", Evict(policy="recent")], target=TARGET)
    with pytest.raises(InputError, match="takes no padding"):
        evicting.generate([[1, 2, 3], [1, 2]], 4)
    with pytest.raises(InputError, match="with drafts, tokens are evicted once"):
        evicting.generate(IDS, 4, evict_every=2, draft=PromptLookup())
    drafted = evicting.generate(IDS, 20, draft=PromptLookup(shortest=1))
    np.testing.assert_array_equal(drafted, evicting.generate(IDS, 20))
    whole = planish.compile(clone(fused), target=TARGET)
    with pytest.raises(InputError, match="the model does not evict"):
        whole.generate(IDS, 4, evict_every=2)


def test_a_window_of_recent_tokens_goes_on_beyond_the_model_s_positions():
    module = small_decoder(num_hidden_layers=1, max_position_embeddings=48)
    window = Evict(policy="recent", keep=0, tokens=16, sinks=2, recent=14, renumber=True)
    compiled = planish.compile(module, ["canonicalize", "fuse", window], target=TARGET)
    decoder = compiled.decoder(capacity=40)
    found = compiled.generate(IDS, 100, decoder=decoder, evict_every=8)
    assert found.shape == (1, 140)
    assert decoder.cache.lengths[0] <= 24
    whole = planish.compile(module, target=TARGET)
    with pytest.raises(InputError, match="more than the model's 48 positions"):
        whole.generate(IDS, 100)


def test_an_interrupted_run_leaves_text_and_cache_alike(fused, monkeypatch):
    decoder = planish.compile(clone(fused), target=TARGET).decoder(capacity=40)
    decoder.forward(IDS[:, :5])

    def interrupted(_given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(decoder._runner, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decoder.forward(IDS[:, 5:6])
    assert decoder.length == decoder.cache.lengths.max() == 5
