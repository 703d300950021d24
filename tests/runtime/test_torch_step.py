"""Decoding in steps that a CUDA graph can capture: the tokens of the whole module, and nothing that waits."""

import functools

import numpy as np
import planish
import pytest
import torch
from planish.codegen.cuda.decode_step import lengths_of
from planish.codegen.torch_fx import OPS
from planish.codegen.torch_fx.freeze import freeze
from planish.codegen.torch_fx.target import Torch
from planish.ir import clone
from planish.runtime.torch_step import TorchStep
from small_decoders import VOCABULARY, small_decoder, traced_llama
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.slow

IDS = np.random.default_rng(0).integers(1, VOCABULARY, (2, 11))
DATA = [{"input_ids": IDS}]
W4A8 = "rotate,quantize{scheme=W4A8,group_size=-1,algorithm=rtn,ignore=[]}"
PASSES = {
    "floats": "canonicalize,fuse,raise-cache",
    "window": "canonicalize,fuse,window{tokens=6},raise-cache",
    "int8": "canonicalize,fuse,kv-cache{bits=8}",
    "W4A8, int4": f"canonicalize,fuse,{W4A8},kv-cache{{bits=4}}",
}


@functools.cache
def traced(kind):
    if kind == "Llama":
        return traced_llama()
    return planish.trace_causal_lm(small_decoder(kind, num_key_value_heads=None, head_dim=None))


def compiled(passes, precision="float32", kind="Llama"):
    target = planish.get_target("cuda", device="cpu", precision=precision)
    return planish.compile(clone(traced(kind)), passes, target=target, calibration=DATA)


@pytest.fixture
def without_steps(monkeypatch):
    """What makes a model run its whole module for every token."""

    def compiled_without(*arguments):
        with monkeypatch.context() as context:
            context.setattr("planish.codegen.cuda.target.Cuda.decode_step", Torch.decode_step)
            model = compiled(*arguments)
            assert model.session.step({}, {}) is None
        return model

    return compiled_without


@pytest.mark.parametrize("precision", ["float32", pytest.param("float16", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
def test_steps_give_the_tokens_of_the_whole_module(passes, precision, without_steps, monkeypatch):
    used = []
    run = TorchStep.run
    monkeypatch.setattr(TorchStep, "run", lambda self, tokens: used.append(1) or run(self, tokens))
    model, whole = compiled(passes, precision), without_steps(passes, precision)
    prompts = [IDS[0, :4].tolist(), IDS[1].tolist()]
    for given in (IDS, prompts):  # the second with padding
        np.testing.assert_array_equal(model.generate(given, 16), whole.generate(given, 16))
    assert len(used) == 2 * 15
    draft = planish.runtime.generate.PromptLookup(shortest=1)  # tokens that are taken back
    np.testing.assert_array_equal(model.generate(IDS[:1], 16, draft=draft), whole.generate(IDS[:1], 16))


def test_learned_positions(without_steps):
    found = [make(PASSES["int8"], "float32", "OPT") for make in (compiled, without_steps)]
    np.testing.assert_array_equal(*(model.generate(IDS, 12) for model in found))
    assert isinstance(found[0].session.step(*first_step(found[0])), TorchStep)


def first_step(model):
    """Caches of 32 tokens, and the token behind 7."""
    values = {str(value.name): value for value in model.bound.model.graph.inputs}
    pasts = {name: value for name, value in values.items() if name.startswith("past_key_values")}
    caches = {
        name: model.session.value(np.zeros((1, value.shape[1], 32, value.shape[3]), value.dtype.numpy()))
        for name, value in pasts.items()
    }
    one = np.ones((1, 1), np.int64)
    tokens = {"input_ids": one, "position_ids": 7 * one, "attention_mask": np.ones((1, 8), np.int64)}
    return caches, {name: array for name, array in tokens.items() if name in values}


class NothingFromNumbers(TorchDispatchMode):
    """Refuses tensors that are made of Python numbers: on a GPU they are copied, which waits for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten.lift_fresh.default, "a tensor of numbers"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
def test_a_step_asks_no_tensor_for_numbers_and_makes_none_out_of_them(passes):
    model = compiled(passes, "float16")
    caches, tokens = first_step(model)
    names = model.module.meta["planish.inputs"]
    given = {names[name]: value.tensor for name, value in caches.items()}
    given |= {names[name]: torch.as_tensor(array) for name, array in tokens.items()}
    mask = torch.ones(1, 32, dtype=torch.int64)
    of_step = given | {names["attention_mask"]: mask, "past_length": torch.tensor([7])}
    frozen, _ = freeze(model.session._step_module, of_step, OPS)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as fake, NothingFromNumbers():
        frozen(**{name: fake.from_tensor(tensor) for name, tensor in of_step.items()})
    # The whole module does both: the test would see it.
    with torch.no_grad(), pytest.raises(AssertionError, match="a tensor of numbers"), NothingFromNumbers():
        model.module(**given)
    asking = torch.fx.symbolic_trace(lambda x: x)
    asking.forward = lambda x: x.item()
    with pytest.raises(DataDependentOutputException), FakeTensorMode() as fake:
        asking.forward(fake.from_tensor(torch.ones(1)))


def test_a_step_shares_the_weights_and_the_caches_of_the_whole_module():
    model = compiled(PASSES["floats"])
    caches, tokens = first_step(model)
    step = model.session.step(caches, tokens)
    whole = {tensor.data_ptr() for tensor in model.module.state_dict().values()}
    weights = [tensor for tensor in step._module.state_dict().values() if tensor.numel() > 64]
    assert len(weights) == 10  # 4 of each layer, embeddings and logits
    assert {tensor.data_ptr() for tensor in weights} <= whole
    written = next(iter(caches.values())).tensor[0, 0]
    assert written[7].abs().max() > 0
    assert not written[:7].any()
    assert not written[8:].any()


def test_why_there_are_no_steps():
    grown = compiled("canonicalize,fuse")
    assert lengths_of(grown.bound.model) == "it has caches that are not written in place"
    assert grown.session.step(*first_step(grown)) is None
    evicting = compiled("canonicalize,fuse,raise-cache,evict{policy=snapkv,window=4,keep=0.5,recent=4}")
    assert lengths_of(evicting.bound.model) == "its caches have lengths of their own"
    assert planish.get_target("torch").decode_step(grown.bound, grown.module) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph: needs a GPU")
@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
def test_a_cuda_graph_gives_the_tokens_of_the_references(passes):
    on_gpu = planish.get_target("cuda")
    model = planish.compile(clone(traced("Llama")), passes, target=on_gpu, calibration=DATA)
    expected = compiled(passes, "float16").generate(IDS, 16)
    # Near ties of random logits may fall the other way in sums of another order.
    assert (model.generate(IDS, 16) == expected).mean() > 0.9
