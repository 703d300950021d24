"""From a speed-up that is asked for to a choice of levels that really has it.

    minimise loss(s)   subject to   Σ_l t[l, s_l] ≤ B        with B such that latency(s) is the one asked for

The table t is of single pieces; the end-to-end latency decides. The two are measured together for the dense
model, for the smallest one, and for some shapes between them, whose weights do not matter; a line through
these points gives B. Then the search is run, its result measured, which gives one more point, and as long as
the latency is off, the search is repeated with a better B.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from scipy.optimize import isotonic_regression

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

_SHAPE_ROUNDS = 1
"""Shapes that are measured for each goal before the first search."""
_NEAR = 0.1
"""Of a measured speed-up from the goal, relative: from there, a search need not begin anew."""
_NOISE = 0.02
"""Of a measured latency, relative: points nearer to the goal than this are equally good."""


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
        deviation: the largest relative one of a measured speed-up.
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
        deviation: float,
        corrections: int,
        table: Path | None,
        force: bool,
    ) -> None:
        self._model, self._units = model, units
        self._deployment, self._ctx = deployment, ctx
        self._deviation, self._corrections = deviation, corrections
        self._points: list[tuple[float, float]] = []
        key = self._key()
        self._memory = Memory(ctx.work(model).folder / "times.json", key)
        self._dense = self._timing([0] * len(units), lambda: model)
        self.original = self._dense.original
        used = self._table(table, force, ctx.work(model).folder / f"latency-{_short(key)}.json", structure)
        self._seconds = [
            _falling([used.seconds[unit.name][count] for count in unit.counts]) for unit in units
        ]
        self._note([0] * len(units), self._dense)

    def _table(self, given: Path | None, force: bool, known: Path, structure: Structure) -> LatencyTable:
        """The table that was given, or measured by the run that this one goes on from, or measured now."""
        if given is None and not known.exists():
            measured = measured_table(
                self._model, structure, self._units, self._deployment, self._ctx.progress
            )
            measured.save(known)
            return measured
        table = LatencyTable.load(given or known)
        table.check(
            target=self._deployment.target,
            batch=self._deployment.batch,
            sequence=self._deployment.sequence,
            deployed_with=self._deployment.deployed_with,
            levels={unit.name: unit.counts for unit in self._units},
            force=force or given is None,
        )
        return table

    def require_possible(self, speedup: float) -> None:
        """Refuse a goal that is not reached even by the fastest choice.

        Raises:
            PassError: names the speed-up that can be reached.
        """
        fastest = [int(times.argmin()) for times in self._seconds]
        timing = self._timing(fastest, lambda: self._shaped(fastest))
        self._note(fastest, timing)
        if timing.speedup < speedup:
            raise PassError(
                f"prune: a speed-up of {speedup:.4g} (a call in {timing.original / speedup * 1e3:.4g} ms) is "
                f"out of reach: with everything removed that may go, the model is {timing.speedup:.4g} times "
                f"as fast ({timing.candidate * 1e3:.4g} ms)",
                hint=f"ask for at most {timing.speedup:.3g}, or let more structures go",
            )

    def reach(self, speedup: float, label: str, candidates: Candidates) -> Reached:
        """The best choice whose measured speed-up is the one asked for.

        Where no attempt comes near enough, the nearest one is returned, and a remark says so. Where the
        model is as fast already, it stays as it is.
        """
        if self._dense.speedup >= speedup:
            return self._unchanged(label, candidates)
        for _ in range(_SHAPE_ROUNDS):
            levels = solve(candidates.errors, self._seconds, self._budget(speedup))
            assert levels is not None  # the budget is never below the fastest choice
            self._note(levels, self._timing(levels, lambda: self._shaped(levels)))  # noqa: B023
        attempts: list[tuple[float, Reached]] = []
        for _ in range(self._corrections + 1):
            is_near = bool(attempts) and attempts[-1][0] <= _NEAR
            found = candidates.find(self._seconds, self._budget(speedup), is_correction=is_near)
            assert found is not None
            timing = self._timing(found.choice, lambda: candidates.build(found.choice), careful=True)  # noqa: B023
            self._note(found.choice, timing)
            deviation = abs(timing.speedup / speedup - 1)
            attempts.append((deviation, Reached(found.choice, label, _text(timing), found.loss)))
            if deviation <= self._deviation:
                break
        nearest, reached = min(attempts, key=lambda attempt: attempt[0])
        if nearest > self._deviation:
            self._ctx.remark(label, f"{nearest:.1%} off after {len(attempts)} searches")
        self._memory.write()
        return reached

    def _unchanged(self, label: str, candidates: Candidates) -> Reached:
        levels = (0,) * len(self._units)
        text = f"already {_text(self._dense)}; nothing is removed"
        return Reached(levels, label, text, candidates.loss(levels))

    def _note(self, levels: Sequence[int], timing: Timing) -> None:
        # In units of the original's time of the same rounds, or the machine's drift would count as an error.
        self._points.append((self._pieces(levels), 1 / timing.speedup))

    def _budget(self, speedup: float) -> float:
        """Seconds of pieces at which a line through the measured models has the latency asked for.

        Models near the goal count most, so that the line follows the curve, and the noise of single
        measurements averages out where there are several.
        """
        wanted = 1 / speedup
        pieces, latencies = np.array(self._points).T
        weights = 1 / (_NOISE + np.abs(latencies / wanted - 1))
        slope, start = np.polyfit(pieces, latencies, 1, w=weights) if np.ptp(pieces) else (0.0, 0.0)
        fastest, dense = (sum(float(edge(times)) for times in self._seconds) for edge in (np.min, np.max))
        return float(np.clip((wanted - start) / slope, fastest, dense)) if slope > 0 else dense

    def _pieces(self, levels: Sequence[int]) -> float:
        return sum(float(times[level]) for times, level in zip(self._seconds, levels, strict=True))

    def _shaped(self, levels: Sequence[int]) -> ir.Model:
        model = clone(self._model)
        apply_shapes(model, self._units, levels)
        return model

    def _timing(
        self, levels: Sequence[int], build: Callable[[], ir.Model], *, careful: bool = False
    ) -> Timing:
        def measure() -> list[float]:
            timing = self._deployment.measure(build(), careful=careful)
            return [timing.original, timing.candidate]

        what = describe(self._units, levels) + (" careful" if careful else "")
        return Timing(*self._memory.get(what, measure))

    def _key(self) -> str:
        """All that times depend on: the models, the levels, the deployment and the machine."""
        deployment = self._deployment
        return " ".join(
            [
                str({unit.name: unit.counts for unit in self._units}),
                content_hash(self._ctx.original),
                content_hash(self._model),
                repr(deployment.target),
                fingerprint(),
                f"{deployment.batch}x{deployment.sequence} {deployment.deployed_with}",
            ]
        )


def _falling(seconds: Sequence[float]) -> Doubles:
    """The nearest times that never rise from one level to the next smaller one.

    Where a smaller level seems slower, the measurement was disturbed, or the larger one does the same work: a
    search would take either for a saving that is none.
    """
    found: Doubles = isotonic_regression(np.array(seconds, np.float64), increasing=False).x
    return found


def _text(timing: Timing) -> str:
    return (
        f"{timing.speedup:.3f} times as fast: {timing.candidate * 1e3:.4g} of {timing.original * 1e3:.4g} ms"
    )


def _short(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:12]


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
