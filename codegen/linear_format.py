"""What a quantisation scheme asks of a target, in one small record that is known before any work is done."""

from __future__ import annotations

import dataclasses
from typing import Literal

import onnx_ir as ir

FLOAT_ACTIVATIONS = 16
"""``activation_bits`` of schemes that leave activations in the model's float type, whatever its width."""

FORMATS = (
    "W2A16 to W8A16: integers per channel or in groups, with or without zero points; bilevel; outliers",
    "W2A2 to W8A8 with activations per token: integers per channel or in groups",
    "W5A8 to W8A8 with one dynamic grid per tensor, W2A8 to W8A8 with a static one: integers per channel",
    "NF4, FP4, NVFP4, MXFP4 and other code books of 2 to 8 bits, with float activations",
    "FP8 weights with float activations",
)
"""What the ``planish`` ops can say, and so what any target that runs their bodies can run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearFormat:
    """How the linears of a scheme store their weights and treat their activations.

    Attributes:
        kind: of weights: ``integer`` on a uniform grid, ``codebook`` indices, or ``float8``.
        bits: of a weight.
        block_size: rows of [K, N] that share a scale; 0 for one scale per output channel.
        activation_bits: 16 leaves activations in float.
        activations: what shares a grid, where activations are quantised: each ``token`` or the whole
            ``tensor`` at run time, or ``static``: one grid for all inputs.
        dtype: float type of the model's activations.
    """

    kind: Literal["integer", "codebook", "float8"] = "integer"
    bits: int
    block_size: int = 0
    activation_bits: int = FLOAT_ACTIVATIONS
    activations: Literal["token", "tensor", "static"] = "token"
    dtype: ir.DataType = ir.DataType.FLOAT

    def unsupported_reason(self) -> str | None:
        """Why no ``planish`` op says this; None if one does."""
        if self.kind == "float8" and self.bits != 8:
            return f"float8 weights have 8 bits, not {self.bits}"
        if not 2 <= self.bits <= 8:
            return f"weights of {self.bits} bits have no container: expected 2 to 8"
        if self.activation_bits == FLOAT_ACTIVATIONS:
            return None
        if not 2 <= self.activation_bits <= 8:
            return f"activations of {self.activation_bits} bits have no container: expected 2 to 8, or 16"
        if self.kind != "integer":
            return f"{self.kind} weights take float activations only"
        if self.activations == "token":
            return None
        if self.block_size:
            return f"{self.activations} activations take one scale per output channel, found groups"
        if self.activation_bits != 8:
            return f"{self.activations} activations have 8 bits, not {self.activation_bits}"
        if self.activations == "tensor" and self.bits < 5:
            return f"one dynamic grid per tensor takes weights of 5 to 8 bits, not {self.bits}"
        return None
