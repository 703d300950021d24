"""Placeholder until the kernels are bound: the bodies themselves."""

import dataclasses
from typing import ClassVar

from ..portable.portable import Portable


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnnxruntimeCpu(Portable):
    """x."""

    name: ClassVar[str] = "onnxruntime-cpu"
