"""Rounding a weight to nearest a few columns at a time, on all cores.

Neither the weight in float32 nor its error is in memory as a whole, and what is computed of a few columns
stays in the cache of a core.
"""

from __future__ import annotations

import concurrent.futures
import os
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from ...codegen.torch_fx.tensors import from_array
from ...ir import release
from ...ir.errors import PassError
from .algorithms.rtn import round_to_nearest
from .grid import Grid
from .quantized_weight import QuantizedWeight

_NUMBERS_AT_ONCE = 1 << 17
"""Of float32: half a megabyte, of which there are a few copies."""


def round_weight(weight: ir.Value, grid: Grid, *, transposed: bool = False) -> tuple[QuantizedWeight, float]:
    """A weight [K, N] rounded to nearest, its integers by columns, and ‖W − Ŵ‖ / ‖W‖.

    Args:
        weight: the constant.
        grid: of each column or block of one.
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
    rounded = _Rounded(str(weight.name), values, grid)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        energies = list(pool.map(rounded.fill, ((at, at + width) for at in range(0, columns, width))))
    error, energy = np.sum(energies, axis=0)
    release(tensor)
    return rounded.result(), float(np.sqrt(error / energy)) if energy else 0.0


class _Rounded:
    """A weight [K, N] on its way to integers."""

    def __init__(self, name: str, values: npt.NDArray[Any], grid: Grid) -> None:
        rows, columns = values.shape
        self._name, self._grid = name, grid
        # [N, K], in the memory that the values have: torch widens 16 bits eight times as fast as numpy.
        by_columns = values.flags.f_contiguous
        self._weight = from_array(values.T) if by_columns else from_array(values).T
        dtype, blocks = np.int8 if grid.symmetric else np.uint8, rows // (grid.block_size or rows)
        self._integers = np.empty((rows, columns), dtype, order="F")
        self._scale = np.empty((blocks, columns), grid.scale_dtype)
        self._zero_point = None if grid.symmetric else np.empty((blocks, columns), dtype)

    def fill(self, columns: tuple[int, int]) -> tuple[float, float]:
        """Round some columns; gives the sums of their squared errors and squares."""
        part = (slice(None), slice(*columns))
        columns_first = self._weight[slice(*columns)].to(
            torch.float32, copy=True, memory_format=torch.contiguous_format
        )
        weight = columns_first.numpy().T
        if not np.isfinite(weight).all():
            raise PassError(
                f"quantize: weight {self._name!r} holds NaN or infinity",
                hint="export the model again, or leave the layer out with ignore=",
            )
        quantized = round_to_nearest(weight, self._grid)
        self._integers[part] = quantized.integers
        self._scale[part] = quantized.scale
        if self._zero_point is not None:
            self._zero_point[part] = quantized.zero_point
        difference = weight - quantized.dequantized()
        return _energy(difference), _energy(weight)

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
