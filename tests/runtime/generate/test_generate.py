"""Generation against transformers' own, token for token, and against itself with other ways to run."""

import numpy as np
import planish
import planish.runtime.generate
import pytest
import torch
from planish.ir.errors import InputError
from planish.passes.kv_cache import RaiseCache
from planish.runtime.generate import PromptLookup, Sampling
from small_decoders import small_decoder

TARGET = planish.get_target("onnxruntime-cpu", threads=1)
NEW = 24


@pytest.fixture(scope="module")
def module():
    return small_decoder()


@pytest.fixture(scope="module", params=["growing", "in place"])
def compiled(module, request):
    passes = ["canonicalize", "fuse"] + ([RaiseCache()] if request.param == "in place" else [])
    return planish.compile(module, passes, target=TARGET)


@pytest.fixture(scope="module")
def prompts():
    """Three prompts of different lengths, padded on the left."""
    ids = torch.randint(1, 64, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :2] = 0, 0
    return ids * mask, mask


def expected(module, ids, mask, new=NEW):
    return module.generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None
    ).numpy()


@pytest.mark.parametrize("batch", [1, 3])
def test_the_tokens_are_those_of_transformers(module, compiled, prompts, batch):
    ids, mask = (tensor[:batch] for tensor in prompts)
    found = compiled.generate(ids.numpy(), NEW, attention_mask=mask.numpy())
    np.testing.assert_array_equal(found, expected(module, ids, mask))


def test_lists_of_different_lengths_are_padded(module, compiled, prompts):
    ids, mask = prompts
    rows = [row[row_mask.bool()].tolist() for row, row_mask in zip(ids, mask, strict=True)]
    np.testing.assert_array_equal(compiled.generate(rows, NEW), expected(module, ids, mask))


@pytest.mark.parametrize("chunk", [1, 4, 9])
def test_chunks_of_the_prompt_change_nothing(module, compiled, prompts, chunk):
    ids, mask = (tensor[:1] for tensor in prompts)
    np.testing.assert_array_equal(
        compiled.generate(ids.numpy(), NEW, chunk=chunk), expected(module, ids, mask)
    )


def test_drafts_change_nothing_but_the_number_of_runs(module, compiled, monkeypatch):
    ids = torch.tensor([[5, 6, 7, 8] * 6])
    runs = []
    forward = planish.runtime.generate.Decoder.forward

    def counted(self, ids, mask=None):
        runs.append(ids.shape[1])
        return forward(self, ids, mask)

    monkeypatch.setattr(planish.runtime.generate.Decoder, "forward", counted)
    found = compiled.generate(ids.numpy(), 60, draft=PromptLookup(shortest=1))
    np.testing.assert_array_equal(found, expected(module, ids, torch.ones_like(ids), 60))
    # Greedy text of a small model soon repeats itself: drafts are found, and some are right.
    assert len(runs) < 60
    assert max(runs[1:]) > 1


def test_stop_tokens_end_each_sequence_on_its_own(module, compiled, prompts):
    ids, mask = prompts
    whole = expected(module, ids, mask)
    stop = int(whole[0, 12])
    found = compiled.generate(
        ids.numpy(), NEW, attention_mask=mask.numpy(), stop_tokens=(stop,), pad_token=63
    )
    reference = module.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=stop, pad_token_id=63
    ).numpy()
    np.testing.assert_array_equal(found, reference)


def test_streaming_gives_the_tokens_as_they_come(compiled, prompts):
    ids = prompts[0][:1].numpy()
    streamed = []
    found = compiled.generate(ids, NEW, stream=lambda tokens: streamed.append(int(tokens[0])))
    assert streamed == found[0, ids.shape[1] :].tolist()


def test_sampling_is_seeded(compiled, prompts):
    ids = prompts[0][:1].numpy()
    first, second, other = (
        compiled.generate(ids, NEW, sampling=Sampling(temperature=2.0), seed=seed) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([[]], {}, "prompt 0 is empty"),
        ([[1, 2], []], {}, "prompt 1 is empty"),
        (np.zeros((1, 0), np.int64), {}, "at least one token"),
        (np.array([[0.5]]), {}, "expected integers"),
        (np.array([[1, 2]]), {"attention_mask": np.array([[1, 0]])}, "padding on the left"),
        (np.array([[1, 2]]), {"attention_mask": np.array([[0, 0]])}, "all padding"),
        (np.array([[1, 2]]), {"attention_mask": np.array([[1]])}, "attention_mask: expected"),
        (
            np.array([[1, 2]]),
            {"draft": PromptLookup(), "sampling": Sampling()},
            "leave sampling or draft out",
        ),
        (np.array([[1, 2], [3, 4]]), {"draft": PromptLookup()}, "one sequence at a time"),
        (np.array([[1, 2]]), {"max_new_tokens": 0}, "at least 1"),
    ],
)
def test_bad_input(compiled, prompt, options, message):
    with pytest.raises(InputError, match=message):
        compiled.generate(prompt, **options)


