"""The file ``genai_config.json``, by which onnxruntime-genai loads a decoder and generates with it.

Conventions: inputs ``input_ids``, ``attention_mask`` and ``position_ids``, caches
``past_key_values.{i}.key|value`` [batch, kv_heads, length, size] and ``present.{i}.key|value``. The type of
caches, their heads and sizes are read there from the graph, so pruned, windowed and quantised caches work.
Past and present share a buffer where the kernels append in place. Caches of windows are announced with the
room that they have besides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from ...ir.decoder_facts import DecoderFacts
from ...ir.errors import InputError
from .cache import WINDOW_SLACK, CacheSlot, cache_slots

CONFIG_FILE = "genai_config.json"
_PLAIN = ("input_ids", "attention_mask", "position_ids")
_KNOWN = frozenset(
    {
        "ernie4_5",
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "nemotron",
        "olmo",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
    }
)
"""Architectures that are run there as any decoder is; others go by the general name ``decoder``."""
_GENERAL = "decoder"


def genai_config(
    model: ir.Model, facts: DecoderFacts, filename: str, session_options: Mapping[str, str]
) -> dict[str, Any]:
    """The configuration of a bound decoder.

    Args:
        model: bound; its names are those of the convention.
        facts: what the graph does not say.
        filename: of the model, beside the configuration.
        session_options: configuration entries that its kernels rely on.

    Raises:
        InputError: the model has no cache, or an input that the convention does not know.
    """
    slots = cache_slots(model)
    inputs = [str(value.name) for value in model.graph.inputs]
    others = sorted(set(inputs) - {slot.past for slot in slots} - set(_PLAIN))
    if others:
        raise InputError(
            f"onnxruntime-genai does not know the input {others[0]!r}",
            hint="save one file, model.onnx, and generate with planish",
        )
    if facts.positions is None:
        raise InputError("onnxruntime-genai needs the number of a model's positions, which is not known")
    keys = [slot for slot in slots if slot.past.endswith(".key")]
    return {
        "model": {
            "type": facts.architecture if facts.architecture in _KNOWN else _GENERAL,
            **_special_tokens(facts),
            "context_length": facts.positions,
            "vocab_size": facts.vocabulary,
            "decoder": {
                "filename": filename,
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "provider_options": [],
                    **session_options,
                },
                "head_size": facts.head_size,
                "hidden_size": facts.hidden_size,
                "num_attention_heads": facts.heads,
                "num_key_value_heads": keys[0].heads,
                "num_hidden_layers": len(keys),
                "inputs": {name: name for name in _PLAIN if name in inputs}
                | {f"past_{part}_names": f"past_key_values.%d.{part}" for part in ("key", "value")},
                "outputs": {"logits": "logits"}
                | {f"present_{part}_names": f"present.%d.{part}" for part in ("key", "value")},
                **_window(keys),
            },
        },
        "search": {
            "do_sample": False,
            "max_length": facts.positions,
            "num_beams": 1,
            "past_present_share_buffer": all(slot.in_place for slot in slots),
        },
    }


def _window(keys: Sequence[CacheSlot]) -> dict[str, Any]:
    """How long the buffers of layers with a window are; nothing if there are none."""
    windows = {slot.window for slot in keys if slot.window}
    if not windows:
        return {}
    if len(windows) > 1:
        raise InputError(
            f"onnxruntime-genai knows one length of windows, found {sorted(windows)}",
            hint="give the pass window tokens= of the shortest, or save one file, model.onnx",
        )
    return {
        "sliding_window": {
            "window_size": windows.pop(),
            "slide_key_value_cache": False,
            "slide_inputs": False,
            "layers": [slot.layer for slot in keys if slot.window],
            "cache_slack": WINDOW_SLACK,
        }
    }


def _special_tokens(facts: DecoderFacts) -> dict[str, Any]:
    """Those that there are: a key for none is refused."""
    found: dict[str, Any] = {"pad_token_id": facts.pad_token}
    if facts.pad_token is None:
        found["pad_token_id"] = facts.end_tokens[0] if facts.end_tokens else 0
    if facts.begin_token is not None:
        found["bos_token_id"] = facts.begin_token
    if facts.end_tokens:
        found["eos_token_id"] = list(facts.end_tokens)
    return found
