"""The pruned models that a search may choose from: their losses, and the one that it chose.

A candidate is a level for each unit. Its weights come from the database of refitted layers, its loss from
running the stitched and physically shrunk model on real inputs. Losses are kept in a file, so that a search
that was interrupted walks the same way again at no cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...ir import clone
from ...ir.structure import Choice, Structure, drop, shrink
from ...runtime.sensitivity import first_samples
from ...runtime.stitched_model import StitchedModel
from ..infrastructure.base import Feeds, PassContext
from .database import Database
from .memory import Memory
from .spdy import Found, search
from .units import DROPPED, Unit, describe, dropped_modules

Doubles = npt.NDArray[np.float64]
Levels = Sequence[int]

_CORRECTION_SHARE = 0.25
"""Of the evaluations, how many a search takes that repeats another one with nearly the same budget."""


class Candidates:
    """All combinations of levels of some units.

    Args:
        model: dense; not changed.
        structure: of the model.
        units: what a level is chosen for.
        database: the refitted layers of every unit at every level.
        samples: inputs that losses are measured on.
        ctx: of the pass; its generator draws coefficients.
        evaluations: losses that one search may ask for.
        memory: file of the losses that are known.
    """

    def __init__(
        self,
        model: ir.Model,
        structure: Structure,
        units: Sequence[Unit],
        database: Database,
        samples: Sequence[Feeds],
        ctx: PassContext,
        *,
        evaluations: int,
        memory: Path,
    ) -> None:
        self._model, self._units, self._database, self._ctx = model, units, database, ctx
        self._stitched = StitchedModel(model, structure, [unit.group for unit in units], samples)
        for name, reason in self._stitched.fixed.items():
            ctx.remark(name, f"its candidates take a session each, which is slower: {reason}")
        self._evaluations = evaluations
        self._start: Doubles | None = None
        self._near: Levels | None = None
        self._losses = Memory(memory, database.key)
        self.errors = [
            np.array([level.error for level in database.levels(unit.name)], np.float64) for unit in units
        ]

    def find(self, costs: Sequence[Doubles], budget: float, *, is_correction: bool = False) -> Found | None:
        """The best candidate whose costs, [levels] of each unit, add up to no more than the budget.

        A correction moves the budget of the last search by a little: it takes a fraction of the evaluations.
        """
        if self._start is None:
            self._start = self._sensitivities()
        share = _CORRECTION_SHARE if is_correction else 1.0
        found = search(
            self.errors,
            costs,
            budget,
            self.loss,
            evaluations=max(1, round(share * self._evaluations)),
            rng=self._ctx.rng,
            start=self._start,
            near=self._near,
            progress=self._ctx.progress,
        )
        self._losses.write()
        if found is not None:
            # What matters for one budget matters for the next, which is a little or a step away.
            self._start, self._near = found.coefficients, found.choice
        return found

    def _sensitivities(self) -> Doubles:
        """[units]: the loss when one unit alone is pruned by half, over its own error at that level."""
        measured = np.ones(len(self._units))
        for index in self._ctx.progress(range(len(self._units)), "measure sensitivities"):
            counts = np.asarray(self._units[index].counts)
            level = int(np.abs(counts - counts[0] / 2).argmin())
            levels = [level if unit == index else 0 for unit in range(len(self._units))]
            loss, error = self.loss(levels), self.errors[index][level]
            if error > 0 and math.isfinite(loss):
                measured[index] = loss / error
        return measured

    def loss(self, levels: Levels) -> float:
        """Of the candidate on the samples; from memory if it was measured before."""
        (loss,) = self._losses.get(
            describe(self._units, levels),
            lambda: [self._stitched.loss(self._choices(levels), dropped_modules(self._units, levels))],
        )
        return loss

    def build(self, levels: Levels) -> ir.Model:
        """The candidate as a model of its own; unchanged weights are shared."""
        model = clone(self._model)
        self.apply(model, levels)
        return model

    def apply(self, model: ir.Model, levels: Levels) -> None:
        """Turn ``model``, the dense model or a clone of it, into the candidate."""
        shrink(model, self._choices(levels))
        drop(model, dropped_modules(self._units, levels))

    def _choices(self, levels: Levels) -> list[Choice]:
        pruned = [
            (unit.group, unit.counts[level])
            for unit, level in zip(self._units, levels, strict=True)
            if level and unit.counts[level] != DROPPED
        ]
        return [self._database.choice(group, count) for group, count in pruned]


def fitness_samples(model: ir.Model, ctx: PassContext, count: int) -> list[Feeds]:
    """The first samples of the calibration data, or of the examples."""
    return first_samples(ctx.calibration or ctx.examples, count, model)
