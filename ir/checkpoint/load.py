"""A checkpoint of quantised linears as a model of the IR, with the very integers that it stores.

The model is traced with its key-value cache, as `planish.trace_causal_lm` does, with stand-ins for its
quantised linears. Then each of them becomes a ``planish::QuantizedLinear``, or one with quantised
activations, and its tensors are read, unpacked and packed again one layer at a time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from ..causal_lm import trace_causal_lm
from ..errors import ModelError
from ..signature import REMARKS_KEY
from ..views.linears import linears
from .awq import Awq
from .compressed_tensors import CompressedTensors
from .empty_decoder import empty_decoder, fill, replace_linears
from .gptq import Gptq
from .place import Placement
from .stored_linear import Layout
from .tensors import Tensors, read_quantization_config

_METHODS: Mapping[str, type[Gptq] | type[Awq] | type[CompressedTensors]] = {
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
    "gptq": Gptq,
}


def load_checkpoint(
    source: str | os.PathLike[str] | torch.nn.Module, *, dtype: torch.dtype = torch.float32, opset: int = 23
) -> ir.Model:
    """Read a causal language model whose linears are stored quantised, without quantising anything again.

    Known are GPTQ (AutoGPTQ, GPTQModel; formats gptq and gptq_v2), AWQ (layout gemm) and the integer formats
    of compressed-tensors. What is not quantised, as embeddings and often the head, becomes float weights. A
    checkpoint that is not quantised at all is read as it is.

    Symmetric weights become signed integers without zero points. Inputs whose groups do not ascend (*act
    order*) are put in order by a ``Gather`` before the linear, one for all linears that share it.

    Args:
        source: a folder in the layout of Hugging Face (``config.json`` and safetensors files), or a model of
            transformers whose modules hold such tensors.
        dtype: float type of the model: of activations, scales and weights that are not quantised. Scales of
            16 bits are exact in float32.
        opset: the ONNX opset of the graph.

    Returns:
        The model with its integers, traced with its cache: names, shapes and dynamic dimensions are in the
        module docstring of `planish.ir.causal_lm`. ``model.meta["planish.remarks"]`` says what of the
        checkpoint was not taken over.

    Raises:
        ModelError: a file is missing or damaged, the checkpoint is quantised in another way, or its layers
            are not those of the model in transformers.
        TraceError: the model cannot be traced.
    """
    tensors, config, quantization = _open(source)
    layout = None if quantization is None else _layout(quantization, tensors.source)
    layers = frozenset[str]() if layout is None else layout.layers(tensors)
    if layout is not None and not layers:
        raise ModelError(
            f"{tensors.source}: its configuration says that it is quantised, but no layer is",
            hint="check quantization_config in config.json",
        )
    module = empty_decoder(config, dtype)
    replace_linears(module, layers, tensors, dtype)
    fill(module, tensors, dtype)
    unused = _unused(module, tensors, layers)
    model = trace_causal_lm(module, opset=opset)
    remarks = unused
    if layout is not None:
        _place(model, layout, tensors, layers)
        remarks = (*layout.remarks(layers), *unused)
    model.meta[REMARKS_KEY] = (*model.meta[REMARKS_KEY], *remarks)
    return model


def _open(
    source: str | os.PathLike[str] | torch.nn.Module,
) -> tuple[Tensors, Any, Mapping[str, Any] | None]:
    """The tensors, transformers' configuration, and what it says of quantisation."""
    if isinstance(source, torch.nn.Module):
        config: Any = getattr(source, "config", None)
        found: Any = getattr(config, "quantization_config", None)
        return Tensors.of_module(source), config, found.to_dict() if hasattr(found, "to_dict") else found
    folder = Path(source)
    quantization = read_quantization_config(folder)
    from transformers import AutoConfig  # optional dependency

    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError) as error:
        raise ModelError(
            f"{folder / 'config.json'}: transformers does not know it: {str(error).splitlines()[0]}",
            hint="models with code of their own are not read",
        ) from error
    return Tensors.of_folder(folder), config, quantization


def _layout(quantization: Mapping[str, Any], source: str) -> Layout:
    method = quantization.get("quant_method") or quantization.get("method")
    kind = _METHODS.get(str(method))
    if kind is None:
        raise ModelError(
            f"{source}: expected a checkpoint quantised by {', '.join(_METHODS)}, found {method!r}",
            hint="quantise the float model with planish",
        )
    return kind.of_config(quantization, source)


def _place(model: ir.Model, layout: Layout, tensors: Tensors, layers: frozenset[str]) -> None:
    """Replace the stand-ins in the order of the graph, each read when it is its turn."""
    placement = Placement(model)
    for linear in linears(model):
        if linear.name in layers:
            stored = layout.read(tensors, linear.name, linear.in_features, linear.out_features)
            placement.replace(linear, stored)


def _unused(module: torch.nn.Module, tensors: Tensors, layers: frozenset[str]) -> tuple[str, ...]:
    """A sentence about the checkpoint's tensors that nothing takes."""
    known = set(module.state_dict())
    left = sorted(name for name in tensors if name not in known and name.rpartition(".")[0] not in layers)
    if not left:
        return ()
    return (f"{len(left)} tensors of the checkpoint are not used (the first: {left[0]})",)
