"""Small decoders that the tests of several parts share."""

import functools

import onnx_ir as ir
import planish
import torch
import transformers

VOCABULARY, LAYERS, HEADS, KV_HEADS, SIZE = 64, 2, 4, 2, 8
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HEADS * SIZE,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": SIZE,
    "max_position_embeddings": 128,
}


def small_decoder(kind: str = "Llama", **changes) -> transformers.PreTrainedModel:
    """Always with the same random weights; a change to None leaves the kind's own."""
    torch.manual_seed(0)
    sizes = {name: value for name, value in {**SIZES, **changes}.items() if value is not None}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@functools.cache
def traced_llama() -> ir.Model:
    """Tracing takes seconds; what is traced is not to be changed."""
    return planish.trace_causal_lm(small_decoder())
