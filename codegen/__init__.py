"""Targets and their bindings: where a compiled model runs, and with which kernels."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..ir.errors import TargetError
from .cuda.target import Cuda
from .linear_format import LinearFormat
from .onnxruntime_cpu import OnnxruntimeCpu
from .portable import Portable
from .target import Binding, BoundModel, Target
from .torch_fx.target import Torch

TARGETS: dict[str, type[Target]] = {target.name: target for target in (Portable, OnnxruntimeCpu, Torch, Cuda)}

__all__ = ["TARGETS", "Binding", "BoundModel", "LinearFormat", "Target", "get_target"]


def get_target(name: str, **options: Any) -> Target:
    """The target called ``name`` with its options: ``get_target("onnxruntime-cpu", rows=(1, 128))``.

    Raises:
        TargetError: no target has that name, or the target has no such option.
    """
    target = TARGETS.get(name)
    if target is None:
        raise TargetError(f"target: expected one of {sorted(TARGETS)}, found {name!r}")
    known = [field.name for field in dataclasses.fields(target)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TargetError(
            f"target {name}: has no option {unknown[0]!r}",
            hint=f"its options are {known}" if known else "it has none",
        )
    return target(**options)
