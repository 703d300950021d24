"""What cannot be evicted, and says so."""

import planish
import pytest
import torch
import transformers
from evictions import apply
from planish.ir.errors import PassError, PipelineError
from planish.passes.kv_cache import Evict, KVCache
from small_decoders import VOCABULARY, small_decoder


def test_integers_are_not_merged(model, calibration):
    with pytest.raises(PassError, match="cannot be merged"):
        apply(model, calibration, KVCache(), Evict(policy="knorm", merge=True))


@pytest.mark.slow
@pytest.mark.parametrize("passes", [[KVCache()], []], ids=["integers", "no rotation"])
def test_what_cannot_be_renumbered(module, calibration, passes):
    if not passes:
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, n_positions=64
        )
        module = transformers.GPT2LMHeadModel(config).eval()
    with pytest.raises(PassError, match="cannot be renumbered"):
        planish.compile(
            module,
            ["canonicalize", "fuse", *passes, Evict(policy="recent", renumber=True)],
            target="portable",
            calibration=[{"input_ids": calibration[0]["input_ids"]}],
        )


@pytest.mark.slow
def test_sliding_windows_are_refused():
    module = small_decoder("Mistral", num_hidden_layers=1, sliding_window=16)
    with pytest.raises(PassError, match="a window of 16 tokens"):
        planish.compile(module, ["canonicalize", "fuse", Evict()], target="portable")


def test_evicting_twice_is_refused(model, calibration):
    apply(model, calibration, Evict(policy="recent"))
    with pytest.raises(PassError, match="evict once"):
        apply(model, calibration, Evict(policy="recent"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "best"}, "expected a policy of random, recent"),
        ({"keep": 0.0}, "nothing would stay"),
        ({"keep": 1.5}, "a share from 0 to 1"),
        ({"renumber": True, "budget": "pyramid"}, "equally long in all layers"),
        ({"sinks": -1}, "cannot be negative"),
        ({"kernel": 4}, "an odd number"),
        ({"draws": 0}, "at least 1"),
        ({"policy": "knorm", "window": 8}, "reads no queries"),
        ({"policy": "keydiff", "rescore": "drawn"}, "scores of keydiff are none"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(PipelineError, match=message):
        Evict(**options)
