"""Tensors that are computed from others whenever they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir


class DerivedTensor(ir.LazyTensor):
    """A tensor of the values that a function gives. Nothing of it stays in memory.

    Args:
        read: gives the values; called whenever they are asked for.
        sources: what it reads, and what `planish.ir.release` of this tensor releases.
        dtype: of the elements.
        shape: of the values.
        name: of the tensor.
    """

    def __init__(
        self,
        read: Callable[[], ir.TensorProtocol],
        sources: Sequence[ir.TensorProtocol],
        *,
        dtype: ir.DataType,
        shape: Sequence[int],
        name: str | None = None,
    ) -> None:
        super().__init__(read, dtype=dtype, shape=ir.Shape(shape), name=name)
        self.sources = tuple(sources)
