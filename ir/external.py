"""Weights in files beside the model: mapped into memory, never read before they are needed.

A file is mapped once, when the model is loaded, and every tensor in it is a view of that map. The map keeps
the file's content alive: saving another model over the same file does not change a loaded one.
"""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path

import numpy as np
import onnx_ir as ir

from .derived import DerivedTensor
from .errors import ModelError
from .walk import replace_tensors


def map_external_tensors(model: ir.Model, *, source: str, folder: Path | None = None) -> None:
    """Replace every external tensor of ``model`` by a view of its memory-mapped file.

    Args:
        model: changed in place.
        source: what to call the model in errors.
        folder: the folder that the tensors' locations are relative to. None: the tensors know theirs.

    Raises:
        ModelError: a file is missing, too short, or outside of the model's folder.
    """
    mapper = _Mapper(folder, source)
    replace_tensors(model, lambda t: mapper.tensor(t) if isinstance(t, ir.ExternalTensor) else t)


def array_tensor(
    data: np.ndarray[tuple[int], np.dtype[np.uint8]], like: ir.TensorProtocol
) -> ir.TensorProtocol:
    """A tensor with the name, dtype, shape and metadata of ``like`` over ``data`` (ONNX's bytes)."""
    if like.dtype.bitwidth < 8:  # stored packed; read and unpacked whenever it is used
        result: ir.TensorProtocol = ir.PackedTensor(
            data, like.dtype, shape=like.shape.numpy(), name=like.name
        )
    else:
        array = data.view(like.dtype.numpy()).reshape(like.shape.numpy())
        result = ir.Tensor(array, dtype=like.dtype, name=like.name)
    result.doc_string = like.doc_string
    result.metadata_props.update(like.metadata_props)
    return result


def declared_bytes(tensor: ir.TensorProtocol, *, source: str) -> int:
    """What a tensor takes by its shape and dtype, which a damaged file may say as anything.

    Raises:
        ModelError: a dimension is negative.
    """
    dims = tensor.shape.numpy()
    if any(dim < 0 for dim in dims):
        raise ModelError(
            f"{source}: weight '{tensor.name}' ({tensor.dtype.name}{list(dims)}) has a negative dimension",
            hint="the file is damaged: export the model again",
        )
    return -(-math.prod(dims) * tensor.dtype.bitwidth // 8)


def release(tensor: ir.TensorProtocol | None) -> None:
    """Drop a mapped tensor's pages from memory; it stays valid and is read again when it is used.

    A pass that streams over many weights calls this after each of them, so that its peak memory is one weight
    and not all of them. Does nothing to tensors that do not come from a file.
    """
    if isinstance(tensor, DerivedTensor):
        for source in tensor.sources:
            release(source)
        return
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
        return
    array = getattr(tensor, "raw", None)
    if not isinstance(array, np.ndarray) or not array.nbytes:
        return
    mapping = _mapping_of(array)
    if mapping is None or not hasattr(mapping, "madvise"):
        return
    start = array.ctypes.data - np.frombuffer(mapping, np.uint8, count=1).ctypes.data
    page = start - start % mmap.PAGESIZE
    mapping.madvise(mmap.MADV_DONTNEED, page, start + array.nbytes - page)


def _mapping_of(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> mmap.mmap | None:
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    return base if isinstance(base, mmap.mmap) else None


class _Mapper:
    """Maps each data file once."""

    def __init__(self, folder: Path | None, source: str) -> None:
        self._folder = folder
        self._source = source
        self._maps: dict[str, mmap.mmap] = {}

    def tensor(self, tensor: ir.ExternalTensor) -> ir.TensorProtocol:
        """A tensor of the same name, dtype and content as ``tensor``, backed by the map of its file."""
        try:
            path = self._resolve(tensor)
            self._check_extent(tensor, path)
            if not tensor.nbytes:  # an empty file cannot be mapped
                return array_tensor(np.empty(0, np.uint8), tensor)
            data = np.frombuffer(self._map(path), np.uint8, tensor.nbytes, tensor.offset or 0)
        except OSError as error:
            raise ModelError(
                f"{self._source}: weight '{tensor.name}' is stored in {tensor.location}, which cannot be "
                f"read: {error.strerror or error}",
                hint="keep the .data file beside the .onnx file; both make the model",
            ) from error
        return array_tensor(data, tensor)

    def _resolve(self, tensor: ir.ExternalTensor) -> Path:
        folder = Path(tensor.base_dir) if self._folder is None else self._folder
        path = folder / tensor.location
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise ModelError(
                f"{self._source}: weight '{tensor.name}' is stored in {path}, which {what}",
                hint="keep the .data file beside the .onnx file; both make the model",
            )
        allowed = [folder.resolve()]
        if Path(self._source).is_symlink():
            # In a download cache, the model and its data are both links into one folder of blobs.
            allowed.append(Path(self._source).resolve().parent)
        inside = Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))
        if not inside or not any(path.resolve().is_relative_to(place) for place in allowed):
            raise ModelError(
                f"{self._source}: weight '{tensor.name}' lies outside of its folder, in {path.resolve()}",
                hint="copy the data file beside the model",
            )
        return path.resolve()

    def _check_extent(self, tensor: ir.ExternalTensor, path: Path) -> None:
        needed = declared_bytes(tensor, source=self._source)
        offset, length = tensor.offset or 0, tensor.length or needed
        if length != needed:
            raise ModelError(
                f"{self._source}: weight '{tensor.name}' ({tensor.dtype.name}{list(tensor.shape)}) needs "
                f"{needed} bytes, but its external data is {length} bytes long",
                hint="the file is damaged: export the model again",
            )
        size = path.stat().st_size
        if offset < 0 or offset + length > size:
            raise ModelError(
                f"{self._source}: weight '{tensor.name}' ends at byte {offset + length} of {path}, "
                f"which is {size} bytes long",
                hint="the data file is truncated or belongs to another model: copy it again",
            )

    def _map(self, path: Path) -> mmap.mmap:
        key = str(path)
        if key not in self._maps:
            with path.open("rb") as file:
                self._maps[key] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[key]
