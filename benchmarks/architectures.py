"""Small random models of well-known architectures, with inputs at several sizes: what tracing is measured on.

Every model is built from its configuration class in transformers, so nothing is downloaded. All parameters
and running statistics are perturbed: fresh models have zero biases and unit norms, which would hide a rewrite
that mixes them up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers

Call = dict[str, Any]

VOCABULARY = 96
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
GROUPED = TEXT | {"num_key_value_heads": 2, "max_position_embeddings": 128}
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYER_TYPES = ["sliding_attention", "full_attention"]
DIMS_OF_IMAGES = {"pixel_values": {0: "batch_size", 2: "height", 3: "width"}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """One architecture: how to build it, what to trace it with, and the calls to compare at other sizes.

    Attributes:
        name: as the field calls it.
        build: makes the module.
        example: keyword arguments to trace with; None for a causal language model, traced with its cache.
        calls: keyword arguments at other sizes; for a causal language model, each follows from the one before
            through the cache, until a call that has no past of its own starts anew.
        dynamic_shapes: as for `planish.ir.trace.trace`.
    """

    name: str
    build: Callable[[], torch.nn.Module]
    example: Call | None
    calls: tuple[Call, ...]
    dynamic_shapes: Any = None

    def module(self) -> torch.nn.Module:
        """Build the module in evaluation mode with all its parameters and statistics perturbed."""
        torch.manual_seed(0)
        module = self.build().eval()
        with torch.no_grad():
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                if tensor.is_floating_point() and "inv_freq" not in name:
                    noise = torch.randn_like(tensor) * 0.05
                    tensor.add_(noise.abs() if name.endswith("running_var") else noise)
        return module


def _tokens(batch: int, length: int, *, padding: int = 0) -> Call:
    """Token ids and a mask that hides the last ``padding`` tokens of the first text."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    if padding:
        mask[0, -padding:] = 0
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "attention_mask": mask}


def _images(batch: int, height: int = 32, width: int = 32) -> Call:
    generator = torch.Generator().manual_seed(height + width)
    return {"pixel_values": torch.randn(batch, 3, height, width, generator=generator)}


def _text_encoder(name: str, build: Callable[[], torch.nn.Module]) -> Architecture:
    return Architecture(
        name=name,
        build=build,
        example=_tokens(2, 12),
        calls=(_tokens(1, 7), _tokens(3, 19, padding=5)),
    )


def _convolutional(name: str, build: Callable[[], torch.nn.Module]) -> Architecture:
    return Architecture(
        name=name,
        build=build,
        example=_images(2, 64, 64),
        calls=(_images(1, 64, 96), _images(3, 96, 64)),
        dynamic_shapes=DIMS_OF_IMAGES,
    )


def _causal(name: str, build: Callable[[], torch.nn.Module]) -> Architecture:
    """Two conversations: left-padded prompts, then one token, then several; and twice a single token."""
    prompts = _tokens(3, 9)
    prompts["attention_mask"][0, :4] = 0
    prompts["attention_mask"][1, :1] = 0
    step, chunk = _tokens(3, 1), _tokens(3, 6)
    return Architecture(
        name=name, build=build, example=None, calls=(prompts, step, chunk, _tokens(1, 1), _tokens(1, 1))
    )


def _config(kind: str, **options: Any) -> Any:
    return getattr(transformers, f"{kind}Config")(**options)


def _model(kind: str, suffix: str, **options: Any) -> Callable[[], torch.nn.Module]:
    """Build ``{kind}{suffix}`` from ``{kind}Config``."""
    return lambda: getattr(transformers, f"{kind}{suffix}")(_config(kind, **options))


