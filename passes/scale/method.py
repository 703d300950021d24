"""What a scaling method is: it watches the input of a group of linears and chooses the scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ...ir.views import Linear
from ...runtime.workers import Workers
from .fold import Doubles


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a method answers.

    Attributes:
        scale: [channels], all above 0; None if the group is best left as it is.
        remark: one sentence about what it brings.
    """

    scale: Doubles | None
    remark: str


class Watcher(Protocol):
    """Takes the statistics of one group, then chooses its scale."""

    def update(self, rows: npt.NDArray[np.float32]) -> None:
        """Take note of rows [tokens, channels] of the group's input."""

    def choose(self, workers: Workers) -> Choice:
        """The scale, after all rows were seen; reads the group's weights, which are as they were."""


class Method(Protocol):
    """A scaling method with its settings."""

    def reason_to_skip(self, linears: Sequence[Linear]) -> str | None:
        """Why these linears cannot be scaled by this method; None if they can."""

    def watch(self, name: str, linears: Sequence[Linear]) -> Watcher:
        """Begin with one group: the linears, of those that read its input, that will be quantised."""
