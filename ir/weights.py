"""Checks of the weights' data that reading the graph alone does not make."""

from __future__ import annotations

import concurrent.futures
import os

import numpy as np
import onnx_ir as ir

from .content_hash import ContentHash
from .errors import ModelError
from .external import array_tensor, declared_bytes, release
from .walk import all_graphs, replace_tensors

_DAMAGED = "the file is damaged: export the model again"
_CHUNK = 1 << 20
"""Elements tested at a time, few enough for a core's cache. Threads that hand over the interpreter's lock
more often wait for it longer than they test."""
_EXPONENTS = {
    "float16": (np.uint16, 0x7C00),
    "bfloat16": (np.uint16, 0x7F80),
    "float32": (np.uint32, 0x7F800000),
    "float64": (np.uint64, 0x7FF0000000000000),
}
"""The bits that are all ones in NaN and infinities, and in nothing else."""

_WEIGHT_READERS = frozenset(
    {"MatMul", "Gemm", "Conv", "ConvTranspose", "Gather", "Einsum", "LSTM", "GRU", "RNN"}
    | {"LayerNormalization", "RMSNormalization", "BatchNormalization", "GroupNormalization"}
)
"""Ops whose constant operands are weights. Elsewhere an infinity is ordinary: masks and Clip hold them."""


def detach_from_protobuf(model: ir.Model, *, source: str) -> None:
    """Replace every tensor that reads a protobuf message by an array of its own, in place.

    A tensor of a message copies its bytes whenever it is read, keeps the whole message alive, and writes its
    new name into the caller's message when it is renamed.

    Raises:
        ModelError: names the first weight whose data does not fit its shape and dtype.
    """
    replace_tensors(model, lambda tensor: _own_tensor(tensor, source))


def _own_tensor(tensor: ir.TensorProtocol, source: str) -> ir.TensorProtocol:
    if isinstance(tensor, ir.StringTensor):
        _check_size(tensor, len(tensor.string_data()), tensor.size, "strings", source)
        return tensor
    if not isinstance(tensor, ir.TensorProtoTensor):
        return tensor
    try:
        data = tensor.tobytes()
    except (ValueError, AssertionError) as error:
        reason = str(error) or f"its data are of another type than {tensor.dtype.name}"
        raise ModelError(f"{source}: weight '{tensor.name}': {reason}", hint=_DAMAGED) from error
    _check_size(tensor, len(data), declared_bytes(tensor, source=source), "bytes", source)
    return array_tensor(np.frombuffer(data, np.uint8), tensor)


def _check_size(tensor: ir.TensorProtocol, found: int, expected: int, unit: str, source: str) -> None:
    if found != expected:
        raise ModelError(
            f"{source}: weight '{tensor.name}' ({tensor.dtype.name}{list(tensor.shape)}) needs "
            f"{expected} {unit}, found {found}",
            hint=_DAMAGED,
        )


def check_finite(model: ir.Model, *, source: str, hashes: ContentHash | None = None) -> None:
    """Check that no weight holds NaN, and that no weight of a linear, norm or embedding holds an infinity.

    Reads each weight once, some at a time, and releases it again. Scalars are left out: they are constants of
    the program.

    Args:
        model: its weights are read.
        source: what to call the model in errors.
        hashes: gets the weights of the same reading, if it is given: a large model is read from the disk.

    Raises:
        ModelError: names the first such weight, what it holds and where.
    """
    values = [value for graph in all_graphs(model) for value in graph.initializers.values()]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda value: _bad_number(value, hashes), values)
        for value, bad in zip(values, found, strict=True):
            if bad is not None:
                pool.shutdown(cancel_futures=True)
                where, number = bad
                raise ModelError(
                    f"{source}: weight '{value.name}' holds {number} at index {where}",
                    hint="the checkpoint is broken, or overflowed in a conversion to a smaller float type",
                )


def _bad_number(value: ir.Value, hashes: ContentHash | None) -> tuple[list[int], float] | None:
    """Where a weight holds what it must not, and what."""
    tensor = value.const_value
    if tensor is None:
        return None
    is_hashed = hashes is not None and hashes.covers(value)
    if tensor.size <= 1 or not tensor.dtype.is_floating_point():
        if hashes is not None and is_hashed:
            hashes.add(value)
        return None
    allow_infinity = not _is_weight(value)
    flat = np.ascontiguousarray(tensor.numpy()).reshape(-1)
    try:
        for start in range(0, flat.size, _CHUNK):
            chunk = flat[start : start + _CHUNK]
            if hashes is not None and is_hashed:
                hashes.update(value, chunk)
            bad = _first_not_finite(chunk, allow_infinity=allow_infinity)
            if bad is not None:
                at, number = bad
                return [int(i) for i in np.unravel_index(start + at, tensor.shape.numpy())], number
    finally:
        release(tensor)
    return None


def _is_weight(value: ir.Value) -> bool:
    return any(use.node.op_type in _WEIGHT_READERS for use in value.uses())


def _first_not_finite(
    chunk: np.ndarray[tuple[int, ...], np.dtype[np.generic]], *, allow_infinity: bool
) -> tuple[int, float] | None:
    if not _may_hold_bad(chunk):
        return None
    bad = np.isnan(chunk) if allow_infinity else ~np.isfinite(chunk)
    index = int(np.argmax(bad))
    return (index, float(chunk[index])) if bad[index] else None


def _may_hold_bad(chunk: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> bool:
    """Whether there is a NaN or an infinity; True where the type's bits are not known here."""
    known = _EXPONENTS.get(chunk.dtype.name)
    if known is None:
        return True
    unsigned, exponent = known
    return bool((chunk.view(unsigned) & unsigned(exponent)).max() == exponent)
