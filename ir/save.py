"""Writing models: atomically, and streaming the weights so that they are never in memory twice."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from .errors import ModelError
from .external import map_external_tensors, release
from .files import replacing, unwritable
from .skeleton import encode_varint

_LARGEST_FILE = 2**31 - 1
"""Bytes: the most that protobuf reads."""
_EXTERNAL_ABOVE = _LARGEST_FILE - 2**26
"""Bytes of weights above which they go to a file of their own; the rest is room for the graph."""
_STREAMED_FROM = 1024
"""Bytes from which a weight is written by itself; smaller ones are a part of the graph's message."""
_ALIGNMENT = 64
"""Bytes, of each weight in an external file: a cache line, and the widest vector load."""

# A protobuf field of bytes or of a message is its tag (field number << 3 | 2), its length and its content.
_GRAPH_TAG = bytes([7 << 3 | 2])  # ModelProto.graph
_INITIALIZER_TAG = bytes([5 << 3 | 2])  # GraphProto.initializer
_RAW_DATA_TAG = bytes([9 << 3 | 2])  # TensorProto.raw_data


def save(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    external_data: bool | None = None,
    data_suffix: str = ".data",
) -> None:
    """Write ``model`` to ``path`` as ONNX; a failure or an interruption leaves the folder as it was.

    The files are written under temporary names beside ``path`` and renamed when complete. Weights are
    computed, read and written one at a time. The files that the model was loaded from may be overwritten.

    Args:
        model: its content is not changed.
        path: where to; the folder must exist.
        external_data: write the weights to a second file, ``<path>.data``. None: only if they are too large
            for one file (2 GB).
        data_suffix: what the second file is called after ``path``.

    Raises:
        ModelError: the folder does not exist or cannot be written, or the model is too large for one file.
    """
    path = Path(path)
    _check_target(path)
    # A tensor that opens its file lazily would change when the file is overwritten: map it now.
    map_external_tensors(model, source=str(path))
    weights = [value for graph in model.graphs() for value in graph.initializers.values() if _is_large(value)]
    if external_data is None:
        external_data = sum(_tensor(value).nbytes for value in weights) > _EXTERNAL_ABOVE
    try:
        if external_data:
            _save_with_data_file(model, path, weights, path.with_name(path.name + data_suffix))
        else:
            with replacing(path) as (file,):
                _write_in_one_file(file, model, path)
    except OSError as error:
        raise unwritable(path, error) from error


def _check_target(path: Path) -> None:
    if path.is_dir():
        raise ModelError(f"{path} is a folder", hint="name the file, for example model.onnx in it")
    if not path.parent.is_dir():
        raise ModelError(
            f"{path} cannot be written: the folder {path.parent} does not exist", hint="create it"
        )


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None  # an initializer without data is refused by the verifier
    return value.const_value


def _is_large(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.dtype != ir.DataType.STRING and tensor.nbytes >= _STREAMED_FROM


def _save_with_data_file(model: ir.Model, path: Path, weights: Sequence[ir.Value], data_path: Path) -> None:
    with replacing(data_path, path) as (data_file, model_file):
        offsets: dict[int, int] = {}  # by identity: a tensor that several initializers share is written once
        for value in weights:
            tensor = _tensor(value)
            if id(tensor) not in offsets:
                data_file.write(bytes(-data_file.tell() % _ALIGNMENT))
                offsets[id(tensor)] = data_file.tell()
                _write_tensor(data_file, value)
        places = {value: (data_path.name, offsets[id(_tensor(value))]) for value in weights}
        with _stored_elsewhere(places):
            proto = ir.serde.serialize_model(model)
        proto.graph.name = proto.graph.name or "graph"
        model_file.write(proto.SerializeToString())


def _write_in_one_file(file: BinaryIO, model: ir.Model, path: Path) -> None:
    """Let protobuf write the messages around the weights, and put the weights' bytes into their places."""
    initializers = list(model.graph.initializers.values())
    streamed = {value for value in initializers if _is_large(value)}
    with _stored_elsewhere(dict.fromkeys(streamed, ("", 0))):
        proto = ir.serde.serialize_model(model)
    heads: list[bytes] = []
    for value, head in zip(initializers, proto.graph.initializer, strict=True):
        if value in streamed:
            head.ClearField("external_data")
            head.ClearField("data_location")
        heads.append(head.SerializeToString())
    del proto.graph.initializer[:]
    proto.graph.name = proto.graph.name or "graph"
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")

    fields: list[tuple[bytes, ir.Value | None]] = []
    size = len(graph)
    for value, content in zip(initializers, heads, strict=True):
        body, payload = content, 0
        if value in streamed:
            payload = _tensor(value).nbytes
            body += _RAW_DATA_TAG + encode_varint(payload)
        start = _INITIALIZER_TAG + encode_varint(len(body) + payload) + body
        fields.append((start, value if value in streamed else None))
        size += len(start) + payload
    if size > _LARGEST_FILE:
        raise ModelError(
            f"{path}: {size / 1e9:.1f} GB do not fit into one file", hint="pass external_data=True"
        )

    file.write(proto.SerializeToString() + _GRAPH_TAG + encode_varint(size) + graph)
    for start, streamed_value in fields:
        file.write(start)
        if streamed_value is not None:
            _write_tensor(file, streamed_value)


def _write_tensor(file: BinaryIO, value: ir.Value) -> None:
    tensor = _tensor(value)
    start = file.tell()
    # The tensors of onnx_ir write themselves without a copy; the protocol only promises bytes.
    write = getattr(tensor, "tofile", None) or (lambda to: to.write(tensor.tobytes()))
    write(file)
    written = file.tell() - start
    if written != tensor.nbytes:
        raise ModelError(
            f"weight '{value.name}' ({tensor.dtype.name}{list(tensor.shape)}) promised "
            f"{tensor.nbytes} bytes, but gave {written}",
            hint="the pass that made this weight has a defect",
        )
    release(tensor)


@contextlib.contextmanager
def _stored_elsewhere(places: Mapping[ir.Value, tuple[str, int]]) -> Iterator[None]:
    """Let the values' tensors be references to (file, offset) while the model is serialised."""
    tensors = {value: _tensor(value) for value in places}
    try:
        for value, (location, offset) in places.items():
            value.const_value = _reference(value, tensors[value], location, offset)
        yield
    finally:
        for value, tensor in tensors.items():
            value.const_value = tensor


def _reference(value: ir.Value, tensor: ir.TensorProtocol, location: str, offset: int) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        location,
        offset,
        tensor.nbytes,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=value.name or "",
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )
