"""Activations on a grid per token, in the forms that kernels take them.

    x_scale[..., 1] = max(clip · max|x| / levels, tiny),   integers = round(x / x_scale) within the grid

as in the bodies of ``DynamicQuantizedLinear``, levels = 2^(bits − 1) − 1. Without a clip below 1 nothing
exceeds the grid, and the clamp is left out.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...ir.graph_builder import GraphBuilder
from ..linear_op import LinearOp, LinearSpec


def emit_integers(build: GraphBuilder, op: LinearOp) -> tuple[ir.Value, ir.Value]:
    """Whole numbers in float32, shaped like the activations, and their scale [..., 1]."""
    last_axis = build.constant(np.array([-1], np.int64), "last_axis")
    largest = build.op("ReduceMax", build.op("Abs", op.x), last_axis, keepdims=1)
    x_scale = emit_scale(build, op.spec, largest)
    rounded = build.op("Round", build.op("Div", op.x, x_scale))
    if op.spec.activation_clip < 1:
        lowest = build.constant(np.array(-_levels(op.spec) - 1, np.float32), "lowest")
        highest = build.constant(np.array(_levels(op.spec), np.float32), "highest")
        rounded = build.op("Clip", rounded, lowest, highest)
    return rounded, x_scale


def emit_scale(build: GraphBuilder, spec: LinearSpec, largest: ir.Value) -> ir.Value:
    """The scale of tokens whose largest magnitudes are ``largest``."""
    if spec.activation_clip < 1:
        largest = build.op("Mul", largest, build.constant(np.array(spec.activation_clip, np.float32), "clip"))
    scaled = build.op("Div", largest, build.constant(np.array(_levels(spec), np.float32), "levels"))
    return build.op("Max", scaled, build.constant(np.array(np.finfo(np.float32).tiny), "tiny"))


def middle(spec: LinearSpec) -> int:
    """What is added to the integers to store them as uint8: as little as will do, lest products overflow."""
    return 1 << (spec.activation_bits - 1)


def _levels(spec: LinearSpec) -> int:
    return middle(spec) - 1
