"""A quantised weight: what is stored, what it stands for, and how many bits it takes.

    ŵ = (q − zero_point) · scale        integers
    ŵ = codebook[q] · scale             indices into a code book
    ŵ = q · scale                       float8

scale and zero point may be small integers themselves, with a grid of their own (bilevel), and some weights
may be kept as they were (outliers).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

_POSITION_BITS = 16
"""Of an outlier: the gap to the one before it."""


@dataclasses.dataclass(frozen=True)
class SecondLevel:
    """The grids of bilevel scales and zero points, [K / B, ⌈N / block_size⌉]: value = (q − zero) · scale.

    Attributes:
        scale_scale: step of the scales.
        scale_zero: what is subtracted from the scales' integers.
        zero_scale: step of the zero points.
        zero_zero: what is subtracted from the zero points' integers.
        bits: of a scale's, and of a zero point's integer.
        block_size: neighbouring columns that share a grid.
    """

    scale_scale: Array
    scale_zero: Array
    zero_scale: Array
    zero_zero: Array
    bits: int
    block_size: int

    def scales(self, integers: Array) -> Floats:
        """The scales [K / B, N] that ``integers`` stand for."""
        return self._values(integers, self.scale_scale, self.scale_zero)

    def zero_points(self, integers: Array) -> Floats:
        """The zero points [K / B, N] that ``integers`` stand for."""
        return self._values(integers, self.zero_scale, self.zero_zero)

    def _values(self, integers: Array, scale: Array, zero: Array) -> Floats:
        block_of = np.arange(integers.shape[1]) // self.block_size
        step, subtracted = (array.astype(np.float32)[:, block_of] for array in (scale, zero))
        values: Floats = (integers.astype(np.float32) - subtracted) * step
        return values

    def columns(self, start: int, stop: int) -> SecondLevel:
        """The part of output channels ``start`` to ``stop``; ``start`` must begin a block."""
        if start % self.block_size:
            raise ValueError(f"columns from {start}: expected a multiple of {self.block_size}")
        part = (..., slice(start // self.block_size, -(-stop // self.block_size)))
        return dataclasses.replace(
            self,
            scale_scale=self.scale_scale[part],
            scale_zero=self.scale_zero[part],
            zero_scale=self.zero_scale[part],
            zero_zero=self.zero_zero[part],
        )


@dataclasses.dataclass(frozen=True)
class Outliers:
    """Weights that are kept.

    Attributes:
        positions: [nnz] int64, ascending, of the flattened [K, N] weight.
        values: [nnz] float16.
    """

    positions: npt.NDArray[np.int64]
    values: npt.NDArray[np.float16]


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """What is stored of a weight [K, N] whose blocks of B rows of one column share a grid.

    Attributes:
        integers: [K, N] int8 or uint8; float8 for FP8.
        scale: [K / B, N], or [N] for one per channel: a float type, float8 types included; uint8 if bilevel.
        zero_point: shaped like ``scale``, in the type of ``integers``; None for 0.
        bits: that an integer takes.
        codebook: [2^bits] float32: what the integers stand for.
        second_level: what the integers of ``scale`` and ``zero_point`` stand for.
        outliers: weights that are kept.
    """

    integers: Array
    scale: Array
    zero_point: Array | None
    bits: int
    codebook: Floats | None = None
    second_level: SecondLevel | None = None
    outliers: Outliers | None = None

    def dequantized(self) -> Floats:
        """ŵ [K, N] float32."""
        rows, columns = self.integers.shape
        scale, zero_point = self._grids()
        values = self.integers.astype(np.float32) if self.codebook is None else self.codebook[self.integers]
        blocks = values.reshape(len(scale), rows // len(scale), columns)
        if zero_point is not None:
            blocks = blocks - zero_point[:, None]
        weight = (blocks * scale[:, None]).reshape(rows, columns)
        if self.outliers is not None:
            weight.flat[self.outliers.positions] = self.outliers.values
        return weight

    def _grids(self) -> tuple[Floats, Floats | None]:
        scale = np.atleast_2d(self.scale)
        zero_point = None if self.zero_point is None else np.atleast_2d(self.zero_point)
        if self.second_level is not None and zero_point is not None:
            return self.second_level.scales(scale), self.second_level.zero_points(zero_point)
        return scale.astype(np.float32), None if zero_point is None else zero_point.astype(np.float32)

    def columns(self, start: int, stop: int) -> QuantizedWeight:
        """The part of output channels ``start`` to ``stop``: layers quantised as one come apart again."""
        part = (..., slice(start, stop))
        return dataclasses.replace(
            self,
            integers=self.integers[part],
            scale=self.scale[part],
            zero_point=None if self.zero_point is None else self.zero_point[part],
            second_level=None if self.second_level is None else self.second_level.columns(start, stop),
            outliers=None if self.outliers is None else self._outliers_of_columns(self.outliers, start, stop),
        )

    def _outliers_of_columns(self, outliers: Outliers, start: int, stop: int) -> Outliers:
        row, column = np.divmod(outliers.positions, self.integers.shape[1])
        inside = (column >= start) & (column < stop)
        positions = row[inside] * (stop - start) + column[inside] - start
        return Outliers(positions, outliers.values[inside])

    def bits_per_weight(self) -> float:
        """All that is stored, in bits, over K · N: integers, grids, code book, outliers, their positions."""
        bits = self.integers.size * self.bits
        if self.second_level is None:
            bits += _bits_of(self.scale)
            bits += 0 if self.zero_point is None else self.zero_point.size * self.bits
        else:
            level = self.second_level
            bits += 2 * self.scale.size * level.bits
            bits += sum(
                _bits_of(array)
                for array in (level.scale_scale, level.scale_zero, level.zero_scale, level.zero_zero)
            )
        if self.codebook is not None:
            bits += _bits_of(self.codebook)
        if self.outliers is not None:
            bits += _bits_of(self.outliers.values) + self.outliers.positions.size * _POSITION_BITS
        return bits / self.integers.size


def _bits_of(array: Array) -> int:
    return 8 * array.nbytes
