"""The loss of every option of every group: what rounding its weights alone does to the model's outputs.

Options are independent of each other, so workers measure them side by side; each loss is kept as soon as it
is known, and a run that was interrupted measures the others only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...ir.errors import PassError
from ...runtime.sensitivity import WeightSensitivity
from ...runtime.work_cache import Work
from ..infrastructure.base import Feeds, PassContext
from ..quantize.algorithms.rtn import round_to_nearest
from ..quantize.grid import Format
from .layers import Group, Option

Array = npt.NDArray[Any]
_LOSS = "loss"


@dataclasses.dataclass(frozen=True)
class Change:
    """How one weight is rounded.

    Attributes:
        weight: name of the initializer.
        transposed: it is stored [N, K].
        grid: of [K, N].
    """

    weight: str
    transposed: bool
    grid: Format


Trial = tuple[Change, ...]
"""What is changed at once."""


def with_losses(
    groups: Sequence[Group], model: ir.Model, samples: Sequence[Feeds], ctx: PassContext
) -> list[Group]:
    """The groups with measured losses; options that leave no finite output are dropped.

    Args:
        groups: whose losses are not known yet.
        model: dense; not changed.
        samples: what the model is run on.
        ctx: gives workers and what an earlier run has kept, and takes remarks.

    Raises:
        PassError: a group has no option left, or a weight holds NaN or an infinity.
    """
    names = [str(linear.weight.name) for group in groups for linear in group.linears]
    trials = {
        trial: f"{group.name}: {option.candidate.text}"
        for group in groups
        for option in group.options
        if (trial := _trial(group, option))
    }
    losses = _measured(trials, names, model, samples, ctx)
    return [_finite(group, losses, ctx) for group in groups]


def _trial(group: Group, option: Option) -> Trial:
    """Empty where the group stays dense."""
    return tuple(
        Change(str(linear.weight.name), linear.transposed, plan.grid)
        for linear, plan in zip(group.linears, option.plans, strict=True)
        if plan is not None
    )


def _measured(
    trials: Mapping[Trial, str],
    names: Sequence[str],
    model: ir.Model,
    samples: Sequence[Feeds],
    ctx: PassContext,
) -> dict[Trial, float]:
    work = ctx.work(model)
    # Which weights are inputs of the session decides what onnxruntime makes of the others.
    decided_by = repr((names, len(samples), [sorted(_sizes(feeds)) for feeds in samples]))
    losses = {
        trial: kept
        for trial, name in trials.items()
        if (kept := _kept(work, name, trial, decided_by)) is not None
    }
    missing = [trial for trial in trials if trial not in losses]
    for trial, loss in zip(missing, _losses(missing, names, model, samples, ctx), strict=True):
        losses[trial] = loss
        work.keep(trials[trial], f"{trial} {decided_by}", {_LOSS: np.array(loss, np.float64)})
    return losses


def _sizes(feeds: Feeds) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, array.shape) for name, array in feeds.items()]


def _kept(work: Work, name: str, trial: Trial, decided_by: str) -> float | None:
    found = work.recall(name, f"{trial} {decided_by}")
    return None if found is None else float(found[_LOSS])


def _losses(
    trials: Sequence[Trial],
    names: Sequence[str],
    model: ir.Model,
    samples: Sequence[Feeds],
    ctx: PassContext,
) -> Iterator[float]:
    """Of trials, in their order; nothing is run if there are none."""
    if trials:
        # One thread for each run: several runs at a time are what keeps the cores busy.
        sensitivity = WeightSensitivity(model, names, samples, threads=1)
        yield from ctx.map(
            trial_loss, sensitivity, trials, total=len(trials), description="measure sensitivities"
        )


def trial_loss(sensitivity: WeightSensitivity, trial: Trial) -> float:
    """How far the outputs move when these weights are rounded; infinite if they are not finite."""
    return sensitivity.loss({change.weight: _rounded(sensitivity, change) for change in trial})


def _rounded(sensitivity: WeightSensitivity, change: Change) -> Array:
    stored = sensitivity.dense(change.weight).astype(np.float32)
    weight = np.ascontiguousarray(stored.T) if change.transposed else stored
    if not np.isfinite(weight).all():
        raise PassError(
            f"allocate: weight {change.weight!r} holds NaN or infinity",
            hint="export the model again, or leave the layer out with ignore=",
        )
    rounded = round_to_nearest(weight, change.grid).dequantized()
    return rounded.T if change.transposed else rounded


def _finite(group: Group, losses: Mapping[Trial, float], ctx: PassContext) -> Group:
    options = []
    for option in group.options:
        loss = losses.get(_trial(group, option), 0.0)
        if math.isfinite(loss):
            options.append(dataclasses.replace(option, loss=loss))
        else:
            ctx.remark(group.name, f"cannot be {option.candidate.text}: the outputs are not finite")
    if not options:
        raise PassError(
            f"allocate: {group.name}: every candidate makes the outputs infinite",
            hint="add dense to the candidates",
        )
    return dataclasses.replace(group, options=tuple(options))
