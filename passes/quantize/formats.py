"""Formats whose points are not equally spaced: code books of 4 bits, and 8-bit floats.

    ŵ = codebook[q] · scale         NF4, FP4, MXFP4, NVFP4
    ŵ = q · scale, q float8         FP8

| name  | points                                  | a scale for      | stored as                        |
|-------|-----------------------------------------|------------------|----------------------------------|
| NF4   | 16 quantiles of a normal variable       | a group          | the model's float type           |
| FP4   | E2M1: ±{0, ½, 1, 1½, 2, 3, 4, 6}        | a group          | the model's float type           |
| MXFP4 | E2M1                                    | 32 rows          | E8M0, powers of two              |
| NVFP4 | E2M1                                    | 16 rows          | E4M3, times one float32 per tensor |
| FP8   | E4M3: ±448 with 4 significant bits      | a channel        | the model's float type           |

A scale makes the largest point meet the largest weight of its block; MXFP4 rounds it to the power of two
below, as its specification does, and then the largest weights saturate. With ``clip``, other scales are tried
too.

Sources: Dettmers et al., QLoRA, 2023, https://arxiv.org/abs/2305.14314 (NF4); OCP Microscaling Formats v1.0
(E2M1, E8M0); Micikevicius et al., 2022, https://arxiv.org/abs/2209.05433 (E4M3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import scipy.special

from .grid import Format, storable_floats
from .quantized_weight import Floats, QuantizedWeight

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
_LARGEST_E4M3 = 448.0
_SMALLEST_E4M3 = 2.0**-9
_POWER_OF_TWO_FACTORS = (2.0, 0.5)


def normal_float_levels() -> tuple[float, ...]:
    """The 16 points of NF4, ascending from −1 to 1.

    Quantiles of the standard normal distribution at even distances, 8 up from 0 and 7 down from 0, divided by
    the largest. The outermost lies half a step inside the tail: 1 − (1/32 + 1/30) / 2.
    """
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    above = scipy.special.ndtri(np.linspace(outermost, 0.5, 9))[:-1]
    below = -scipy.special.ndtri(np.linspace(outermost, 0.5, 8))[:-1]
    levels = np.sort(np.concatenate([above, [0.0], below])) / above.max()
    return tuple(float(level) for level in levels)


def float4_levels() -> tuple[float, ...]:
    """The 16 points of E2M1 in the order of their bits: sign, two of exponent, one of mantissa."""
    return (*_E2M1, *(-level for level in _E2M1))


@dataclasses.dataclass(frozen=True)
class CodeBook:
    """The `Format` of any 2^bits points.

    Attributes:
        name: of the format.
        levels: the points, by their index.
        block_size: rows that share a scale; 0 for all.
        scale_dtype: a float type, float8_e4m3fn (times `tensor_scale`) or float8_e8m0fnu.
        clip: look for the scale with the least error instead of covering the largest weight.
        tensor_scale: what E4M3 scales are multiplied by; see `prepared`.
    """

    name: str
    levels: tuple[float, ...]
    block_size: int
    scale_dtype: np.dtype[Any]
    clip: bool = False
    tensor_scale: float = 1.0

    symmetric = False
    limit_pairs = False

    @property
    def bits(self) -> int:
        """Bits of an index."""
        return (len(self.levels) - 1).bit_length()

    @property
    def largest(self) -> float:
        """The largest magnitude of a point."""
        return max(abs(level) for level in self.levels)

    def prepared(self, weight: Floats) -> CodeBook:
        """With E4M3 scales: the tensor's scale, at which the block with the largest weight has scale 448."""
        if self.scale_dtype != _E4M3:
            return self
        largest = float(np.abs(weight).max(initial=0))
        scale = np.float32(largest / self.largest / _LARGEST_E4M3)
        return dataclasses.replace(self, tensor_scale=float(scale) if scale > 0 else 1.0)

    def trials(self, blocks: Floats, factors: Sequence[float]) -> Iterator[tuple[Floats, Floats | None]]:
        """The covering scale, then multiples of it; no zero points."""
        covering = np.abs(blocks).max(axis=1) / np.float32(self.largest)
        yield self.storable(covering), None
        if self.scale_dtype == _E8M0 and factors:
            factors = _POWER_OF_TWO_FACTORS
        for factor in factors:
            yield self.storable(covering * np.float32(factor)), None

    def storable(self, scale: npt.NDArray[np.floating[Any]]) -> Floats:
        """The scales in their stored type; blocks of zeros get scale 1."""
        if self.scale_dtype == _E8M0:
            exponent = (
                np.floor(np.log2(np.where(scale > 0, scale, 1) * self.largest)) - self._largest_exponent
            )
            return np.exp2(np.clip(exponent, -126, 127)).astype(np.float32)
        if self.scale_dtype == _E4M3:
            parts = np.clip(scale / self.tensor_scale, _SMALLEST_E4M3, _LARGEST_E4M3).astype(_E4M3)
            stored: Floats = parts.astype(np.float32) * np.float32(self.tensor_scale)
            return stored
        return storable_floats(scale, self.scale_dtype)

    @property
    def _largest_exponent(self) -> float:
        return float(np.floor(np.log2(self.largest)))

    def codes(self, values: Any, scale: Any, zero: Any) -> Any:
        """Indices of the nearest levels."""
        levels, indices = np.unique(np.array(self.levels), return_index=True)
        positions = np.searchsorted((levels[1:] + levels[:-1]) / 2, values / scale)
        return indices[positions].astype(np.result_type(values))

    def values(self, codes: Any, scale: Any, zero: Any) -> Any:
        """levels[codes] · scale."""
        return np.array(self.levels, np.float32).astype(codes.dtype)[codes.astype(np.intp)] * scale

    def stored(self, codes: npt.NDArray[Any], scale: Floats, zero: Floats | None) -> QuantizedWeight:
        """uint8 indices with the code book that the scales as they are stored go with."""
        parts = scale / np.float32(self.tensor_scale)
        levels = np.array(self.levels, np.float32) * np.float32(self.tensor_scale)
        stored = (parts if self.block_size else parts[0]).astype(self.scale_dtype)
        return QuantizedWeight(codes.astype(np.uint8), stored, None, self.bits, codebook=levels)


