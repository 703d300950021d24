"""Quantisation schemes by their usual names: how many bits weights and activations get, and the grid's shape.

    W<bits>A16          integer weights, float activations           W8A16, W4A16, W3A16, W2A16
    W<bits>A<bits>      the activations are quantised at run time    W8A8, W4A8, W4A4
    …_ASYM              the same with zero points                    W4A16_ASYM
    NF4, FP4            4-bit code books, float activations          also MXFP4A16, NVFP4A16
    FP8A16              float8 weights, float activations

A16 stands for activations that stay in the model's float type, 16 bits wide or not.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import onnx_ir as ir

from ...ir.errors import PipelineError
from .formats import FORMATS, number_format
from .grid import Format, Grid

_SCHEME = re.compile(r"W(?P<bits>[2-8])A(?P<activation_bits>[2-8]|16)(?P<asymmetric>_ASYM)?", re.IGNORECASE)
_FORMAT_SCHEME = re.compile(r"(?P<format>[A-Z0-9]+?)(A16)?", re.IGNORECASE)
_GROUP_SIZE_BELOW_5_BITS = 128


@dataclasses.dataclass(frozen=True)
class Scheme:
    """What a scheme's name says.

    Attributes:
        name: as it was given.
        bits: of a weight, 2 to 8.
        activation_bits: of an activation, quantised at run time; None where activations stay float.
        symmetric: no zero points.
        group_size: rows of [K, N] that share a scale; −1 for one scale per output channel.
        format: of weights that are no integers, one of `formats.FORMATS`.
    """

    name: str
    bits: int
    activation_bits: int | None
    symmetric: bool
    group_size: int
    format: str | None = None

    def grid(self, weight_dtype: ir.DataType, *, clip: bool, limit_pairs: bool) -> Format:
        """What one weight of this scheme is rounded to."""
        block_size = max(self.group_size, 0)
        if self.format is not None:
            return number_format(
                self.format, scale_dtype=weight_dtype.numpy(), block_size=block_size, clip=clip
            )
        return Grid(
            bits=self.bits,
            symmetric=self.symmetric,
            block_size=block_size,
            scale_dtype=weight_dtype.numpy(),
            clip=clip,
            limit_pairs=limit_pairs,
        )


def parse_scheme(name: str, group_size: int | None = None, symmetric: bool | None = None) -> Scheme:
    """The scheme called ``name``, with the pass's own options over its defaults.

    Raises:
        PipelineError: the name is not a scheme, or the options contradict it.
    """
    match = _SCHEME.fullmatch(name)
    if match is None:
        return _format_scheme(name, group_size, symmetric)
    bits = int(match["bits"])
    activation_bits = None if match["activation_bits"] == "16" else int(match["activation_bits"])
    if match["asymmetric"] and symmetric:
        raise PipelineError(f"quantize: scheme {name!r} is asymmetric, found symmetric=true")
    if symmetric is None:
        symmetric = match["asymmetric"] is None
    if group_size is None:
        group_size = _GROUP_SIZE_BELOW_5_BITS if bits < 5 and activation_bits is None else -1
    if activation_bits == bits == 8 and (not symmetric or group_size != -1):
        raise PipelineError(
            f"quantize: {name!r} needs symmetric weights and one scale per channel; found "
            f"symmetric={str(symmetric).lower()}, group_size={group_size}",
            hint="use an A16 scheme, or fewer bits, for groups or zero points",
        )
    _check_group_size(group_size)
    return Scheme(name, bits, activation_bits, symmetric, group_size)


def _format_scheme(name: str, group_size: int | None, symmetric: bool | None) -> Scheme:
    match = _FORMAT_SCHEME.fullmatch(name)
    format_name = match["format"].upper() if match else ""
    if format_name not in FORMATS:
        raise PipelineError(
            f"quantize: scheme {name!r} is not known",
            hint="expected W<2…8>A<2…8 or 16> with or without _ASYM, such as W4A16, W8A8 or W4A4, or one of "
            + ", ".join(FORMATS),
        )
    if symmetric is False:
        raise PipelineError(f"quantize: {name!r} has no zero points, found symmetric=false")
    block_size = None if group_size is None else max(group_size, 0)
    try:
        found = number_format(format_name, scale_dtype=np.dtype(np.float32), block_size=block_size)
    except ValueError as error:
        raise PipelineError(f"quantize: {error}") from error
    _check_group_size(found.block_size or -1)
    return Scheme(name, found.bits, None, True, found.block_size or -1, format_name)


def _check_group_size(group_size: int) -> None:
    if group_size != -1 and (group_size < 16 or group_size & (group_size - 1)):
        raise PipelineError(
            f"quantize: group_size must be −1 or a power of two from 16, found {group_size}",
            hint="32, 64 and 128 are usual",
        )
