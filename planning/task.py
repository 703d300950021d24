"""What is said to the process that compiles a scaled-down model, and what it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..codegen.target import Target
from ..runtime.provenance import Provenance

Feeds = Mapping[str, np.ndarray[Any, Any]]

TASK, MODEL, RESULT, OUTCOME = "task.pickle", "model.onnx", "result.onnx", "outcome.pickle"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What to compile a model with."""

    passes: str
    target: Target
    check: str
    seed: int
    calibration: Sequence[Feeds]
    training: Sequence[Feeds]


@dataclasses.dataclass(frozen=True)
class Phase:
    """One stretch of a compilation.

    Attributes:
        name: ``read``, ``1 fuse`` and so on by the place of a pass, ``bind``, ``save``.
        seconds: wall time.
        peak: the most memory that the process held in it, in bytes; None where the system does not say.
    """

    name: str
    seconds: float
    peak: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a compilation did and cost; or how it failed.

    Attributes:
        phases: in their order.
        asked: by pass, what data it looked at: ``calibration``, ``training``, ``examples``.
        provenance: of the file that was written; None after an error.
        file_bytes: its size, with what lies beside it.
        error: what went wrong, and None otherwise.
        lacks_data: a pass needs data and was given none.
    """

    phases: tuple[Phase, ...]
    asked: Mapping[str, tuple[str, ...]]
    provenance: Provenance | None
    file_bytes: int
    error: str | None = None
    lacks_data: bool = False

    @property
    def seconds(self) -> float:
        """Of all phases."""
        return sum(phase.seconds for phase in self.phases)

    def faster(self, other: Outcome) -> Outcome:
        """This one, with the time of every phase from where it was shorter."""
        phases = tuple(
            dataclasses.replace(phase, seconds=min(phase.seconds, again.seconds))
            for phase, again in zip(self.phases, other.phases, strict=True)
        )
        return dataclasses.replace(self, phases=phases)


def phase_of(position: int, name: str) -> str:
    """What the phase of a pass is called."""
    return f"{position} {name}"
