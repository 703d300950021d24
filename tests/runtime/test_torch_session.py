"""The target torch: the numbers of onnxruntime, gradients, caches, precisions, and refusals."""

import numpy as np
import planish
import pytest
import torch
import transformers
from planish.ir import clone
from planish.ir.errors import InputError, TargetError
from small_decoders import VOCABULARY, small_decoder, traced_llama

CPU = planish.get_target("onnxruntime-cpu", threads=1)
TORCH = planish.get_target("torch")
PASSES = ("canonicalize,fuse", "canonicalize,fuse,kv-cache{bits=4}")
IDS = np.random.default_rng(0).integers(1, VOCABULARY, (2, 11))
DATA = [{"input_ids": IDS}]
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vision():
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
    )
    return transformers.ViTForImageClassification(config)


def convolutions():
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5, layer_type="basic"
    )
    return transformers.ResNetForImageClassification(config)


def gpt2():
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(config)


MODELS = {
    "ViT": (vision, {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}),
    "CNN": (
        convolutions,
        {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))},
    ),
    "GPT-2": (gpt2, {"input_ids": torch.as_tensor(IDS)}),
    "Llama": (small_decoder, {"input_ids": torch.as_tensor(IDS)}),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["CNN", "Llama", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("ViT", "GPT-2"))]
)
def test_the_outputs_are_those_of_onnxruntime_and_all_weights_have_gradients(name):
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    module = build().eval()
    traced = planish.compile(module, example_inputs=inputs, target="portable")
    compiled = {
        target: planish.compile(clone(traced.model), ["canonicalize", "fuse"], target=target)
        for target in (CPU, planish.get_target("torch", trainable=True))
    }
    by_onnxruntime, by_torch = (model(**inputs) for model in compiled.values())
    first = next(iter(by_torch))
    # Float32 sums of up to 64 terms in another order, through two layers.
    torch.testing.assert_close(by_torch[first].detach(), by_onnxruntime[first], rtol=1e-4, atol=1e-5)
    by_torch[first].square().sum().backward()
    parameters = dict(list(compiled.values())[1].module.named_parameters())
    weights = {key for key, parameter in parameters.items() if parameter.numel() > 64}
    without = {key for key in weights if parameters[key].grad is None or not parameters[key].grad.any()}
    assert weights
    assert not without


@pytest.mark.parametrize(
    "passes", ["canonicalize,fuse", "canonicalize,fuse,kv-cache{bits=4}"], ids=["floats", "int4"]
)
def test_generation(passes):
    found = [
        planish.compile(clone(traced_llama()), passes, target=target, calibration=DATA).generate(IDS, 16)
        for target in (CPU, TORCH)
    ]
    np.testing.assert_array_equal(found[1], found[0])


def test_generation_with_evictions_drafts_and_padding():
    passes = "canonicalize,fuse,evict{policy=snapkv,window=4,keep=0.5,recent=4}"
    evicting = [planish.compile(clone(traced_llama()), passes, target=target) for target in (CPU, TORCH)]
    found = [model.generate(IDS[:1], 16, evict_every=4) for model in evicting]
    np.testing.assert_array_equal(found[1], found[0])
    whole = planish.compile(clone(traced_llama()), target=TORCH)
    prompts = [IDS[0, :4].tolist(), IDS[1].tolist()]
    padded = whole.generate(prompts, 8)
    np.testing.assert_array_equal(padded[1:], whole.generate(prompts[1:], 8))
    drafted = whole.generate(IDS[:1], 16, draft=planish.runtime.generate.PromptLookup(shortest=1))
    np.testing.assert_array_equal(drafted, whole.generate(IDS[:1], 16))


