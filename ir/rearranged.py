"""Weights that are others transposed or joined: rewritten without being read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .derived import DerivedTensor
from .external import release


def alias(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """A second tensor with the same data, for a second initializer; nothing is copied."""
    return DerivedTensor(lambda: tensor, [tensor], dtype=tensor.dtype, shape=_shape(tensor), name=name)


class TransposedTensor(DerivedTensor):
    """A tensor that is transposed when it is read: a view of data in memory or in a mapped file.

    Attributes:
        source: what is transposed.
        permutation: its axes, in their new order.
    """

    def __init__(
        self, source: ir.TensorProtocol, permutation: Sequence[int], name: str | None = None
    ) -> None:
        self.source, self.permutation = source, tuple(permutation)
        shape = [_shape(source)[axis] for axis in permutation]
        super().__init__(self._read, [source], dtype=source.dtype, shape=shape, name=name)

    def _read(self) -> ir.TensorProtocol:
        return ir.Tensor(self.source.numpy().transpose(self.permutation), dtype=self.dtype, name=self.name)


class JoinedTensor(DerivedTensor):
    """Tensors one after the other, copied when it is read.

    Attributes:
        parts: the tensors.
        axis: along which they follow each other.
    """

    def __init__(self, parts: Sequence[ir.TensorProtocol], axis: int) -> None:
        self.parts, self.axis = tuple(parts), axis
        shape = list(_shape(parts[0]))
        shape[axis] = sum(_shape(part)[axis] for part in parts)
        super().__init__(self._read, parts, dtype=parts[0].dtype, shape=shape)

    def _read(self) -> ir.TensorProtocol:
        return ir.Tensor(_joined(self.parts, _shape(self), self.axis), dtype=self.dtype)


def _joined(parts: Sequence[ir.TensorProtocol], shape: Sequence[int], axis: int) -> npt.NDArray[Any]:
    """In the order of memory that the parts have, so that transposed ones are copied and not turned."""
    joined: npt.NDArray[Any] | None = None
    start = 0
    for part in parts:
        values = part.numpy()
        if joined is None:
            joined = np.empty_like(values, shape=shape)
        place = [slice(None)] * len(shape)
        place[axis] = slice(start, start + values.shape[axis])
        joined[tuple(place)] = values
        start += values.shape[axis]
        release(part)
    assert joined is not None
    return joined


def _shape(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    return tuple(int(size) for size in tensor.shape.numpy())