@dataclasses.dataclass(frozen=True)
class Float8:
    """The `Format` of E4M3 floats: codes are the floats themselves.

    Attributes:
        block_size: rows that share a scale; 0 for all.
        scale_dtype: the float type that scales are stored in.
        clip: look for the scale with the least error instead of covering the largest weight.
    """

    block_size: int
    scale_dtype: np.dtype[Any]
    clip: bool = False

    name = "FP8"
    bits = 8
    symmetric = True
    limit_pairs = False

    def prepared(self, weight: Floats) -> Float8:
        """The format itself: blocks share nothing."""
        return self

    def trials(self, blocks: Floats, factors: Sequence[float]) -> Iterator[tuple[Floats, Floats | None]]:
        """The scale at which the largest weight is 448, then multiples of it; no zero points."""
        covering = np.abs(blocks).max(axis=1) / np.float32(_LARGEST_E4M3)
        yield self.storable(covering), None
        for factor in factors:
            yield self.storable(covering * np.float32(factor)), None

    def storable(self, scale: npt.NDArray[np.floating[Any]]) -> Floats:
        """The scales in their stored type; blocks of zeros get scale 1."""
        return storable_floats(scale, self.scale_dtype)

    def codes(self, values: Any, scale: Any, zero: Any) -> Any:
        """The nearest floats; what is larger than 448 becomes 448."""
        parts = np.clip(values / scale, -_LARGEST_E4M3, _LARGEST_E4M3)
        return parts.astype(_E4M3).astype(parts.dtype)

    def values(self, codes: Any, scale: Any, zero: Any) -> Any:
        """codes · scale."""
        return codes * scale

    def stored(self, codes: npt.NDArray[Any], scale: Floats, zero: Floats | None) -> QuantizedWeight:
        """float8_e4m3fn codes."""
        stored = (scale if self.block_size else scale[0]).astype(self.scale_dtype)
        return QuantizedWeight(codes.astype(_E4M3), stored, None, self.bits)


FORMATS = ("FP4", "FP8", "MXFP4", "NF4", "NVFP4")
"""The names that `number_format` knows."""
_DEFAULT_GROUP = 64


def number_format(
    name: str, *, scale_dtype: np.dtype[Any], block_size: int | None = None, clip: bool = False
) -> Format:
    """The format called ``name``, one of `FORMATS`.

    Args:
        name: upper case.
        scale_dtype: the model's float type; MXFP4 and NVFP4 have types of their own.
        block_size: rows that share a scale, 0 for all; by default 64 for NF4 and FP4, 0 for FP8. MXFP4 and
            NVFP4 have 32 and 16 by definition.
        clip: look for the scale with the least error.

    Raises:
        ValueError: the name is not known, or the format has another block size.
    """
    fixed = {"MXFP4": (32, _E8M0), "NVFP4": (16, _E4M3)}
    if name in fixed:
        own_size, own_dtype = fixed[name]
        if block_size not in (None, own_size):
            raise ValueError(f"{name} has groups of {own_size}, found {block_size}")
        return CodeBook(name, float4_levels(), own_size, own_dtype, clip)
    if name == "FP8":
        return Float8(block_size or 0, scale_dtype, clip)
    levels = {"NF4": normal_float_levels, "FP4": float4_levels}
    if name not in levels:
        raise ValueError(f"format {name!r} is not known: expected one of {', '.join(FORMATS)}")
    return CodeBook(
        name, levels[name](), _DEFAULT_GROUP if block_size is None else block_size, scale_dtype, clip
    )
