"""Rounding a weight to nearest a few columns at a time.

Neither the weight in float32 nor its error is in memory as a whole, and what is computed of a few columns
stays in the cache of a core.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from ...codegen.torch_fx.tensors import from_array
from ...ir import release
from ...ir.errors import PassError
from ...ir.rearranged import JoinedTensor
from .grid import Format, Grid, fit, limit_pairs, narrowed, round_to_grid
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
    rows, columns = tensor.shape.numpy()[::-1] if transposed else tensor.shape.numpy()
    rounding, rounded = _Rounding((rows, columns), grid, str(weight.name)), _Rounded((rows, columns), grid)
    start = 0
    for source in _side_by_side(tensor, 0 if transposed else 1):
        values = source.numpy().T if transposed else source.numpy()
        for part in _parts(values):
            piece = rounding.codes(values[:, part])
            rounded.fill(slice(start + part.start, start + part.stop), *piece)
            rounding.count(*piece)
        start += values.shape[1]
        release(source)
    return rounded.result(), rounding.error


def rounding_error(weight: npt.NDArray[Any], grid: Format, *, name: str = "") -> float:
    """‖W − Ŵ‖ / ‖W‖ of a weight [K, N] rounded to nearest.

    Args:
        weight: in any float type.
        grid: of each column or block of one.
        name: of the weight, for errors.

    Raises:
        PassError: the weight holds NaN or an infinity.
    """
    if isinstance(grid, Grid):
        rounding = _Rounding(weight.shape, grid, name)
        for part in _parts(weight):
            rounding.count(*rounding.codes(weight[:, part]))
        return rounding.error
    error = energy = 0.0
    for part in _parts(weight):
        values = weight[:, part].astype(np.float32)
        difference = round_to_grid(values, *fit(values, grid), grid).dequantized() - values
        error, energy = error + float(np.square(difference).sum()), energy + float(np.square(values).sum())
    return _relative(error, energy)


def _side_by_side(tensor: ir.TensorProtocol, axis: int) -> Sequence[ir.TensorProtocol]:
    """What a tensor joins along ``axis``: to read it as a whole copies it."""
    return tensor.parts if isinstance(tensor, JoinedTensor) and tensor.axis == axis else [tensor]


def _parts(values: npt.NDArray[Any]) -> Iterator[slice]:
    """A few columns at a time."""
    columns, width = values.shape[1], _width(values.shape)
    for start in range(0, columns, width):
        yield slice(start, min(start + width, columns))


def _width(shape: tuple[int, ...]) -> int:
    rows, columns = shape
    return min(columns, max(1, _NUMBERS_AT_ONCE // max(1, rows)))


def _relative(error: float, energy: float) -> float:
    return float(np.sqrt(error / energy)) if energy else 0.0


_Piece = tuple[torch.Tensor, Floats, Floats | None]
"""Codes of some columns [n, K], and their scales and zero points [blocks, n]."""


class _Rounding:
    """Rounds some columns of a weight [K, N] after the others, all of them in the same memory.

    New memory for each of them would take as long as the arithmetic.

    Args:
        shape: [K, N].
        grid: what is rounded to.
        name: of the weight, for errors.
    """

    def __init__(self, shape: tuple[int, ...], grid: Grid, name: str) -> None:
        self._grid, self._name = grid, name
        self._rows, width = shape[0], _width(shape)
        self._weight, self._codes = torch.empty(width, self._rows), torch.empty(width, self._rows)
        self._squared_error = self._energy = 0.0

    @property
    def error(self) -> float:
        """‖W − Ŵ‖ / ‖W‖ of what was counted."""
        return _relative(self._squared_error, self._energy)

    def codes(self, values: npt.NDArray[Any]) -> _Piece:
        """Round columns [K, n], given in the type that they are stored in; good until the next are.

        Raises:
            PassError: one of them is not finite.
        """
        # Torch widens 16 bits eight times as fast as numpy, in the order that memory has.
        stored = from_array(values.T) if values.flags.f_contiguous else from_array(values).T
        weight = self._weight[: len(stored)].copy_(stored)
        energy = _squares(weight)
        # What is not finite makes the sum so, as large numbers do: all of them are looked at only then.
        if not np.isfinite(energy) and not weight.isfinite().all():
            raise PassError(
                f"quantize: weight {self._name!r} holds NaN or infinity",
                hint="export the model again, or leave the layer out with ignore=",
            )
        self._energy += energy
        scale, zero = fit(weight.numpy().T, self._grid)
        codes = self._codes[: len(stored)]
        blocks = self._blocks(codes)
        self._grid.codes_into(blocks, self._blocks(weight), *_along(scale, zero))
        if self._grid.limit_pairs:
            limit_pairs(blocks.numpy())
        return codes, scale, zero

    def count(self, codes: torch.Tensor, scale: Floats, zero: Floats | None) -> None:
        """Count what the last columns lost; that takes the place of the codes."""
        blocks, (step, shift) = self._blocks(codes), _along(scale, zero)
        if shift is not None:
            blocks -= shift
        # In two steps, as kernels do: one that rounds once says that exact weights are not.
        blocks *= step
        codes -= self._weight[: len(codes)]
        self._squared_error += _squares(codes)

    def _blocks(self, columns: torch.Tensor) -> torch.Tensor:
        """Columns [n, K] as blocks [K / B, B, n]."""
        return columns.view(len(columns), -1, self._grid.block_size or self._rows).permute(1, 2, 0)


class _Rounded:
    """A weight [K, N] on its way to integers."""

    def __init__(self, shape: tuple[int, ...], grid: Grid) -> None:
        rows, columns = shape
        self._grid = grid
        dtype, blocks = np.int8 if grid.symmetric else np.uint8, rows // (grid.block_size or rows)
        self._integers = np.empty((rows, columns), dtype, order="F")
        self._scale = np.empty((blocks, columns), grid.scale_dtype)
        self._zero_point = None if grid.symmetric else np.empty((blocks, columns), dtype)

    def fill(self, columns: slice, codes: torch.Tensor, scale: Floats, zero: Floats | None) -> None:
        """Put some columns in their place."""
        integers = self._integers.T[columns]
        # Torch makes signed integers of floats in a quarter of the time of unsigned ones.
        fits = self._grid.highest <= np.iinfo(np.int8).max
        torch.from_numpy(integers.view(np.int8) if fits else integers).copy_(codes)
        self._scale[:, columns] = narrowed(scale, self._grid.scale_dtype)
        if self._zero_point is not None and zero is not None:
            self._zero_point[:, columns] = zero

    def result(self) -> QuantizedWeight:
        """All columns."""
        zero_point = self._zero_point
        if not self._grid.block_size:
            return QuantizedWeight(
                self._integers, self._scale[0], None if zero_point is None else zero_point[0], self._grid.bits
            )
        return QuantizedWeight(self._integers, self._scale, zero_point, self._grid.bits)


def _along(scale: Floats, zero: Floats | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zero points [blocks, n] as they are broadcast against blocks [blocks, B, n]."""
    return torch.from_numpy(scale)[:, None], None if zero is None else torch.from_numpy(zero)[:, None]


def _squares(values: torch.Tensor) -> float:
    """The sum of squares of an array that is contiguous."""
    flat = values.reshape(-1)
    return float(torch.dot(flat, flat))
