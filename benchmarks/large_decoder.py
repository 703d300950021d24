"""Decoders of a real model's shape with random weights, written as ONNX without ever being in memory.

The weights are views of one file of random numbers, which torch's exporter and our writer only pass on.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import planish
import torch
import transformers
from planish.ir import save

_CHUNK = 1 << 24
"""Numbers that are drawn; the file repeats them, each time scaled by another power of two near 1."""
_DEVIATION = 0.02


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a Llama.

    Attributes:
        hidden, inner: sizes of the residual stream and of the feed-forward network.
        layers: blocks.
        heads, kv_heads: of attention.
        vocabulary: tokens.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000


SHAPES = {
    "7B": Shape(4096, 11008, 32, 32, 32),
    "1.3B": Shape(2048, 5504, 24, 16, 16),
    "0.1B": Shape(768, 2048, 12, 12, 12),
}


def write(name: str, folder: Path, *, dtype: torch.dtype = torch.float16) -> Path:
    """Write the decoder of that shape to ``folder``; gives the path of its ONNX file."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = SHAPES[name]
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        dtype=dtype,
    )
    with torch.device("meta"):
        module = transformers.LlamaForCausalLM(config).to(dtype).eval()
    numbers = folder / "numbers.bin"
    _fill(module, numbers)
    path = folder / "model.onnx"
    save(planish.trace_causal_lm(module), path, external_data=True)
    numbers.unlink()
    return path


def _fill(module: transformers.LlamaForCausalLM, numbers: Path) -> None:
    """Put views of a file of random numbers in the place of weights that have no memory."""
    total = sum(parameter.numel() for parameter in module.parameters())
    drawn = np.random.default_rng(0).standard_normal(_CHUNK, np.float32).astype(np.float16)
    with numbers.open("wb") as file:
        for start in range(0, total, _CHUNK):
            scale = np.float16(_DEVIATION * 2.0 ** (start // _CHUNK % 7 / 7 - 0.5))
            file.write((drawn[: total - start] * scale).data)
    flat = torch.from_numpy(np.memmap(numbers, np.float16, mode="c"))
    start = 0
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            values = flat[start : start + parameter.numel()].view(parameter.shape)
            owner.register_parameter(name, torch.nn.Parameter(values, requires_grad=False))
            start += parameter.numel()
    for owner in module.modules():
        if isinstance(owner, transformers.models.llama.modeling_llama.LlamaRMSNorm):
            owner.weight = torch.nn.Parameter(torch.ones(owner.weight.shape, dtype=flat.dtype))
    module.model.rotary_emb = type(module.model.rotary_emb)(module.config)
