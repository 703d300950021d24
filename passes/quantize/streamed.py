"""Rounding a weight to nearest a few columns at a time.

Neither the weight in float32 nor its error is in memory as a whole, and what is computed of a few columns
stays in the cache of a core.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from ...codegen.torch_fx.tensors import from_array
from ...ir import release
from ...ir.errors import PassError
from ...runtime.workers import Workers
from .algorithms.rtn import round_to_nearest
from .grid import Grid
from .quantized_weight import QuantizedWeight

_NUMBERS_AT_ONCE = 1 << 17
"""Of float32: half a megabyte, of which there are a few copies."""


def round_weight(
    weight: ir.Value, grid: Grid, workers: Workers, *, transposed: bool = False
) -> tuple[QuantizedWeight, float]:
    """A weight [K, N] rounded to nearest, its integers by columns, and ‖W − Ŵ‖ / ‖W‖.

    Args:
        weight: the constant.
        grid: of each column or block of one.
        workers: round a few columns each.
        transposed: it is stored [N, K].

    Raises:
        PassError: the weight is not constant, or holds NaN or an infinity, which no grid covers.
    """
    tensor = weight.const_value
    if tensor is None:
        raise PassError(f"quantize: weight {weight.name!r} is not constant")
    values = tensor.numpy().T if transposed else tensor.numpy()
    rows, columns = values.shape
    width = max(1, _NUMBERS_AT_ONCE // rows)
    parts = [slice(start, min(start + width, columns)) for start in range(0, columns, width)]
    rounded = _Rounded((rows, columns), grid)
    slabs = (values[:, part] for part in parts)
    energies = [
        rounded.fill(part, found)
        for part, found in zip(parts, workers.map(_round_slab, (str(weight.name), grid), slabs), strict=True)
    ]
    error, energy = np.sum(energies, axis=0)
    release(tensor)
    return rounded.result(), float(np.sqrt(error / energy)) if energy else 0.0


_Slab = tuple[QuantizedWeight, float, float]
"""Some columns, the sum of their squared errors, and of their squares."""


def _round_slab(shared: tuple[str, Grid], values: npt.NDArray[Any]) -> _Slab:
    """Round some columns [K, n] of a weight, in the type that they are stored in."""
    name, grid = shared
    # Torch widens 16 bits eight times as fast as numpy, in the order that memory has.
    stored = from_array(values.T) if values.flags.f_contiguous else from_array(values).T
    columns_first = stored.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    weight = columns_first.numpy().T
    if not np.isfinite(weight).all():
        raise PassError(
            f"quantize: weight {name!r} holds NaN or infinity",
            hint="export the model again, or leave the layer out with ignore=",
        )
    quantized = round_to_nearest(weight, grid)
    return quantized, _energy(weight - quantized.dequantized()), _energy(weight)


class _Rounded:
    """A weight [K, N] on its way to integers."""

    def __init__(self, shape: tuple[int, int], grid: Grid) -> None:
        rows, columns = shape
        self._grid = grid
        dtype, blocks = np.int8 if grid.symmetric else np.uint8, rows // (grid.block_size or rows)
        self._integers = np.empty((rows, columns), dtype, order="F")
        self._scale = np.empty((blocks, columns), grid.scale_dtype)
        self._zero_point = None if grid.symmetric else np.empty((blocks, columns), dtype)

    def fill(self, columns: slice, slab: _Slab) -> tuple[float, float]:
        """Put some columns in their place; gives the sums of their squared errors and squares."""
        quantized, error, energy = slab
        part = (slice(None), columns)
        self._integers[part] = quantized.integers
        self._scale[part] = quantized.scale
        if self._zero_point is not None and quantized.zero_point is not None:
            self._zero_point[part] = quantized.zero_point
        return error, energy

    def result(self) -> QuantizedWeight:
        """All columns."""
        zero_point = self._zero_point
        if not self._grid.block_size:
            return QuantizedWeight(
                self._integers, self._scale[0], None if zero_point is None else zero_point[0], self._grid.bits
            )
        return QuantizedWeight(self._integers, self._scale, zero_point, self._grid.bits)


def _energy(values: npt.NDArray[np.float32]) -> float:
    flat = values.ravel(order="K")
    return float(np.dot(flat, flat))
