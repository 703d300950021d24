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
from .grid import Grid, fit, in_blocks, nearest_codes
from .quantized_weight import Floats, QuantizedWeight

_NUMBERS_AT_ONCE = 1 << 17
"""Of float32: half a megabyte, of which there are a few copies."""
_PARTS_OF_A_PIECE = 8
"""So many at a time go to a worker: handing over a single one takes a good part of rounding it."""


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
    pieces = _parts(values.shape, _PARTS_OF_A_PIECE * _NUMBERS_AT_ONCE)
    rounded = _Rounded(values.shape, grid)
    slabs = (values[:, piece] for piece in pieces)
    for piece, slab in zip(pieces, workers.map(_round_slab, (str(weight.name), grid), slabs), strict=True):
        rounded.fill(piece, slab)
    release(tensor)
    return rounded.result(), float(np.sqrt(rounded.error / rounded.energy)) if rounded.energy else 0.0


def _parts(shape: tuple[int, ...], numbers: int) -> list[slice]:
    """Columns of an array of a shape that have about so many numbers together, at least one."""
    rows, columns = shape
    width = max(1, numbers // rows)
    return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]


_Slab = tuple[QuantizedWeight, float, float]
"""Some columns, the sum of their squared errors, and of their squares."""


def _round_slab(shared: tuple[str, Grid], values: npt.NDArray[Any]) -> _Slab:
    """Round some columns [K, n] of a weight, in the type that they are stored in."""
    name, grid = shared
    rounded = _Rounded(values.shape, grid)
    for part in _parts(values.shape, _NUMBERS_AT_ONCE):
        rounded.fill(part, _round_part(name, grid, values[:, part]))
    return rounded.result(), rounded.error, rounded.energy


def _round_part(name: str, grid: Grid, values: npt.NDArray[Any]) -> _Slab:
    # Torch widens 16 bits eight times as fast as numpy, in the order that memory has.
    stored = from_array(values.T) if values.flags.f_contiguous else from_array(values).T
    columns_first = stored.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    weight = columns_first.numpy().T
    energy = _energy(weight)
    # What is not finite makes the sum so, as large numbers do: all of them are looked at only then.
    if not np.isfinite(energy) and not np.isfinite(weight).all():
        raise PassError(
            f"quantize: weight {name!r} holds NaN or infinity",
            hint="export the model again, or leave the layer out with ignore=",
        )
    blocks = in_blocks(weight, grid)
    scale, zero = fit(weight, grid)
    codes = nearest_codes(blocks, scale, zero, grid)
    quantized = grid.stored(codes.reshape(weight.shape), scale, zero)
    return quantized, _energy(_minus(blocks, codes, scale, zero)), energy


def _minus(blocks: Floats, codes: Floats, scale: Floats, zero: Floats | None) -> Floats:
    """What ``codes`` stand for minus ``blocks``, in the place of the codes: new memory costs as much."""
    if zero is not None:
        codes -= zero[:, None]
    codes *= scale[:, None]
    codes -= blocks
    return codes


class _Rounded:
    """A weight [K, N] on its way to integers.

    Attributes:
        error, energy: sums of the squared errors, and of the squares, of the columns that are there.
    """

    def __init__(self, shape: tuple[int, ...], grid: Grid) -> None:
        rows, columns = shape
        self._grid = grid
        self.error = self.energy = 0.0
        dtype, blocks = np.int8 if grid.symmetric else np.uint8, rows // (grid.block_size or rows)
        self._integers = np.empty((rows, columns), dtype, order="F")
        self._scale = np.empty((blocks, columns), grid.scale_dtype)
        self._zero_point = None if grid.symmetric else np.empty((blocks, columns), dtype)

    def fill(self, columns: slice, slab: _Slab) -> None:
        """Put some columns in their place."""
        quantized, error, energy = slab
        part = (slice(None), columns)
        self._integers[part] = quantized.integers
        self._scale[part] = quantized.scale
        if self._zero_point is not None and quantized.zero_point is not None:
            self._zero_point[part] = quantized.zero_point
        self.error += error
        self.energy += energy

    def result(self) -> QuantizedWeight:
        """All columns."""
        zero_point = self._zero_point
        if not self._grid.block_size:
            return QuantizedWeight(
                self._integers, self._scale[0], None if zero_point is None else zero_point[0], self._grid.bits
            )
        return QuantizedWeight(self._integers, self._scale, zero_point, self._grid.bits)


def _energy(values: Floats) -> float:
    flat = values.ravel(order="K")
    return float(np.dot(flat, flat))
