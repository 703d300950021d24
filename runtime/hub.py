"""A compiled model in the layout of the Hugging Face hub, as optimum and transformers.js read it.

    config.json, generation_config.json, tokenizer.json, …
    onnx/model_q4.onnx                     and model_q4.onnx_data where weights are in a second file

The file's name says how most of its linears and convolutions store their weights, since that is what a user
of transformers.js asks for (``dtype: "q4"``):

| name | weights |
|---|---|
| ``model.onnx``, ``model_fp16.onnx`` | float32, float16 |
| ``model_q4.onnx``, ``model_q4f16.onnx`` | integers of 3 or 4 bits, in a model of float32, of float16 |
| ``model_q2.onnx``, ``model_q2f16.onnx`` | integers of 2 bits |
| ``model_quantized.onnx``, also ``model_int8.onnx`` or ``model_uint8.onnx`` | integers of 5 to 8 bits |
| ``model_bnb4.onnx`` | 4-bit code books: NF4, FP4 |

Several such files may share a folder.
"""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..codegen.target import BoundModel
from ..ir import ops, save
from ..ir.errors import InputError
from ..ir.files import folder_beside, move_all, unwritable, write_whole
from ..ir.signature import CONFIG_KEY
from .folder import write_tokenizer

ONNX_FOLDER = "onnx"
_CONFIG, _GENERATION_CONFIG = "config.json", "generation_config.json"
_DATA_SUFFIX = "_data"
_JS, _EXTERNAL = "transformers.js_config", "use_external_data_format"
_SOURCE_ONLY = ("quantization_config", "compression_config")
"""What a checkpoint's configuration says of how the checkpoint is stored, and not the model."""

_NAMES = {
    ("float", False): ("model.onnx",),
    ("float", True): ("model_fp16.onnx",),
    ("q4", False): ("model_q4.onnx",),
    ("q4", True): ("model_q4f16.onnx",),
    ("q2", False): ("model_q2.onnx",),
    ("q2", True): ("model_q2f16.onnx",),
    ("int8", False): ("model_quantized.onnx", "model_int8.onnx"),
    ("uint8", False): ("model_quantized.onnx", "model_uint8.onnx"),
    ("bnb4", False): ("model_bnb4.onnx",),
}
_PRODUCTS = frozenset(
    {
        "MatMul",
        "Gemm",
        "Conv",
        "MatMulInteger",
        "ConvInteger",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
    }
)
"""Ops whose second operand is a weight, in a bound model."""
_BETWEEN = frozenset({"DequantizeLinear", "Cast", "Transpose", "Reshape", "Identity"})
"""Ops between a stored weight and its product."""
_DTYPES = {
    ir.DataType.FLOAT: "float",
    ir.DataType.FLOAT16: "float",
    ir.DataType.INT4: "q4",
    ir.DataType.UINT4: "q4",
    ir.DataType.INT8: "int8",
    ir.DataType.UINT8: "uint8",
}
Kind = tuple[str, bool]
"""How a weight is stored, and whether its model's floats have 16 bits."""


def hub_file_names(model: ir.Model) -> tuple[str, ...]:
    """The names that the hub's convention has for a model, the usual one first.

    Args:
        model: bound or not.

    Raises:
        InputError: there is no name for how its weights are stored, or it has none.
    """
    kinds = collections.Counter(kind for node in model.graph.all_nodes() for kind in _kinds(node))
    if not kinds:
        raise InputError(
            "the hub names files by the weights of linears and convolutions, and the model has none",
            hint="give name=",
        )
    kind = kinds.most_common(1)[0][0]
    names = _NAMES.get(kind)
    if names is None:
        stored, half = kind
        raise InputError(
            f"the hub has no name for {stored} weights in a model of float{16 if half else 32}",
            hint="give name=, for example model_fp8.onnx",
        )
    return names


def _kinds(node: ir.Node) -> Iterator[Kind]:
    """How ``node`` stores its weight, if it is a product with one."""
    if node.domain == ops.DOMAIN and node.op_type in (*ops.LINEAR_OPS, "QuantizedConv"):
        yield _planish_kind(node), _is_half(node.inputs[0])
    elif node.op_type == "MatMulNBits":
        bits = node.attributes.get_int("bits", 4)
        yield {2: "q2", 4: "q4"}.get(bits, "uint8"), _is_half(node.inputs[2]) and bits <= 4
    elif node.op_type == "MatMulBnb4":
        yield "bnb4", False
    elif node.op_type in _PRODUCTS and len(node.inputs) > 1:
        weight, half = _stored(node.inputs[1])
        if weight is not None and weight.dtype is not None:
            kind = _DTYPES.get(weight.dtype, weight.dtype.name.lower())
            yield kind, (half or _is_half(weight)) and kind not in ("int8", "uint8")


