"""One convolution: its weight becomes integers with one scale per output channel.

    Conv(x, W) + b   →   planish::QuantizedConv(x, Q, scale, zero_point, b)          W<bits>A16 schemes

A convolution is a linear layer of patches: W [O, I / g, kernel] is g matrices [K, O / g], one for each group
of channels, K = I / g · |kernel|, and their inputs are the patches that the kernel is laid on. So the
algorithms of linears apply, each group with the covariance of its own patches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...ir import ops
from ...ir.views import Convolution
from ...runtime.calibration import Covariance, Tap, patches
from ...runtime.workers import Workers
from .algorithms import Algorithm, LayerStatistics, Remark
from .grid import Format
from .quantized_weight import Floats, QuantizedWeight
from .scheme import Scheme
from .weights import ERROR_KEY, FLOATS, add_tensor, float_dtype, read_weight, relative_error


@dataclasses.dataclass(frozen=True)
class ConvolutionPlan:
    """One convolution, its scheme's name, and the grid of its weight."""

    convolution: Convolution
    scheme: str
    grid: Format

    @property
    def input_name(self) -> str:
        """Name of the input as it is now."""
        value = self.convolution.node.inputs[0] or self.convolution.input
        return str(value.name)


def plan_convolution(convolution: Convolution, scheme: Scheme, *, clip: bool) -> ConvolutionPlan | str:
    """The plan, or the reason why the convolution cannot be quantised by this scheme."""
    weight = convolution.weight
    if convolution.is_quantized:
        return "quantised already"
    if scheme.activation_bits is not None or scheme.format is not None:
        return "a convolution takes integer weights and float activations"
    if weight.dtype not in FLOATS:
        return f"its weight is {weight.dtype}"
    if weight.const_value is not None and not weight.const_value.size:
        return "its weight is empty"
    if len(weight.uses()) > 1:
        return "its weight is shared"
    if convolution.pads is None:
        return "its padding follows from the input's size (auto_pad)"
    per_channel = dataclasses.replace(scheme, group_size=-1)
    grid = per_channel.grid(float_dtype(weight), clip=clip, limit_pairs=False)
    return ConvolutionPlan(convolution, scheme.name, grid)


def patch_statistics(plan: ConvolutionPlan, taps: Iterable[tuple[Tap, Tap | None]]) -> list[LayerStatistics]:
    """Second moments of the patches of each group of channels; prefix errors where dense taps come along."""
    convolution = plan.convolution
    features = math.prod(_weight_shape(convolution)[1:])
    covariances = [Covariance(features) for _ in range(convolution.groups)]
    errors = [Covariance(features) for _ in range(convolution.groups)]
    compares = False
    for tap, dense in taps:
        rows_of_groups = list(patches(convolution, tap.array(plan.input_name)))
        for covariance, rows in zip(covariances, rows_of_groups, strict=True):
            covariance.update(rows)
        if dense is not None:
            compares = True
            wanted = patches(convolution, dense.array(plan.input_name))
            for error, rows, dense_rows in zip(errors, rows_of_groups, wanted, strict=True):
                error.update(dense_rows - rows, rows)
    return [
        LayerStatistics(covariance.mean, error.mean if compares else None, covariance.tokens)
        for covariance, error in zip(covariances, errors, strict=True)
    ]


def _weight_shape(convolution: Convolution) -> tuple[int, ...]:
    return tuple(dim for dim in convolution.weight.shape or () if isinstance(dim, int))


def quantize_convolution(
    model: ir.Model,
    plan: ConvolutionPlan,
    algorithm: Algorithm,
    statistics: list[LayerStatistics] | None,
    remark: Remark,
    workers: Workers,
) -> float:
    """Replace the convolution in place; returns the relative error of its weight."""
    convolution = plan.convolution
    weight = read_weight(convolution.weight)
    groups = convolution.groups
    outputs = weight.shape[0]
    matrices = weight.reshape(groups, outputs // groups, -1).transpose(0, 2, 1)
    items = (
        (np.ascontiguousarray(matrix), None if statistics is None else statistics[index])
        for index, matrix in enumerate(matrices)
    )
    parts: list[QuantizedWeight] = []
    for part, said in workers.map(_quantized_group, (algorithm, plan.grid), items):
        parts.append(part)
        for text in said:
            remark(text)
    integers = _output_channels_first([part.integers for part in parts], weight.shape)
    dequantized = _output_channels_first([part.dequantized() for part in parts], weight.shape)
    error = relative_error(weight, dequantized)
    _replace(model, plan, parts, integers, error)
    return error


def _quantized_group(
    shared: tuple[Algorithm, Format], item: tuple[Floats, LayerStatistics | None]
) -> tuple[QuantizedWeight, list[str]]:
    """One group of channels, and what there is to say about it."""
    (algorithm, grid), (matrix, statistics) = shared, item
    said: list[str] = []
    return algorithm(matrix, grid, statistics, said.append), said


def _output_channels_first(matrices: list[npt.NDArray[np.generic]], shape: tuple[int, ...]) -> Floats:
    """g matrices [K, O / g] as one weight [O, I / g, …kernel]."""
    whole: Floats = np.concatenate([matrix.T for matrix in matrices]).reshape(shape)
    return whole


def _replace(
    model: ir.Model,
    plan: ConvolutionPlan,
    parts: list[QuantizedWeight],
    integers: npt.NDArray[np.generic],
    error: float,
) -> None:
    convolution, name = plan.convolution, plan.convolution.name
    container = ops.container(plan.grid.bits, signed=integers.dtype.kind == "i")
    weight = add_tensor(model, integers, f"{name}.weight_quantized", container)
    scale = add_tensor(model, np.concatenate([part.scale for part in parts]), f"{name}.weight_scale")
    zero_points = [part.zero_point for part in parts if part.zero_point is not None]
    zero_point = None
    if zero_points:
        zero_point = add_tensor(model, np.concatenate(zero_points), f"{name}.weight_zero_point", container)
    node, definition = ops.quantized_conv(
        convolution.node.inputs[0] or convolution.input,
        weight,
        scale,
        zero_point,
        convolution.bias,
        bits=plan.grid.bits,
        strides=convolution.strides,
        pads=convolution.pads or (),
        dilations=convolution.dilations,
        group=convolution.groups,
        name=convolution.node.name,
    )
    node.metadata_props[ERROR_KEY] = f"{error:.3e}"
    ops.define(model, definition)
    ops.replace(convolution.node, node)