def test_an_encoder_cannot_generate():
    compiled = planish.compile(torch.nn.Linear(4, 4), example_inputs=torch.zeros(2, 4), target=TARGET)
    with pytest.raises(InputError, match="no key-value cache"):
        compiled.generate([[1, 2]])


def test_a_conversation_runs_only_what_is_new(module, compiled, monkeypatch):
    runs = []
    forward = planish.runtime.generate.Decoder.forward

    def counted(self, ids, mask=None):
        runs.append(ids.shape[1])
        return forward(self, ids, mask)

    monkeypatch.setattr(planish.runtime.generate.Decoder, "forward", counted)
    decoder = compiled.decoder(capacity=80)
    answer = compiled.generate([[5, 6, 7, 8]], 8, decoder=decoder)
    assert runs == [4] + [1] * 7
    longer = np.concatenate([answer, [[9, 10, 11]]], axis=1)
    other = [[5, 6, 7, 20, 21]]
    for prompt, first in ((longer, 4), (other, 2), (other, 1)):
        runs.clear()
        found = compiled.generate(prompt, 8, decoder=decoder)
        assert runs[0] == first
        ids = torch.as_tensor(np.asarray(prompt))
        np.testing.assert_array_equal(found, expected(module, ids, torch.ones_like(ids), 8))


def test_a_batch_goes_on_behind_what_its_texts_share(module, compiled, prompts):
    ids, mask = prompts
    decoder = compiled.decoder(batch=3, capacity=60)
    for end in (7, 9):
        found = compiled.generate(
            ids[:, :end].numpy(), NEW, attention_mask=mask[:, :end].numpy(), decoder=decoder
        )
        np.testing.assert_array_equal(found, expected(module, ids[:, :end], mask[:, :end]))


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([[1, 2]], {"batch": 2}, "for 2 sequences, found 1"),
        ([[1, 2]], {"capacity": 4}, "need a cache for 25, found one for 4"),
    ],
)
def test_a_decoder_of_another_size_is_refused(compiled, prompt, options, message):
    with pytest.raises(InputError, match=message):
        compiled.generate(prompt, NEW, decoder=compiled.decoder(**options))


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [
        ([[1, 64]], 1, "prompt 0, token 1: expected an id from 0 to 63, found 64"),
        ([[1, 2], [-1, 2]], 1, "prompt 1, token 0: expected an id from 0 to 63, found -1"),
        ([[1] * 129], 1, "prompt 0 has 129 tokens, the model has 128 positions"),
        ([[1] * 100], 30, "more than the model's 128 positions — max_new_tokens can be 29"),
    ],
)
def test_what_the_model_cannot_read_is_refused(compiled, prompt, new, message):
    with pytest.raises(InputError, match=message):
        compiled.generate(prompt, new)


def test_the_last_position_is_used(compiled):
    assert compiled.generate([[1] * 100], 29).shape == (1, 129)


def test_a_cache_that_was_kept_is_gone_on_with(module, compiled):
    ids = np.random.default_rng(3).integers(0, 64, (2, 9))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if "position_ids" in compiled.input_names:
        feeds["position_ids"] = np.arange(9)[None].repeat(2, axis=0)
    pasts = compiled.decoder(batch=2, capacity=4).cache.slots
    feeds |= {slot.past: np.zeros((2, slot.heads, 0, slot.size), slot.dtype) for slot in pasts}
    found = compiled.run(feeds)
    kept = {slot.present: found[slot.present] for slot in pasts}
    decoder = compiled.decoder(batch=2, capacity=16)
    decoder.restore(ids, kept)
    assert decoder.length == 9
    with torch.no_grad():
        longer = torch.as_tensor(np.concatenate([ids, ids[:, :1]], axis=1))
        expected = module(longer).logits[:, -1:]
    # Sums of float32 products in another order, through two layers.
    np.testing.assert_allclose(decoder.forward(ids[:, :1]), expected, atol=2e-5)
    with pytest.raises(InputError, match="at most 16 tokens"):
        decoder.restore(np.zeros((2, 17), np.int64), kept)
    with pytest.raises(InputError, match="expected the caches"):
        decoder.restore(ids, {})
    with pytest.raises(InputError, match=r"present.*expected \[2, "):
        decoder.restore(ids[:, :8], kept)
