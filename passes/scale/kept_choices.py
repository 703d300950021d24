"""Chosen scales as arrays that `planish.runtime.work_cache` keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .method import Choice

Array = npt.NDArray[Any]
_SCALE, _REMARK = "scale", "remark"


def to_arrays(choice: Choice) -> dict[str, Array]:
    """Everything, by name."""
    remark = {_REMARK: np.frombuffer(choice.remark.encode(), np.uint8)}
    return remark if choice.scale is None else remark | {_SCALE: choice.scale}


def from_arrays(arrays: Mapping[str, Array]) -> Choice:
    """What `to_arrays` was given."""
    return Choice(arrays.get(_SCALE), arrays[_REMARK].tobytes().decode())
