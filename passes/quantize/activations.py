"""How the input of a linear becomes integers at run time, and what that does to calibration data."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Granularity = Literal["tensor", "token", "static"]
_TINY = np.finfo(np.float32).tiny


@dataclasses.dataclass(frozen=True)
class Activations:
    """The grid of a linear's input.

    Attributes:
        granularity: one grid for the ``tensor`` or for each ``token``, found at run time; or ``static``, one
            grid for ever, found on calibration data.
        bits: 2 to 8.
        clip: the part of a token's largest magnitude that its grid covers.
        scale: step of a static grid.
        zero_point: of a static grid.
    """

    granularity: Granularity
    bits: int = 8
    clip: float = 1.0
    scale: float | None = None
    zero_point: int | None = None

    def apply(self, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """What the integers of ``rows`` [tokens, features] stand for.

        A grid per tensor depends on what runs together, and is taken for exact here: it has 8 bits.
        """
        if self.granularity != "token":
            return rows
        top = np.float32((1 << (self.bits - 1)) - 1)
        largest: npt.NDArray[Any] = np.abs(rows).max(axis=-1, keepdims=True, initial=0)
        scale = np.maximum(largest * np.float32(self.clip) / top, _TINY)
        integers = np.clip(np.rint(rows / scale), -top - 1, top)
        return np.asarray(integers * scale, dtype=np.float32)
