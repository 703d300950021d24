"""Resize: each dimension on its own, from the input's elements around where the output's are in it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from .registry import Integers, Lowering, as_integers, standard

Tensor = torch.Tensor
Numbers = Tensor | Sequence[float]
_SUPPORT = {"linear": 1, "cubic": 2}
"""How far the elements that count are away, at most."""


@dataclasses.dataclass(frozen=True)
class _Interpolation:
    mode: str
    transform: str
    nearest_mode: str
    antialias: bool
    cubic_coeff_a: float
    exclude_outside: bool
    extrapolation_value: float


@dataclasses.dataclass(frozen=True)
class _Axis:
    """How one dimension is resized; ``start`` and ``end`` are the region's, in parts of the input."""

    axis: int
    size: int
    wanted: int
    scale: float
    start: float
    end: float


def resize(
    x: Tensor,
    region: Numbers | None = None,
    scales: Numbers | None = None,
    sizes: Integers | None = None,
    *,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    """Resize ``axes``, all by default, by factors or to sizes: nearest, linear or cubic."""
    interpolation = _Interpolation(
        mode,
        coordinate_transformation_mode,
        nearest_mode,
        bool(antialias),
        cubic_coeff_a,
        bool(exclude_outside),
        extrapolation_value,
    )
    along = list(range(x.ndim)) if axes is None else [axis % x.ndim for axis in axes]
    result = x
    for each in _resized(x, along, region, scales, sizes, keep_aspect_ratio_policy):
        if each.wanted != each.size or each.scale != 1 or coordinate_transformation_mode == _CROP:
            result = _along(result, each, interpolation)
    return result


_CROP = "tf_crop_and_resize"


def _resized(
    x: Tensor,
    axes: Sequence[int],
    region: Numbers | None,
    scales: Numbers | None,
    sizes: Integers | None,
    policy: str,
) -> list[_Axis]:
    """What is asked for, axis by axis."""
    given = [x.shape[axis] for axis in axes]
    if sizes is not None:
        wanted = as_integers(sizes)
        factors = [new / max(old, 1) for new, old in zip(wanted, given, strict=True)]
        if policy != "stretch":
            factor = min(factors) if policy == "not_larger" else max(factors)
            factors = [factor] * len(axes)
            wanted = [math.floor(factor * old + 0.5) for old in given]
    else:
        factors = _numbers(scales)
        wanted = [math.floor(factor * old) for factor, old in zip(factors, given, strict=True)]
    corners = _numbers(region) or [0.0] * len(axes) + [1.0] * len(axes)
    starts, ends = corners[: len(axes)], corners[len(axes) :]
    return [_Axis(*values) for values in zip(axes, given, wanted, factors, starts, ends, strict=True)]


def _numbers(operand: Numbers | None) -> list[float]:
    if operand is None:
        return []
    return operand.tolist() if isinstance(operand, Tensor) else list(operand)


def _along(x: Tensor, axis: _Axis, interpolation: _Interpolation) -> Tensor:
    """x with one dimension resized."""
    places = _places(axis, interpolation.transform, x.device)
    if interpolation.mode == "nearest":
        nearest = _nearest(places, interpolation.nearest_mode).clamp(0, axis.size - 1)
        result = x.index_select(axis.axis, nearest)
    else:
        result = _weighted(x, axis, places, interpolation)
    if interpolation.transform == _CROP:
        outside = (places < 0) | (places > axis.size - 1)
        shape = [-1 if dim == axis.axis else 1 for dim in range(x.ndim)]
        result = result.masked_fill(outside.reshape(shape), interpolation.extrapolation_value)
    return result


def _places(axis: _Axis, transform: str, device: torch.device) -> Tensor:
    """Where the output's elements are among those of the input.

    In float32, as onnxruntime has it: which of two elements is the nearest can depend on the rounding.
    """
    index = torch.arange(axis.wanted, dtype=torch.float32, device=device)
    match transform:
        case "asymmetric":
            return index / axis.scale
        case "align_corners":
            return index * (axis.size - 1) / max(axis.wanted - 1, 1)
        case "tf_crop_and_resize":
            first, last = axis.start * (axis.size - 1), axis.end * (axis.size - 1)
            if axis.wanted == 1:
                return 0.5 * (first + last) + index
            return first + index * (last - first) / (axis.wanted - 1)
        case "half_pixel_symmetric":
            cut = axis.wanted / (axis.scale * axis.size)
            return axis.size / 2 * (1 - cut) + (index + 0.5) / axis.scale - 0.5
        case "pytorch_half_pixel" if axis.wanted == 1:
            return torch.zeros_like(index)
        case _:
            return (index + 0.5) / axis.scale - 0.5


def _nearest(places: Tensor, mode: str) -> Tensor:
    match mode:
        case "floor":
            chosen = places.floor()
        case "ceil":
            chosen = places.ceil()
        case "round_prefer_ceil":
            chosen = (places + 0.5).floor()
        case _:
            chosen = (places - 0.5).ceil()
    return chosen.long()


def _weighted(x: Tensor, axis: _Axis, places: Tensor, interpolation: _Interpolation) -> Tensor:
    """Linear and cubic: the elements around each place, by weights that fall with the distance.

    Antialiasing makes the filter wider by as much as the image gets smaller. What is outside counts as the
    element at the border, or not at all.
    """
    stretch = max(1.0, 1 / axis.scale) if interpolation.antialias else 1.0
    support = _SUPPORT[interpolation.mode] * stretch
    count = math.ceil(2 * support) + interpolation.antialias
    first = (places - support).floor() + 1
    around = first.unsqueeze(1) + torch.arange(count, device=x.device)
    weights = _weights((around - places.unsqueeze(1)).abs() / stretch, interpolation)
    if interpolation.exclude_outside:
        weights = weights.masked_fill((around < 0) | (around > axis.size - 1), 0)
    if interpolation.exclude_outside or interpolation.antialias:
        weights = weights / weights.sum(1, keepdim=True)
    elements = around.long().clamp(0, axis.size - 1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    shape = [-1 if dim == axis.axis else 1 for dim in range(x.ndim)]
    total = x.new_zeros((), dtype=dtype)
    for place in range(count):
        picked = x.index_select(axis.axis, elements[:, place]).to(dtype)
        total = total + picked * weights[:, place].to(dtype).reshape(shape)
    return total.to(x.dtype)


def _weights(distance: Tensor, interpolation: _Interpolation) -> Tensor:
    if interpolation.mode == "linear":
        return (1 - distance).clamp(min=0)
    a = interpolation.cubic_coeff_a
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, 0))


OPS = standard({"Resize": Lowering(resize, integers=(1, 2, 3))})
