"""Quantise a decoder to 4-bit weights and 4-bit activations: outliers rotated away, rounding by GPTQ."""

from __future__ import annotations

import planish
import rich
import torch
import transformers

PIPELINES = {
    "rounded to nearest": "canonicalize,fuse,quantize{scheme=W4A4}",
    "rotated, GPTQ": (
        "canonicalize,fuse,fold-norms,rotate{rotations=[R1,R2,R4],kind=random-hadamard},"
        "quantize{scheme=W4A4,algorithm=gptq}"
    ),
}


def make_decoder() -> torch.nn.Module:
    """A small random Llama with a few channels of large activations, as large models have them."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[:4] *= 30
    return model


def main() -> None:
    """Compile both ways and compare with the float model."""
    model = make_decoder()
    tokens = torch.randint(0, 512, (48, 128), generator=torch.Generator().manual_seed(1))
    # Any iterable of inputs will do; the mask, the positions and the empty cache are filled in.
    calibration = [{"input_ids": ids[None]} for ids in tokens[:32]]
    reference = model(tokens[32:]).logits
    for name, passes in PIPELINES.items():
        # "portable" keeps the standard ops: what is compared is the method, not a machine's kernels.
        compiled = planish.compile(model, passes, calibration=calibration, target="portable")
        error = torch.linalg.norm(compiled(tokens[32:]).logits - reference) / torch.linalg.norm(reference)
        print(f"{name}: relative error of the logits {error:.3f}")
    rich.print(compiled.report)
    for remark in compiled.report.passes[-1].remarks:
        print(f"{remark.subject}: {remark.text}")


if __name__ == "__main__":
    main()
