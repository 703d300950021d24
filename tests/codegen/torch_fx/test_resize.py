"""Resize against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
from op_cases import Array, Case, Draw, Generator, agree

TRANSFORMS = (
    "half_pixel",
    "half_pixel_symmetric",
    "pytorch_half_pixel",
    "align_corners",
    "asymmetric",
    "tf_crop_and_resize",
)
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")


def resize(draw: Draw) -> Case:
    """Images [N, C, height, width], whose height and width change, and any axes of any rank by nearest."""
    mode = draw.choice(("nearest", "linear", "cubic"))
    attributes: dict[str, Any] = {
        "mode": draw.maybe(mode) if mode == "nearest" else mode,
        "coordinate_transformation_mode": draw.maybe(draw.choice(TRANSFORMS), 0.8),
    }
    if mode == "nearest":
        attributes["nearest_mode"] = draw.maybe(draw.choice(ROUNDINGS))
    if mode == "cubic":
        attributes["cubic_coeff_a"] = draw.maybe(draw.choice((-0.5, -0.6)))
        attributes["exclude_outside"] = draw.maybe(draw.integer(0, 1))
    x = draw.array([draw.integer(1, 2), draw.integer(1, 3), *draw.integers(2, 2, 7)])
    cropped = attributes["coordinate_transformation_mode"] == "tf_crop_and_resize"
    if mode != "nearest" and not cropped and draw.flag(0.4):
        attributes["antialias"] = 1
    if draw.flag(0.3):
        attributes["axes"] = [2, 3]  # onnxruntime takes negative ones for others
    region = None
    if cropped:
        attributes["extrapolation_value"] = draw.maybe(draw.number(-5, 5))
        starts, ends = (draw.array([2], low=low, high=low + 0.6) for low in (-0.2, 0.6))
        region = np.concatenate([starts, ends] if "axes" in attributes else [[0, 0], starts, [1, 1], ends])
        region = region.astype("float32")
    scales, sizes = target(draw, x, attributes, whole="axes" not in attributes)
    return Case([x, region, scales, sizes], attributes, terms=8)


def target(
    draw: Draw, x: Array, attributes: dict[str, Any], *, whole: bool
) -> tuple[Array | None, Array | None]:
    """Factors or sizes for all dimensions, or for the last two.

    Both change: onnxruntime copies a dimension that keeps its size, where the region or a factor next to 1
    move the places of its elements.
    """
    if draw.flag():
        factors = np.array([draw.choice((draw.number(0.4, 0.99), draw.number(1.5, 2.5))) for _ in range(2)])
        return np.concatenate([[1, 1], factors] if whole else [factors]).astype("float32"), None
    sizes = [draw.choice([size for size in range(1, 12) if size != old]) for old in x.shape[2:]]
    if not whole and attributes["coordinate_transformation_mode"] != "tf_crop_and_resize":
        attributes["keep_aspect_ratio_policy"] = draw.maybe(
            draw.choice(("stretch", "not_larger", "not_smaller"))
        )
    return None, draw.vector([*x.shape[:2], *sizes] if whole else sizes)


CASES: dict[str, Generator] = {"Resize": resize}


def test_resize_agrees_with_onnxruntime() -> None:
    agree("Resize", resize, count=150)
