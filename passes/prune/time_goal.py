"""From a speed-up that is asked for to a choice of levels that really has it.

    predicted(s) = fixed + Σ_l t[l, s_l]        fixed = latency(model) − Σ_l t[l, dense]

The table predicts; the end-to-end time decides. Where measured and predicted times differ, their ratio
corrects the budget, and the search is repeated: first with shapes alone, which need no search, then with what
the search found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...codegen.machine import fingerprint
from ...ir import clone
from ...ir.content_hash import content_hash
from ...ir.errors import PassError
from ...ir.structure import Structure
from ...runtime.latency_table import LatencyTable, measure_latency_table
from ..infrastructure.base import PassContext
from .candidates import Candidates
from .deployment import Deployment, Timing
from .memory import Memory
from .spdy import solve
from .units import Unit, apply_shapes, describe

Doubles = npt.NDArray[np.float64]
Progress = Callable[[Sequence[Any], str], Iterator[Any]]

_SHAPE_ROUNDS = 2
"""Corrections of the budget before the first search."""
_SAFE_MARGIN = 1.25
"""The table is off by less: a goal that it predicts with this margin need not be measured to be possible."""


@dataclasses.dataclass(frozen=True)
class Reached:
    """A choice that was found for a goal.

    Attributes:
        levels: one for each unit.
        label: the goal, such as ``2x``.
        text: what was measured of it.
        loss: on the calibration samples.
    """

    levels: tuple[int, ...]
    label: str
    text: str
    loss: float


class TimeCosts:
    """What every level of every unit takes on the target, and what whole models take.

    Args:
        model: dense, as it came to the pass; not changed.
        structure: of the model.
        units: what levels are chosen for.
        deployment: where models run.
        ctx: of the pass.
        tolerance: largest relative deviation of a measured speed-up.
        corrections: most repetitions of the search.
        table: file of a latency table to use; one is measured if absent.
        force: use it although it was measured elsewhere.
    """

    def __init__(
        self,
        model: ir.Model,
        structure: Structure,
        units: Sequence[Unit],
        deployment: Deployment,
        ctx: PassContext,
        *,
        tolerance: float,
        corrections: int,
        table: Path | None,
        force: bool,
    ) -> None:
        self._model, self._units = model, units
        self._deployment, self._ctx = deployment, ctx
        self._tolerance, self._corrections = tolerance, corrections
        self._memory = Memory(ctx.state_folder() / "times.json", self._key())
        dense = self._timing([0] * len(units), lambda: model)
        self.original = dense.original
        levels = {unit.name: unit.counts for unit in units}
        if table is None:
            used = measured_table(model, structure, units, deployment, ctx.progress)
            used.save(ctx.state_folder() / "latency.json")
        else:
            used = LatencyTable.load(table)
            used.check(
                target=deployment.target,
                batch=deployment.batch,
                sequence=deployment.sequence,
                deployed_with=deployment.deployed_with,
                levels=levels,
                force=force,
            )
        self._seconds = [
            np.array([used.seconds[unit.name][count] for count in unit.counts]) for unit in units
        ]
        self._fixed = dense.candidate - sum(float(times[0]) for times in self._seconds)
        if self._fixed < 0:
            ctx.remark(
                "latency table",
                f"the pieces take {dense.candidate - self._fixed:.3g} s alone, "
                f"the whole model {dense.candidate:.3g} s",
            )

    def require_possible(self, speedup: float) -> None:
        """Refuse a goal that is not reached even by the fastest choice.

        Raises:
            PassError: names the speed-up that can be reached.
        """
        fastest = [int(times.argmin()) for times in self._seconds]
        if self.original / self._predicted(fastest) >= _SAFE_MARGIN * speedup:
            return
        timing = self._timing(fastest, lambda: self._shaped(fastest))
        if timing.speedup >= speedup:
            return
        raise PassError(
            f"prune: a speed-up of {speedup:.4g} (a call in {timing.original / speedup * 1e3:.4g} ms) is out "
            f"of reach: with everything removed that may go, the model is {timing.speedup:.4g} times as fast "
            f"({timing.candidate * 1e3:.4g} ms)",
            hint=f"ask for at most {timing.speedup:.3g}, or let more structures go",
        )

    def reach(self, speedup: float, label: str, candidates: Candidates) -> Reached:
        """The best choice whose measured speed-up is the one asked for.

        Where no attempt comes within the tolerance, the nearest one is returned, and a remark says so.
        """
        scale = self._first_scale(speedup, candidates)
        attempts: list[tuple[float, Reached]] = []
        for _ in range(self._corrections + 1):
            found = candidates.find(self._seconds, self._budget(speedup, scale))
            timing = self._timing(found.choice, lambda: candidates.build(found.choice))  # noqa: B023
            deviation = timing.speedup / speedup - 1
            text = (
                f"{timing.speedup:.3f} times as fast: {timing.candidate * 1e3:.4g} of "
                f"{timing.original * 1e3:.4g} ms, predicted {self._predicted(found.choice) * 1e3:.4g} ms"
            )
            attempts.append((abs(deviation), Reached(found.choice, label, text, found.loss)))
            if abs(deviation) <= self._tolerance:
                break
            scale = self._scale(found.choice, timing)
        nearest, reached = min(attempts, key=lambda attempt: attempt[0])
        if nearest > self._tolerance:
            self._ctx.remark(label, f"{nearest:.1%} off after {len(attempts)} searches: {reached.text}")
        self._memory.write()
        return reached

    def _first_scale(self, speedup: float, candidates: Candidates) -> float:
        """Measured over predicted time of models of about the right size; their weights do not matter."""
        scale = 1.0
        for _ in range(_SHAPE_ROUNDS):
            levels = solve(candidates.errors, self._seconds, self._budget(speedup, scale))
            assert levels is not None  # the budget is never below the fastest choice
            scale = self._scale(levels, self._timing(levels, lambda: self._shaped(levels)))  # noqa: B023
        return scale

    def _scale(self, levels: Sequence[int], timing: Timing) -> float:
        # In units of the original's time of the same rounds, or the machine's drift would count as an error.
        return self.original / timing.speedup / self._predicted(levels)

    def _budget(self, speedup: float, scale: float) -> float:
        fastest = sum(float(times.min()) for times in self._seconds)
        return max(self.original / speedup / scale - self._fixed, fastest)

    def _predicted(self, levels: Sequence[int]) -> float:
        chosen = zip(self._seconds, levels, strict=True)
        return self._fixed + sum(float(times[level]) for times, level in chosen)

    def _shaped(self, levels: Sequence[int]) -> ir.Model:
        model = clone(self._model)
        apply_shapes(model, self._units, levels)
        return model

    def _timing(self, levels: Sequence[int], build: Callable[[], ir.Model]) -> Timing:
        def measure() -> list[float]:
            timing = self._deployment.measure(build())
            return [timing.original, timing.candidate]

        return Timing(*self._memory.get(describe(self._units, levels), measure))

    def _key(self) -> str:
        deployment = self._deployment
        return " ".join(
            [
                content_hash(self._ctx.original),
                content_hash(self._model),
                repr(deployment.target),
                fingerprint(),
                f"{deployment.batch}x{deployment.sequence} {deployment.deployed_with}",
            ]
        )


def measured_table(
    model: ir.Model,
    structure: Structure,
    units: Sequence[Unit],
    deployment: Deployment,
    progress: Progress,
) -> LatencyTable:
    """What every level of every unit takes in a deployment."""
    return measure_latency_table(
        model,
        structure,
        {unit.name: unit.counts for unit in units},
        target=deployment.target,
        feeds=deployment.feeds_of(model),
        batch=deployment.batch,
        sequence=deployment.sequence,
        deployed_with=deployment.deployed_with,
        prepare=deployment.prepare,
        progress=progress,
    )
