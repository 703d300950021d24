"""Rounding a weight to nearest a few columns at a time.

Neither the weight in float32 nor its error is in memory as a whole, and what is computed of a few columns
stays in the cache of a core.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from ...codegen.torch_fx.tensors import from_array
from ...ir import release
from ...ir.errors import PassError
from .grid import Format, Grid, fit, in_blocks, nearest_codes, round_to_grid
from .quantized_weight import Floats, QuantizedWeight

_NUMBERS_AT_ONCE = 1 << 19
"""Of float32: two megabytes, of which there are a few copies, shared out among the cores."""


def round_weight(weight: ir.Value, grid: Grid, *, transposed: bool = False) -> tuple[QuantizedWeight, float]:
    """A weight [K, N] rounded to nearest, its integers by columns, and ‖W − Ŵ‖ / ‖W‖.

    On torch's threads: pieces of this size, given to threads of Python, wait longer for the interpreter's
    lock than they compute.

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
    rounded = _Rounded(values.shape, grid)
    for part in _parts(values):
        rounded.fill(part, _round_part(str(weight.name), grid, values[:, part]))
    release(tensor)
    return rounded.result(), _relative(rounded.error, rounded.energy)


def rounding_error(weight: npt.NDArray[Any], grid: Format, *, name: str = "") -> float:
    """‖W − Ŵ‖ / ‖W‖ of a weight [K, N] rounded to nearest.

    Args:
        weight: in any float type.
        grid: of each column or block of one.
        name: of the weight, for errors.

    Raises:
        PassError: the weight holds NaN or an infinity.
    """
    error = energy = 0.0
    for part in _parts(weight):
        if isinstance(grid, Grid):
            _, part_error, part_energy = _round_part(name, grid, weight[:, part])
        else:
            values = weight[:, part].astype(np.float32)
            difference = round_to_grid(values, *fit(values, grid), grid).dequantized() - values
            part_error, part_energy = (float(np.square(each).sum()) for each in (difference, values))
        error, energy = error + part_error, energy + part_energy
    return _relative(error, energy)


def _parts(values: npt.NDArray[Any]) -> Iterator[slice]:
    """A few columns at a time."""
    rows, columns = values.shape
    width = max(1, _NUMBERS_AT_ONCE // max(1, rows))
    for start in range(0, columns, width):
        yield slice(start, min(start + width, columns))


def _relative(error: float, energy: float) -> float:
    return float(np.sqrt(error / energy)) if energy else 0.0


_Part = tuple[QuantizedWeight, float, float]
"""Some columns, the sum of their squared errors, and of their squares."""


def _round_part(name: str, grid: Grid, values: npt.NDArray[Any]) -> _Part:
    """Round some columns [K, n] of a weight, in the type that they are stored in."""
    # Torch widens 16 bits eight times as fast as numpy, in the order that memory has.
    stored = from_array(values.T) if values.flags.f_contiguous else from_array(values).T
    columns_first = stored.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    weight = columns_first.numpy().T
    energy = _energy(columns_first)
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
    return quantized, _energy(_error(blocks, codes, scale, zero).permute(2, 0, 1)), energy


def _error(blocks: Floats, codes: Floats, scale: Floats, zero: Floats | None) -> torch.Tensor:
    """What ``codes`` stand for minus ``blocks``, in the place of the codes: new memory costs as much."""
    error = torch.from_numpy(codes)
    if zero is not None:
        error -= torch.from_numpy(zero)[:, None]
    error *= torch.from_numpy(scale)[:, None]
    error -= torch.from_numpy(blocks)
    return error


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

    def fill(self, columns: slice, part: _Part) -> None:
        """Put some columns in their place."""
        quantized, error, energy = part
        where = (slice(None), columns)
        self._integers[where] = quantized.integers
        self._scale[where] = quantized.scale
        if self._zero_point is not None and quantized.zero_point is not None:
            self._zero_point[where] = quantized.zero_point
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


def _energy(values: torch.Tensor) -> float:
    """The sum of squares of an array that is contiguous."""
    flat = values.reshape(-1)
    return float(torch.dot(flat, flat))
