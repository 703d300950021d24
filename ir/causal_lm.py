"""Trace a causal language model of transformers with its key-value cache.

Inputs (int64 and the model's float type):

- ``input_ids``, ``position_ids``: ``[batch_size, sequence_length]``
- ``attention_mask``: ``[batch_size, total_sequence_length]``, 1 for tokens and 0 for padding, past included
- ``past_key_values.{i}.key`` and ``.value``: ``[batch_size, kv_heads, past_sequence_length, head_size]``

Outputs: ``logits`` ``[batch_size, sequence_length, vocab_size]`` and ``present.{i}.key`` and ``.value``, the
past with the new positions appended. An empty past has length 0. These are the names of the ONNX models of
Hugging Face and of onnxruntime-genai.

Layers with a sliding window keep their whole past in the cache; the window is in the mask.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch

from .decoder_facts import DecoderFacts
from .dynamic_shapes import BATCH, SEQUENCE, DynamicDim, relabel
from .errors import InputError, TraceError
from .signature import META_KEY, REMARKS_KEY, Signature, is_tensor
from .torch_export import trace_error, trace_flat, tracing

PAST_SEQUENCE = "past_sequence_length"
TOTAL_SEQUENCE = "total_sequence_length"

_BATCH_SIZE, _SEQUENCE_LENGTH, _PAST_LENGTH = 2, 3, 5
_ALWAYS = {"use_cache": True, "return_dict": True}
_INTEGERS = {ir.DataType.INT8: torch.int8, ir.DataType.UINT8: torch.uint8}
"""What quantised caches are stored as."""


@dataclasses.dataclass(frozen=True)
class CacheLayer:
    """The sizes of one layer's keys and values: heads and head sizes, and their type."""

    key_heads: int
    key_size: int
    value_heads: int
    value_size: int
    dtype: torch.dtype

    def empty(self, batch_size: int, length: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Give zero keys and values of some length."""
        return (
            torch.zeros(batch_size, self.key_heads, length, self.key_size, dtype=self.dtype),
            torch.zeros(batch_size, self.value_heads, length, self.value_size, dtype=self.dtype),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalLMSignature(Signature):
    """The calling convention of a causal language model with a key-value cache.

    It is called as in transformers: ``attention_mask`` (default: all ones), ``position_ids`` (default: the
    number of attended tokens before each, as in ``generate``) and ``past_key_values`` (default: empty) may
    be left out.

    Attributes:
        layers: the cache's layers.
        output_class: the ``ModelOutput`` class that the model returns.
    """

    layers: tuple[CacheLayer, ...]
    output_class: type

    def restricted(self, graph: ir.Graph) -> CausalLMSignature:
        """The convention of a graph whose cache has changed since it was traced: layers, heads, sizes, types.

        The caches that it takes and returns have the layers that are left, in order.
        """
        caches = {str(value.name): value for value in graph.inputs if _is_past(str(value.name))}
        kept = [f"past_key_values.{index}" for index in range(len(self.layers))]
        layers = [
            _resized(layer, caches[f"{name}.key"], caches[f"{name}.value"])
            for name, layer in zip(kept, self.layers, strict=True)
            if f"{name}.key" in caches
        ]
        inputs, outputs = ({str(value.name) for value in values} for values in (graph.inputs, graph.outputs))
        return dataclasses.replace(
            self,
            input_names=tuple(name for name in self.input_names if name in inputs),
            input_paths=tuple((name,) for name in self.input_names if name in inputs),
            output_names=tuple(name for name in self.output_names if name in outputs),
            layers=tuple(layers),
        )

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Give the feeds of one call; see `planish.ir.signature.flatten_inputs`."""
        arguments = {name: value for name, value in self._bind(args, kwargs).items() if value is not None}
        ids = arguments.pop("input_ids", None)
        if not is_tensor(ids) or ids.ndim != 2:
            raise InputError("input 'input_ids' is missing or is no [batch_size, sequence_length] tensor")
        ids = torch.as_tensor(ids)
        feeds: dict[str, Any] = {"input_ids": ids}
        past = self._past(arguments, batch_size=ids.shape[0])
        total = ids.shape[1] + next((cache.shape[2] for cache in past.values()), 0)
        mask = torch.as_tensor(
            arguments.pop("attention_mask", torch.ones(ids.shape[0], total, dtype=torch.int64))
        )
        if tuple(mask.shape) != (ids.shape[0], total):
            raise InputError(
                f"input 'attention_mask' is {tuple(mask.shape)}; (batch_size, past + sequence_length) = "
                f"({ids.shape[0]}, {total}) was expected"
            )
        feeds["attention_mask"] = mask.to(torch.int64)
        if "position_ids" in self.input_names:
            attended = (feeds["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            feeds["position_ids"] = arguments.pop("position_ids", attended[:, -ids.shape[1] :])
        if "attention_mask" not in self.input_names and not feeds.pop("attention_mask").all():
            raise InputError(
                "attention_mask: the model takes no padding, and found zeros",
                hint="give texts of one length, or one after the other",
            )
        for name, value in arguments.items():
            if is_tensor(value) or _ALWAYS.get(name) != value:
                raise InputError(
                    f"argument {name!r} is no input of the traced model",
                    hint=f"inputs: {', '.join(self.input_names[:4])}, …",
                )
        return feeds | past

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """Give the model's own output class, with logits and a ``DynamicCache``."""
        if len(outputs) != len(self.output_names):
            raise InputError(f"{len(outputs)} outputs were given, the model has {len(self.output_names)}")
        logits, *present = outputs
        pairs = list(zip(present[::2], present[1::2], strict=True))
        return self.output_class(logits=logits, past_key_values=_cache(pairs))

    def _past(self, arguments: dict[str, Any], *, batch_size: int) -> dict[str, Any]:
        """Take the past out of the arguments: by graph names, as a cache, as pairs, or empty."""
        names = [name for name in self.input_names if _is_past(name)]
        if any(name in arguments for name in names):
            missing = [name for name in names if name not in arguments]
            if missing:
                raise InputError(f"input {missing[0]!r} is missing")
            return {name: arguments.pop(name) for name in names}
        past = arguments.pop("past_key_values", None)
        pairs = [layer.empty(batch_size) for layer in self.layers] if past is None else _pairs(past)
        if not pairs:
            pairs = [layer.empty(batch_size) for layer in self.layers]
        if len(pairs) != len(self.layers):
            raise InputError(f"past_key_values has {len(pairs)} layers, the model has {len(self.layers)}")
        return dict(zip(names, (tensor for pair in pairs for tensor in pair), strict=True))


def _is_past(name: str) -> bool:
    return name.startswith("past_key_values.")


def _resized(layer: CacheLayer, key: ir.Value, value: ir.Value) -> CacheLayer:
    """The layer with the sizes and the type that its graph inputs [batch, heads, past, size] have now."""
    key_heads, key_size = _heads_and_size(key, (layer.key_heads, layer.key_size))
    value_heads, value_size = _heads_and_size(value, (layer.value_heads, layer.value_size))
    return CacheLayer(
        key_heads=key_heads,
        key_size=key_size,
        value_heads=value_heads,
        value_size=value_size,
        dtype=_INTEGERS.get(key.dtype or ir.DataType.UNDEFINED, layer.dtype),
    )


def _heads_and_size(cache: ir.Value, known: tuple[int, int]) -> tuple[int, int]:
    """Of [batch, heads, past, size], as far as the graph tells."""
    if cache.shape is None:
        return known
    heads, size = (
        dim if isinstance(dim, int) else default
        for dim, default in zip(cache.shape[1::2], known, strict=True)
    )
    return heads, size


def is_causal_lm(module: torch.nn.Module) -> bool:
    """Whether this is a decoder-only model of transformers with a language-model head."""
    config = getattr(module, "config", None)
    can_generate = getattr(module, "can_generate", None)
    if config is None or can_generate is None or not can_generate():
        return False
    parameters = inspect.signature(module.forward).parameters
    return not getattr(config, "is_encoder_decoder", False) and {"input_ids", "past_key_values"} <= set(
        parameters
    )


def returns_cache(module: torch.nn.Module) -> bool:
    """Whether this model of transformers returns a key-value cache unless told not to."""
    config = getattr(module, "config", None)
    if (
        not getattr(config, "use_cache", False)
        or "use_cache" not in inspect.signature(module.forward).parameters
    ):
        return False
    return getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", True)


def trace_causal_lm(model: torch.nn.Module, *, opset: int = 23) -> ir.Model:
    """Trace a causal language model of transformers with its key-value cache as inputs and outputs.

    The names, shapes and dynamic dimensions are in the module docstring of `planish.ir.causal_lm`.

    Args:
        model: a decoder-only model with a language-model head, such as ``LlamaForCausalLM``; left as it is.
        opset: the ONNX opset of the graph.

    Raises:
        InputError: the model is no causal language model of transformers.
        TraceError: its cache is no plain key-value cache, or it cannot be traced.
    """
    if not is_causal_lm(model):
        raise InputError(
            f"{type(model).__name__} is no causal language model of transformers",
            hint="use trace(module, example_inputs) for other modules",
        )
    layers, output_class = _probe(model)
    tensors = _examples(model, layers)
    names = list(tensors)
    given = [name for name in names if not _is_past(name)]

    def call(called: torch.nn.Module, values: Sequence[torch.Tensor]) -> Any:
        past = values[len(given) :]
        cache = _cache(list(zip(past[::2], past[1::2], strict=True)))
        result = called(**dict(zip(given, values, strict=False)), past_key_values=cache, **_ALWAYS)
        present = [{"key": key, "value": value} for key, value in _pairs(result.past_key_values)]
        return {"logits": result.logits, "present": present}

    traced = trace_flat(model, call, tensors, _dims(tensors), opset=opset)
    sums = (f"{PAST_SEQUENCE} + {SEQUENCE}", f"{SEQUENCE} + {PAST_SEQUENCE}")
    relabel(traced.model, dict.fromkeys(sums, TOTAL_SEQUENCE))
    traced.model.meta[META_KEY] = CausalLMSignature(
        input_names=tuple(names),
        output_names=traced.outputs.names,
        input_paths=tuple((name,) for name in names),
        parameters=_positional(model),
        layers=layers,
        output_class=output_class,
    )
    traced.model.meta[REMARKS_KEY] = traced.remarks
    DecoderFacts.of_config(model.config).write(traced.model)
    return traced.model


def _probe(model: torch.nn.Module) -> tuple[tuple[CacheLayer, ...], type]:
    """Run two tokens through the model to see the sizes of its cache and the class of its output."""
    ids = torch.zeros(1, 2, dtype=torch.int64, device=_device(model))
    with tracing(model):
        try:
            result = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=_cache([]), **_ALWAYS
            )
        except Exception as error:
            raise trace_error(error, model) from error
    try:
        pairs = _pairs(result.past_key_values)
    except (AttributeError, TypeError) as error:
        raise TraceError(
            f"{type(model).__name__} keeps a {type(result.past_key_values).__name__}, not keys and values",
            hint="models with recurrent state are traced without a cache: trace(module, example_inputs)",
        ) from error
    layers = tuple(
        CacheLayer(key.shape[1], key.shape[3], value.shape[1], value.shape[3], key.dtype)
        for key, value in pairs
    )
    return layers, type(result)


def _examples(model: torch.nn.Module, layers: Sequence[CacheLayer]) -> dict[str, torch.Tensor]:
    total = _PAST_LENGTH + _SEQUENCE_LENGTH
    positions = torch.arange(_PAST_LENGTH, total).expand(_BATCH_SIZE, -1)
    tensors = {
        "input_ids": torch.zeros(_BATCH_SIZE, _SEQUENCE_LENGTH, dtype=torch.int64),
        "attention_mask": torch.ones(_BATCH_SIZE, total, dtype=torch.int64),
    }
    if "position_ids" in inspect.signature(model.forward).parameters:
        tensors["position_ids"] = positions.contiguous()
    for index, layer in enumerate(layers):
        key, value = layer.empty(_BATCH_SIZE, _PAST_LENGTH)
        tensors[f"past_key_values.{index}.key"] = key
        tensors[f"past_key_values.{index}.value"] = value
    return {name: tensor.to(_device(model)) for name, tensor in tensors.items()}


def _dims(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[int, DynamicDim]]:
    def dim(label: str) -> DynamicDim:
        return DynamicDim(label, torch.export.Dim.AUTO, required=True)

    labels: dict[str, dict[int, str]] = {name: {0: BATCH, 1: SEQUENCE} for name in tensors}
    for name in tensors:
        if _is_past(name):
            labels[name] = {0: BATCH, 2: PAST_SEQUENCE}
    labels["attention_mask"] = {0: BATCH, 1: TOTAL_SEQUENCE}
    return {name: {axis: dim(label) for axis, label in axes.items()} for name, axes in labels.items()}


def _cache(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """Make a ``DynamicCache`` without sliding layers, which would cut off the past that a mask hides."""
    from transformers import DynamicCache  # optional dependency

    cache = DynamicCache()
    for index, (key, value) in enumerate(pairs):
        cache.update(torch.as_tensor(key), torch.as_tensor(value), index)
    return cache


def _pairs(cache: Any) -> list[tuple[Any, Any]]:
    """Give the keys and values of each layer of a cache, or of a sequence of pairs."""
    if isinstance(cache, Sequence):
        return [(pair[0], pair[1]) for pair in cache]
    return [(layer.keys, layer.values) for layer in cache.layers if layer.keys is not None]


def _positional(model: torch.nn.Module) -> tuple[str, ...]:
    parameters = inspect.signature(model.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device