def _whisper_encoder() -> torch.nn.Module:
    config = _config(
        "Whisper", vocab_size=VOCABULARY, d_model=32, encoder_layers=2, encoder_attention_heads=4,
        decoder_layers=1, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=16,
        max_source_positions=24, **SPECIAL_TOKENS, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperModel(config).get_encoder()


def _clip() -> torch.nn.Module:
    text = TEXT | {"max_position_embeddings": 32} | SPECIAL_TOKENS
    vision = {key: value for key, value in TEXT.items() if key != "vocab_size"}
    config = transformers.CLIPConfig(
        text_config=text, vision_config=vision | {"image_size": 32, "patch_size": 8}, projection_dim=16
    )
    return transformers.CLIPModel(config)


def _gemma3() -> torch.nn.Module:
    return transformers.Gemma3ForCausalLM(
        _config("Gemma3Text", **GROUPED, head_dim=16, sliding_window=5, layer_types=LAYER_TYPES)
    )


def _clip_call(texts: int, length: int, images: int) -> Call:
    return _tokens(texts, length) | _images(images)


_MEL = torch.Generator().manual_seed(0)

ARCHITECTURES: tuple[Architecture, ...] = (
    _text_encoder("BERT", _model("Bert", "Model", **TEXT)),
    _text_encoder(
        "DistilBERT",
        _model("DistilBert", "Model", vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=64),
    ),
    _text_encoder("RoBERTa", _model("Roberta", "Model", **TEXT, **SPECIAL_TOKENS)),
    _text_encoder("MPNet", _model("MPNet", "Model", **TEXT, **SPECIAL_TOKENS)),
    _text_encoder("ALBERT", _model("Albert", "Model", **TEXT, embedding_size=16)),
    _causal(
        "GPT-2",
        _model(
            "GPT2", "LMHeadModel", vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, **SPECIAL_TOKENS
        ),
    ),
    _causal(
        "OPT",
        _model(
            "OPT", "ForCausalLM", vocab_size=VOCABULARY, hidden_size=32, word_embed_proj_dim=32,
            num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, max_position_embeddings=64,
        ),
    ),
    _causal("Llama", _model("Llama", "ForCausalLM", **GROUPED)),
    _causal("Mistral", _model("Mistral", "ForCausalLM", **GROUPED, sliding_window=5, head_dim=8)),
    _causal("Qwen2", _model("Qwen2", "ForCausalLM", **GROUPED)),
    _causal("Qwen3", _model("Qwen3", "ForCausalLM", **GROUPED, head_dim=16)),
    _causal("Gemma", _model("Gemma", "ForCausalLM", **GROUPED, head_dim=16)),
    _causal("Gemma 2", _model("Gemma2", "ForCausalLM", **GROUPED, head_dim=16, sliding_window=5)),
    _causal("Gemma 3", _gemma3),
    _causal("Phi-3", _model("Phi3", "ForCausalLM", **GROUPED, **SPECIAL_TOKENS)),
    _text_encoder(
        "T5 encoder",
        _model(
            "T5", "EncoderModel", vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2,
            num_heads=4,
        ),
    ),
    Architecture(
        name="Whisper encoder",
        build=_whisper_encoder,
        example={"input_features": torch.randn(2, 16, 48, generator=_MEL)},
        calls=tuple({"input_features": torch.randn(batch, 16, 48, generator=_MEL)} for batch in (1, 5)),
    ),
    Architecture(
        name="CLIP",
        build=_clip,
        example=_clip_call(2, 7, 3),
        calls=(_clip_call(1, 5, 2), _clip_call(4, 11, 1)),
    ),
    Architecture(
        name="ViT",
        build=_model(
            "ViT", "Model", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            image_size=32, patch_size=8,
        ),
        example=_images(2),
        calls=(_images(1), _images(5)),
    ),
    _convolutional(
        "ConvNeXt", _model("ConvNext", "Model", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1])
    ),
    _convolutional(
        "ResNet",
        _model("ResNet", "Model", embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]),
    ),
    # Its padding, as in TensorFlow, is computed in Python from the image size, which fixes the size.
    Architecture(
        name="MobileNetV2",
        build=_model("MobileNetV2", "Model", depth_multiplier=0.35),
        example=_images(2, 64, 64),
        calls=(_images(1, 64, 64), _images(5, 64, 64)),
    ),
    _convolutional(
        "SegFormer",
        _model(
            "Segformer", "ForSemanticSegmentation", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1],
            num_attention_heads=[1, 2, 3, 4], decoder_hidden_size=16,
        ),
    ),
)  # fmt: skip


def by_name(name: str) -> Architecture:
    """Find an architecture by name, without regard to case, spaces and hyphens.

    Raises:
        KeyError: there is none; lists the names.
    """

    def plain(text: str) -> str:
        return "".join(character for character in text.lower() if character.isalnum())

    known: Mapping[str, Architecture] = {plain(a.name): a for a in ARCHITECTURES}
    if plain(name) not in known:
        raise KeyError(f"no architecture {name!r}; known: {', '.join(a.name for a in ARCHITECTURES)}")
    return known[plain(name)]
