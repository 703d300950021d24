"""One group through all its levels: which structures stay, what its consumers become, and the error."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...ir.structure import ChannelGroup
from .consumers import ConsumerLayer, ObservedConsumer, observed
from .criteria import Criterion, magnitude, wanda
from .obs import Doubles, Integers, Refit, Removal, refits, removal, removal_errors

Array = npt.NDArray[Any]
Moments = tuple[Doubles, Doubles]


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """A group at one level.

    Attributes:
        kept: how many structures stay.
        keep: which, ascending.
        error: relative squared error of its consumers' outputs, the mean over them.
        weights: by tensor name: of consumers, [out, kept · width], their columns of the structures that stay
            in order; of biases, [out]. Nothing where they are as in the dense model.
    """

    kept: int
    keep: Integers
    error: float
    weights: Mapping[str, Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """All levels, in the order in which they were asked for, and what there is to say about them."""

    snapshots: Sequence[Snapshot]
    remarks: Sequence[str]


@dataclasses.dataclass(frozen=True, eq=False)
class GroupWork:
    """All that pruning one group needs, in arrays: workers are sent it.

    Attributes:
        name: of the group.
        structures: that it has.
        counts: how many stay at each level.
        consumers: with the moments of their inputs.
        scores: [structures], by which they go, and what stays keeps its weights; None where they go by what
            they cost, and what stays is refitted.
        remarks: what there is to say so far.
    """

    name: str
    structures: int
    counts: Sequence[int]
    consumers: Sequence[ObservedConsumer]
    scores: Doubles | None
    remarks: Sequence[str] = ()


def work_on(
    model: ir.Model,
    group: ChannelGroup,
    counts: Sequence[int],
    moments: Sequence[tuple[ConsumerLayer, Moments]],
    *,
    criterion: Criterion,
    scores: Doubles | None,
    seed: int,
) -> GroupWork:
    """What there is to do for one group.

    Args:
        model: dense; not changed.
        group: of the model.
        counts: how many structures stay at each level.
        moments: the group's consumers with the mean of their inputs and the covariance about it.
        criterion: what decides which structures go.
        scores: [structures], where the criterion is one that was computed before.
        seed: of random scores, with the group's name.
    """
    consumers = [observed(model, layer, of_inputs) for layer, of_inputs in moments]
    remarks = []
    if not consumers:
        criterion = "magnitude" if criterion in ("obs", "wanda", "taylor") else criterion
        remarks.append(
            f"no layer that reads its structures can be observed: {criterion} decides, and errors are shares "
            "of the scores"
        )
    if criterion == "obs":
        scores = None
    elif criterion == "magnitude":
        scores = magnitude(model, group)
    elif criterion == "wanda":
        scores = wanda(consumers)
    elif criterion == "random":
        scores = np.random.default_rng([seed, zlib.crc32(group.name.encode())]).random(group.structures)
    return GroupWork(group.name, group.structures, counts, consumers, scores, remarks)


def prune_group(damp: float, work: GroupWork) -> Outcome:
    """Prune one group through all its levels; ``damp`` is for refits."""
    if work.scores is None:
        return _refitted(work, damp)
    return Outcome(_as_they_are(work.counts, work.consumers, work.scores), work.remarks)


def _as_they_are(
    counts: Sequence[int], consumers: Sequence[ObservedConsumer], scores: Doubles
) -> list[Snapshot]:
    """Structures go by their scores, and what stays keeps its weights."""
    removed = np.argsort(scores, kind="stable")
    relative = [removal_errors(consumer.as_is(), removed) / consumer.energy for consumer in consumers]
    if not relative:
        total = scores.sum() or 1.0
        relative = [np.concatenate([[0.0], np.cumsum(scores[removed])]) / total]
    errors = np.mean(relative, axis=0)
    return [
        Snapshot(
            count, np.sort(removed[len(removed) - count :]), _error(errors[len(removed) - count], count), {}
        )
        for count in counts
    ]


def _error(error: float, count: int) -> float:
    return float(error) if count else 1.0


def _refitted(work: GroupWork, damp: float) -> Outcome:
    """Structures go by what they cost, and what stays is refitted."""
    counts, consumers, structures = work.counts, work.consumers, work.structures
    partial = sorted(count for count in counts if 0 < count < structures)
    snapshots = {
        structures: Snapshot(structures, np.arange(structures), 0.0, {}),
        0: Snapshot(0, np.zeros(0, np.int64), 1.0, {}),
    }
    remarks: list[str] = []
    if partial:
        matrices = [consumer.refitted() for consumer in consumers]
        order = removal(matrices, partial[0], damp=damp)
        remarks = list(_fallbacks(consumers, order, damp))
        levels = [refits(matrix, order, partial, index=index) for index, matrix in enumerate(matrices)]
        for refitted in zip(*levels, strict=True):
            snapshot = _snapshot(consumers, refitted)
            snapshots[snapshot.kept] = snapshot
    return Outcome([snapshots[count] for count in counts], remarks)


def _snapshot(consumers: Sequence[ObservedConsumer], refitted: Sequence[Refit]) -> Snapshot:
    weights: dict[str, Array] = {}
    for consumer, refit in zip(consumers, refitted, strict=True):
        weights[consumer.name] = refit.weight.astype(consumer.stored_type)
        if consumer.bias_name is not None and consumer.bias is not None:
            kept = consumer.columns[refit.keep].reshape(-1)
            lost = consumer.weight @ consumer.mean - refit.weight @ consumer.mean[kept]
            weights[consumer.bias_name] = consumer.bias + lost
    errors = [refit.error / consumer.energy for consumer, refit in zip(consumers, refitted, strict=True)]
    keep = refitted[0].keep
    return Snapshot(len(keep), keep, float(np.mean(errors)), weights)


def _fallbacks(consumers: Sequence[ObservedConsumer], order: Removal, damp: float) -> Iterator[str]:
    for consumer, used, indefinite in zip(consumers, order.damp, order.indefinite, strict=True):
        if indefinite:
            yield f"{consumer.name}: only the positive part of its inputs' covariance was used"
        if used != damp:
            yield (
                f"{consumer.name}: its inputs' covariance cannot be inverted with damp={damp:g}; "
                f"damp={used:g} was used"
            )
