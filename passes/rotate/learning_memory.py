"""What learning rotations keeps: where it is, now and then, and what came of it.

The first rotations and the order of the data are drawn again when learning goes on, so only what was computed
is kept: matrices, their directions, losses.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...runtime.work_cache import Work

Matrix = npt.NDArray[np.float64]
Array = npt.NDArray[Any]

_SECONDS_BETWEEN = 30.0
"""Matrices of a wide model take a hundred megabytes, which not every step need write."""
_UNDER_WAY, _FINISHED = "learning", "learned rotations"


@dataclasses.dataclass(frozen=True)
class LearnedRotations:
    """What was learned.

    Attributes:
        matrices: orthogonal float64 matrices Q, for x·Q, by the label of the `Change` that they are for:
            ``R1 model.embed_tokens``, ``R2 model.layers.0.self_attn.v_proj``.
        losses: the loss of each step, before its update; every step has other data.
        held_out: the loss with the first and with the learned rotations, on data kept from learning. Where
            learning did not lower it, ``matrices`` are the first ones.
    """

    matrices: Mapping[str, Matrix]
    losses: tuple[float, ...]
    held_out: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Position:
    """Learning after some steps.

    Attributes:
        first: the rotations that it began with, one for each turn.
        matrices: the rotations now.
        directions: that the optimiser keeps.
        before: the loss of the first ones on data kept from learning.
        losses: of the steps that were made.
    """

    first: Sequence[Matrix]
    matrices: Sequence[Matrix]
    directions: Sequence[Matrix]
    before: float
    losses: Sequence[float]


class LearningMemory:
    """Keeps one course of learning.

    Args:
        work: where.
        decided_by: all that decides the course besides what the work is of.
    """

    def __init__(self, work: Work, decided_by: str) -> None:
        self._work, self._decided_by = work, decided_by
        self._kept_at = time.monotonic()

    def position(self) -> Position | None:
        """Where an earlier run was interrupted."""
        kept = self._work.recall(_UNDER_WAY, self._decided_by)
        if kept is None:
            return None
        parts = {"first": kept["first"], "matrices": kept["matrices"], "directions": kept["directions"]}
        sizes = kept["sizes"].tolist()
        return Position(
            **{name: _apart(flat, sizes) for name, flat in parts.items()},
            before=float(kept["before"]),
            losses=kept["losses"].tolist(),
        )

    def is_due(self) -> bool:
        """Whether some time has passed since a position was kept last."""
        return self._work.keeps and time.monotonic() >= self._kept_at + _SECONDS_BETWEEN

    def keep(self, position: Position) -> None:
        """Keep where learning is."""
        arrays = {
            "first": _together(position.first),
            "matrices": _together(position.matrices),
            "directions": _together(position.directions),
            "sizes": np.array([len(matrix) for matrix in position.first], np.int64),
            "before": np.array(position.before, np.float64),
            "losses": np.array(position.losses, np.float64),
        }
        self._work.keep(_UNDER_WAY, self._decided_by, arrays)
        self._kept_at = time.monotonic()

    def finished(self, rng: np.random.Generator) -> LearnedRotations | None:
        """What an earlier run has learned; the generator is then where that run left it."""
        kept = self._work.recall(_FINISHED, self._decided_by)
        if kept is None:
            return None
        facts = json.loads(kept.pop("facts").tobytes())
        rng.bit_generator.state = facts["generator"]
        return LearnedRotations(
            {label: kept[str(index)] for index, label in enumerate(facts["labels"])},
            tuple(facts["losses"]),
            (facts["before"], facts["after"]),
        )

    def finish(self, learned: LearnedRotations, rng: np.random.Generator) -> None:
        """Keep what was learned, and where the generator is."""
        before, after = learned.held_out
        facts = {
            "generator": rng.bit_generator.state,
            "labels": list(learned.matrices),
            "losses": learned.losses,
            "before": before,
            "after": after,
        }
        arrays: dict[str, Array] = {
            str(index): matrix for index, matrix in enumerate(learned.matrices.values())
        }
        arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        self._work.keep(_FINISHED, self._decided_by, arrays)
        self._work.forget(_UNDER_WAY, self._decided_by)


def _together(matrices: Sequence[Matrix]) -> Array:
    return np.concatenate([matrix.reshape(-1) for matrix in matrices])


def _apart(flat: Array, sizes: Sequence[int]) -> list[Matrix]:
    ends = np.cumsum([size * size for size in sizes])
    return [flat[end - size * size : end].reshape(size, size) for end, size in zip(ends, sizes, strict=True)]
