"""Reading a large ONNX file without its weights: they stay in the file, as if it were its own external data.

Protobuf would read the whole file and copy every weight. Here the file's fields are walked over in a memory
map, and only those that are not weights are given to protobuf.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

_MODEL_GRAPH = 7
_GRAPH_INITIALIZER = 5
_TENSOR_RAW_DATA = 9
_LEFT_FROM = 1024
"""Bytes of raw data from which a weight is left in the file."""
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
"""The kinds of fields, in the low three bits of a field's tag."""


class _Field(NamedTuple):
    """Where a field of a message is: its tag, its content, and where the next field starts."""

    number: int
    kind: int
    tag: int
    start: int
    end: int


def read_skeleton(path: Path) -> onnx.ModelProto:
    """The model in ``path``, its large weights replaced by references to their places in the same file.

    Raises:
        DecodeError: the file is no protobuf message, or it ends too early.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        places: list[tuple[int, int] | None] = []
        model = onnx.ModelProto()
        model.ParseFromString(_model_without_weights(data, places))
    for tensor, place in zip(model.graph.initializer, places, strict=True):
        if place is not None:
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", path.name), ("offset", place[0]), ("length", place[1])):
                tensor.external_data.add(key=key, value=str(value))
    return model


def _model_without_weights(data: mmap.mmap, places: list[tuple[int, int] | None]) -> bytes:
    """The model's message; ``places`` gets (offset, length) of each initializer, or None if it is whole."""
    result = bytearray()
    for field in _fields(data, 0, len(data)):
        if field.number == _MODEL_GRAPH and field.kind == _LENGTH:
            result += _message(field.number, _graph_without_weights(data, field, places))
        else:
            result += data[field.tag : field.end]
    return bytes(result)


def _graph_without_weights(data: mmap.mmap, graph: _Field, places: list[tuple[int, int] | None]) -> bytearray:
    result = bytearray()
    for field in _fields(data, graph.start, graph.end):
        if field.number != _GRAPH_INITIALIZER or field.kind != _LENGTH:
            result += data[field.tag : field.end]
            continue
        place: tuple[int, int] | None = None
        tensor = bytearray()
        for part in _fields(data, field.start, field.end):
            if part.number == _TENSOR_RAW_DATA and part.end - part.start >= _LEFT_FROM:
                place = (part.start, part.end - part.start)
            else:
                tensor += data[part.tag : part.end]
        places.append(place)
        result += _message(field.number, tensor)
    return result


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[_Field]:
    """The fields of the message between two positions."""
    position = start
    while position < end:
        tag = position
        key, position = _read_varint(data, position, end)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            _, stop = _read_varint(data, position, end)
        elif kind == _LENGTH:
            length, position = _read_varint(data, position, end)
            stop = position + length
        elif kind in (_FIXED32, _FIXED64):
            stop = position + (4 if kind == _FIXED32 else 8)
        else:
            raise DecodeError(f"unknown kind of field at byte {tag}")
        if stop > end:
            raise DecodeError(f"the field at byte {tag} ends after the message around it")
        yield _Field(number, kind, tag, position, stop)
        position = stop


def _read_varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    """A number in seven bits per byte, lowest first, and the position after it."""
    result = shift = 0
    while position < end and shift < 64:
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
        shift += 7
    raise DecodeError(f"a number does not end before byte {position}")


def _message(number: int, content: bytearray) -> bytes:
    return encode_varint(number << 3 | _LENGTH) + encode_varint(len(content)) + content


def encode_varint(number: int) -> bytes:
    """Protobuf's encoding of a length: seven bits per byte, lowest first; the top bit says more follow."""
    result = bytearray()
    while number > 0x7F:
        result.append(number & 0x7F | 0x80)
        number >>= 7
    result.append(number)
    return bytes(result)
