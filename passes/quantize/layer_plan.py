"""What is to be done with each linear: its scheme and grid, or why it is left alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import onnx_ir as ir

from ...codegen.linear_format import FLOAT_ACTIVATIONS, LinearFormat
from ...ir.views import Convolution, Linear
from .activations import Activations
from .convolution_layers import ConvolutionPlan, plan_convolution
from .formats import CodeBook, Float8
from .grid import Format
from .scheme import Scheme
from .weights import FLOATS

LOW_RANK_KEY = "planish.low_rank"
"""Metadata of the two products that make up for a quantised layer's error: they stay as they are."""


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """One linear, its scheme's name, the grid of its weight and that of its input (None: float)."""

    linear: Linear
    scheme: str
    grid: Format
    activations: Activations | None

    @property
    def format(self) -> LinearFormat:
        """What a target must be able to run."""
        activations, grid = self.activations, self.grid
        return LinearFormat(
            kind="codebook"
            if isinstance(grid, CodeBook)
            else "float8"
            if isinstance(grid, Float8)
            else "integer",
            bits=self.grid.bits,
            block_size=self.grid.block_size,
            activation_bits=FLOAT_ACTIVATIONS if activations is None else activations.bits,
            activations="token" if activations is None else activations.granularity,
            dtype=self.linear.weight.dtype or ir.DataType.FLOAT,
        )


@dataclasses.dataclass(frozen=True)
class Planner:
    """Turns a layer and its scheme into a plan.

    Attributes:
        clip: whether the grid is fitted to err least instead of to cover; None: below 5 bits.
        granularity: of quantised activations; None: per tensor for W8A8, else per token.
        activation_clip: None: 1 for 8 bits, 0.9 below.
        limit_pairs: asks whether 8-bit weights must fit kernels that add products in 16 bits.
    """

    clip: bool | None
    granularity: str | None
    activation_clip: float | None
    limit_pairs: Callable[[], bool]

    def plan(self, layer: Linear | Convolution, scheme: Scheme) -> LayerPlan | ConvolutionPlan | str:
        """The plan, or the reason why the layer cannot be quantised by this scheme."""
        clip = scheme.bits < 5 if self.clip is None else self.clip
        if isinstance(layer, Convolution):
            return plan_convolution(layer, scheme, clip=clip)
        return self._plan_linear(layer, scheme, clip)

    def _plan_linear(self, linear: Linear, scheme: Scheme, clip: bool) -> LayerPlan | str:
        reason = _reason_to_skip(linear, scheme)
        if reason is not None:
            return reason
        activations = self._activations(scheme)
        integer_product = activations is not None and scheme.bits == activations.bits == 8
        grid = scheme.grid(
            linear.weight.dtype or ir.DataType.FLOAT,
            clip=clip,
            limit_pairs=integer_product and self.limit_pairs(),
        )
        return LayerPlan(linear, scheme.name, grid, activations)

    def _activations(self, scheme: Scheme) -> Activations | None:
        bits = scheme.activation_bits
        if bits is None:
            return None
        clip = self.activation_clip
        if clip is None:
            clip = 1.0 if bits == 8 else 0.9
        if self.granularity == "static":
            return Activations("static", bits)
        whole_tensor = scheme.bits == bits == 8 and self.granularity != "token"
        return Activations("tensor") if whole_tensor else Activations("token", bits, clip)


def _reason_to_skip(linear: Linear, scheme: Scheme) -> str | None:
    weight = linear.weight
    if linear.is_quantized:
        return "quantised already"
    if LOW_RANK_KEY in linear.node.metadata_props:
        return "makes up for the error of a quantised layer"
    if weight.const_value is None:
        return "its weight is not constant"
    if weight.dtype not in FLOATS:
        return f"its weight is {weight.dtype}"
    if not weight.const_value.size:
        return "its weight is empty"
    if len(weight.uses()) > 1:
        return "its weight is shared"
    if scheme.group_size > 0 and linear.in_features % scheme.group_size:
        return f"in_features % {scheme.group_size}"
    return None