def _planish_kind(node: ir.Node) -> str:
    weight, bits = node.inputs[1], node.attributes["bits"].as_int()
    if node.overload.startswith("codebook"):
        return "bnb4" if bits == 4 and node.overload in ("codebook", "codebook_bias") else "code book"
    if weight is None or weight.dtype not in _DTYPES:
        return "float8"
    return "q2" if bits <= 2 else "q4" if bits <= 4 else _DTYPES[weight.dtype]


def _is_half(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT16


def _stored(value: ir.Value | None) -> tuple[ir.Value | None, bool]:
    """The initializer that a weight is made of, None if there is none, and whether its scales are float16."""
    half = False
    while value is not None and (node := value.producer()) is not None and node.op_type in _BETWEEN:
        half = half or (node.op_type == "DequantizeLinear" and _is_half(node.inputs[1]))
        value = node.inputs[0]
    return (value if value is not None and value.const_value is not None else None), half


def save_hub(
    bound: BoundModel,
    model: ir.Model,
    folder: Path,
    *,
    name: str | None = None,
    config: Any = None,
    tokenizer: Any = None,
    external_data: bool | None = None,
) -> Path:
    """Write a bound model into a folder in the hub's layout; see `CompiledModel.save_hub`.

    Args:
        bound: what is written.
        model: the graph that it was bound from, which knows what it was traced from.
        folder: made if it is not there; other files in it stay.
        name: of the file; None for the convention's.
        config: a configuration of transformers, or a folder with ``config.json``; None for the one that the
            model was traced with, or that is in the folder.
        tokenizer: one of transformers, or a folder that has its files.
        external_data: as of `planish.ir.save`.

    Returns:
        The path of the ONNX file.

    Raises:
        ModelError: the folder cannot be written.
        InputError: the convention has no name for the model, or there is no configuration or tokenizer in
            what was given.
    """
    name = name or hub_file_names(model)[0]
    stated = _configuration(model, folder, config)
    path = folder / ONNX_FOLDER / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        has_data = _write_model(bound.model, path, external_data)
        if stated is not None:
            _note_external_data(stated, name, has_data)
            _write_json(folder / _CONFIG, stated)
        if tokenizer is not None:
            write_tokenizer(tokenizer, folder)
        if isinstance(config, str | os.PathLike) and (Path(config) / _GENERATION_CONFIG).is_file():
            _write_json(folder / _GENERATION_CONFIG, _read_json(Path(config) / _GENERATION_CONFIG))
    except OSError as error:
        raise unwritable(folder, error) from error
    return path


def _write_model(model: ir.Model, path: Path, external_data: bool | None) -> bool:
    """Write the file and, where weights are too large for it, their own; returns whether they were."""
    data = path.with_name(path.name + _DATA_SUFFIX)
    with folder_beside(path) as made:
        save(model, made / path.name, external_data=external_data, data_suffix=_DATA_SUFFIX)
        has_data = (made / data.name).is_file()
        targets = [data, path] if has_data else [path]
        removed = [] if has_data else [data]
        move_all([made / target.name for target in targets], targets, removed=removed)
    return has_data


def _configuration(model: ir.Model, folder: Path, config: Any) -> dict[str, Any] | None:
    """``config.json``, with what the one that is there says of other files; None if nothing is known."""
    there = folder / _CONFIG
    before = _read_json(there) if there.is_file() else None
    if hasattr(config, "to_json_string"):
        stated: dict[str, Any] | None = json.loads(config.to_json_string())
    elif config is not None:
        stated = _read_json(Path(config) / _CONFIG)
    else:
        text = model.meta.get(CONFIG_KEY)
        stated = before if text is None else json.loads(text)
    if stated is None:
        return None
    kept = {key: value for key, value in stated.items() if key not in _SOURCE_ONLY}
    if before is not None and _JS in before:
        kept[_JS] = {**kept.get(_JS, {}), **before[_JS]}
    return kept


def _note_external_data(config: dict[str, Any], name: str, external: bool) -> None:
    """transformers.js loads ``<name>_data`` only if the configuration says that there is such a file."""
    settings: Mapping[str, Any] = config.get(_JS, {})
    stated = settings.get(_EXTERNAL, {})
    files = dict(stated) if isinstance(stated, Mapping) else {}
    files.pop(name, None)
    if external:
        files[name] = 1
    others = {key: value for key, value in settings.items() if key != _EXTERNAL}
    config.pop(_JS, None)
    if others or files:
        config[_JS] = {**others, **({_EXTERNAL: files} if files else {})}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"config: expected a folder with {path.name}, found {path}: {error}",
            hint="give the folder of the model that was compiled, or its configuration",
        ) from error
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n")