@pytest.mark.parametrize("scheme", ["W4A16,group_size=32", "W8A8,group_size=-1"])
def test_quantised_layers_compute_the_same(scheme):
    passes = f"canonicalize,fuse,quantize{{scheme={scheme},algorithm=rtn,ignore=[]}}"
    found = [
        planish.compile(clone(traced_llama()), passes, target=target).run(
            planish.runtime.calibration.data.completed({"input_ids": IDS}, traced_llama())
        )["logits"]
        for target in (planish.get_target("portable"), TORCH)
    ]
    # The same integers; a float32 sum in another order may move an activation to the next integer.
    assert np.abs(found[1] - found[0]).max() < 0.02 * np.abs(found[0]).max()


@pytest.mark.parametrize("precision", ["float64", "bfloat16", "float16"])
def test_precisions(precision):
    exact = planish.compile(clone(traced_llama()), target=TORCH)(torch.as_tensor(IDS))
    model = planish.compile(clone(traced_llama()), target=planish.get_target("torch", precision=precision))
    found = model(torch.as_tensor(IDS))
    dtype = getattr(torch, precision)
    assert found["logits"].dtype == dtype
    tolerance = 8 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    difference = (found["logits"].float() - exact["logits"]).abs().max()
    assert difference < tolerance * exact["logits"].abs().max()
    assert model.generate(IDS, 4).shape == (2, 15)


def test_the_module_can_be_compiled_by_torch():
    compiled = planish.compile(clone(traced_llama()), "canonicalize,fuse", target=TORCH)
    feeds = planish.runtime.calibration.data.completed({"input_ids": IDS}, compiled.model)
    names = compiled.module.meta["planish.inputs"]
    tensors = {names[name]: torch.as_tensor(array) for name, array in feeds.items()}
    with torch.no_grad():
        expected = compiled.module(**tensors)["logits"]
        found = torch.compile(compiled.module, backend="aot_eager", fullgraph=True)(**tensors)["logits"]
    torch.testing.assert_close(found, expected)


def test_files_go_from_torch_to_onnxruntime(tmp_path):
    passes = "canonicalize,fuse,quantize{scheme=W4A16,group_size=32,algorithm=rtn}"
    compiled = planish.compile(clone(traced_llama()), passes, target=TORCH)
    path = compiled.save(tmp_path / "model.onnx")
    feeds = planish.runtime.calibration.data.completed({"input_ids": IDS}, compiled.model)
    for target in (TORCH, CPU):
        opened = planish.CompiledModel.open(path, target=target)
        np.testing.assert_allclose(opened.run(feeds)["logits"], compiled.run(feeds)["logits"], atol=1e-5)
    bound = planish.compile(clone(traced_llama()), "canonicalize,fuse,raise-cache", target=CPU)
    path = bound.save(tmp_path / "bound.onnx")
    with pytest.raises(TargetError, match="GroupQueryAttention, which is not lowered"):
        planish.CompiledModel.open(path, target=TORCH).run(feeds)


def test_refusals():
    compiled = planish.compile(clone(traced_llama()), target=TORCH)
    with pytest.raises(InputError, match="inputs do not match"):
        compiled.run({"input_ids": IDS})
    feeds = planish.runtime.calibration.data.completed({"input_ids": IDS}, compiled.model)
    with pytest.raises(InputError, match="expected dtype int64, found int32"):
        compiled.run({**feeds, "input_ids": IDS.astype(np.int32)})
    with pytest.raises(InputError, match="torch could not run the model on inputs input_ids"):
        compiled.run({**feeds, "input_ids": IDS + VOCABULARY})
    with pytest.raises(InputError, match="is no module of torch"):
        planish.compile(clone(traced_llama()), target=CPU).module  # noqa: B018
    with pytest.raises(TargetError, match="precision: expected one of"):
        planish.get_target("torch", precision="float8")
    with pytest.raises(TargetError, match="torch knows no device 'gpu'"):
        planish.get_target("torch", device="gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_there_is_not():
    with pytest.raises(TargetError, match="torch finds no CUDA device"):
        planish.get_target("torch", device="cuda")
