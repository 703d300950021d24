"""What each prunable group can become: for every level, the structures that stay and their refitted weights.

The dense model is run once over the calibration data. On the way, the moments of what a group's consumers
read are collected; when all of them are known, the group is pruned through all its levels, its file is
written, and the moments are forgotten. So in memory are the moments of the groups that the run is in the
middle of: one block's, in a transformer.

A group's file appears under its name when it is complete. Its key says what it was computed from (weights,
calibration data, options, levels); a file with another key is written again, and the rest stays, so that an
interrupted run goes on where it was.

While the run goes on, workers prune the groups that were seen: so many as there are workers, and one more,
are held in memory beside those.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ...ir.content_hash import content_hash
from ...ir.files import making
from ...ir.structure import ChannelGroup, Choice, Structure
from ...runtime.calibration import ActivationStream
from ..infrastructure.base import Feeds, PassContext
from .consumers import ConsumerLayer, Moments, find_consumers
from .criteria import Criterion
from .group_levels import Outcome, prune_group, work_on
from .taylor import taylor

Array = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]

_VERSION = 1
"""Of the files and of what is written into them; part of their key."""


@dataclasses.dataclass(frozen=True, eq=False)
class Level:
    """One size of a group.

    Attributes:
        kept: how many structures stay.
        keep: which, ascending.
        error: the mean over the group's consumers of Σ‖Ŵx + b̂ − y‖² / Σ‖y‖², y the dense output, bias
            included; 1 where nothing stays.
    """

    kept: int
    keep: Integers
    error: float


class Database:
    """The levels of all groups; weights are read from files when they are asked for.

    Attributes:
        key: a hash of everything that the levels were computed from.
    """

    def __init__(self, key: str, entries: Mapping[str, _Entry]) -> None:
        self.key = key
        self._entries = entries

    def levels(self, group: str) -> Sequence[Level]:
        """The levels of the group of this name, in the order in which they were asked for."""
        return list(self._entries[group].levels.values())

    def choice(self, group: ChannelGroup, kept: int) -> Choice:
        """The structures that stay at a level, with the weights that consumers then have.

        Args:
            group: one of those that the database was built for.
            kept: one of its levels; not 0, at which there is nothing to choose.

        Raises:
            KeyError: the group has no such level.
        """
        return self._entries[group.name].choice(group, kept)


@dataclasses.dataclass(frozen=True, eq=False)
class _Entry:
    """One group's levels and its file."""

    path: Path
    levels: Mapping[int, Level]
    consumers: Sequence[ConsumerLayer]
    tensors: Mapping[str, ir.TensorProtocol]

    def choice(self, group: ChannelGroup, kept: int) -> Choice:
        level = self.levels[kept]
        weights: dict[str, Array] = {}
        with safe_open(self.path, "numpy") as file:
            stored = set(file.keys())
            for consumer in self.consumers:
                name = _stored_name(kept, consumer.name)
                if name in stored:
                    weights[consumer.name] = self._whole(consumer, level.keep, file.get_tensor(name))
                name = _stored_name(kept, str(consumer.bias))
                if name in stored:
                    dtype = self.tensors[str(consumer.bias)].dtype.numpy()
                    weights[str(consumer.bias)] = file.get_tensor(name).astype(dtype)
        return Choice(group, level.keep, weights)

    def _whole(self, consumer: ConsumerLayer, keep: Integers, columns: Array) -> Array:
        """The refitted columns in the place of the dense ones."""
        dense = np.array(self.tensors[consumer.name].numpy())
        matrix = consumer.matrix(dense)
        matrix[:, consumer.columns[keep].reshape(-1)] = columns.astype(dense.dtype)
        return dense


def build_database(
    model: ir.Model,
    structure: Structure,
    levels: Mapping[str, Sequence[int]],
    *,
    criterion: Criterion,
    damp: float,
    ctx: PassContext,
    folder: Path,
) -> Database:
    """Prune every group on its own through all its levels.

    Args:
        model: dense; not changed.
        structure: of the model.
        levels: by group name, how many structures stay at each level; 0 for none.
        criterion: what decides which structures go; only ``obs`` refits what stays.
        damp: for ``obs``: what is added to the diagonals of covariances, relative to their means.
        ctx: gives the calibration data, and takes remarks.
        folder: where files are kept; made if needed.

    Raises:
        InputError: there is no calibration data.
        PassError: weights or activations are not finite; names them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seed = int(ctx.rng.integers(2**63))
    base = _base_key(model, ctx.calibration, criterion, damp, seed)
    groups = [structure.group(name) for name in levels]
    builder = _Builder(model, criterion, damp, ctx, seed)
    jobs = [_Job(model, group, tuple(levels[group.name]), base, folder) for group in groups]
    waiting = [job for job in jobs if not job.is_done()]
    if waiting:
        builder.build(waiting)
    entries = {job.group.name: job.entry(ctx) for job in jobs}
    return Database(_digest([job.key for job in jobs]), entries)


class _Job:
    """One group that is to be pruned, and where the result goes."""

    def __init__(
        self, model: ir.Model, group: ChannelGroup, counts: tuple[int, ...], base: str, folder: Path
    ) -> None:
        self.group, self.counts = group, counts
        self.consumers, self.remarks = find_consumers(model, group)
        members = [(m.tensor, m.axis, m.role, m.indices.tolist()) for m in group.members]
        self.key = _digest([base, group.name, counts, members])
        self.path = folder / f"{_file_name(group.name)}.safetensors"
        self._model = model

    def is_done(self) -> bool:
        """Whether the file is there, complete and of the same origin."""
        if not self.path.is_file():
            return False
        try:
            with safe_open(self.path, "numpy") as file:
                return bool((file.metadata() or {}).get("key") == self.key)
        except SafetensorError:
            return False

    def write(self, outcome: Outcome) -> None:
        """Write the file under another name, and give it its own when it is complete."""
        arrays: dict[str, Array] = {}
        for snapshot in outcome.snapshots:
            arrays[_stored_name(snapshot.kept)] = snapshot.keep
            for name, values in snapshot.weights.items():
                arrays[_stored_name(snapshot.kept, name)] = np.ascontiguousarray(values)
        about = {
            "key": self.key,
            "errors": json.dumps({snapshot.kept: snapshot.error for snapshot in outcome.snapshots}),
            "remarks": json.dumps([*self.remarks, *outcome.remarks]),
        }
        with making(self.path) as (partial,):
            save_file(arrays, partial, about)

    def entry(self, ctx: PassContext) -> _Entry:
        """The levels from the file; what was remarked when they were computed is said again."""
        with safe_open(self.path, "numpy") as file:
            about = file.metadata()
            errors = json.loads(about["errors"])
            levels = {
                count: Level(count, file.get_tensor(_stored_name(count)), errors[str(count)])
                for count in self.counts
            }
        for text in json.loads(about["remarks"]):
            ctx.remark(self.group.name, text)
        names = {name for consumer in self.consumers for name in (consumer.name, consumer.bias) if name}
        tensors = {name: self._model.graph.initializers[name].const_value for name in names}
        return _Entry(
            self.path,
            levels,
            self.consumers,
            {name: tensor for name, tensor in tensors.items() if tensor is not None},
        )


class _Builder:
    """Runs the model once and prunes each group when its consumers' inputs were seen."""

    def __init__(
        self, model: ir.Model, criterion: Criterion, damp: float, ctx: PassContext, seed: int
    ) -> None:
        self._model, self._criterion, self._damp = model, criterion, damp
        self._ctx, self._seed = ctx, seed

    def build(self, jobs: Sequence[_Job]) -> None:
        """Prune all groups, in the order in which the run reaches their last consumers."""
        scores: Mapping[str, npt.NDArray[np.float64]] = {}
        stream = self._ctx.activation_stream(self._model)
        if self._criterion == "taylor":
            scores = taylor(
                self._model, [job.group for job in jobs], self._ctx.calibration, self._ctx, self._seed
            )
        positions = _positions(self._model)
        collector = _Collector(jobs, stream, positions, self._seed)
        ordered = collector.ordered
        works = (
            work_on(
                self._model,
                job.group,
                job.counts,
                collector.collect(job),
                criterion=self._criterion,
                scores=scores.get(job.group.name),
                seed=self._seed,
            )
            for job in ordered
        )
        outcomes = self._ctx.map(
            prune_group, self._damp, works, total=len(ordered), description="prune each group"
        )
        for job, outcome in zip(ordered, outcomes, strict=True):
            job.write(outcome)


class _Collector:
    """Moves along the model and collects the moments that groups which are still to come need."""

    def __init__(
        self, jobs: Sequence[_Job], stream: ActivationStream, positions: Mapping[str, int], seed: int
    ) -> None:
        self._stream, self._positions, self._seed = stream, positions, seed
        self.ordered = sorted(jobs, key=self._last)
        self._values = sorted({name for job in jobs for name in _inputs(job)}, key=self._position)
        self._moments: dict[tuple[object, ...], Moments] = {}

    def collect(self, job: _Job) -> list[tuple[ConsumerLayer, Any]]:
        """Run on until all that the group reads was seen; its consumers with the moments of their inputs."""
        while self._values and self._position(self._values[0]) <= self._last(job):
            self._observe(self._values.pop(0))
        collected = [(consumer, self._moments[consumer.source].finished()) for consumer in job.consumers]
        self.ordered = [other for other in self.ordered if other is not job]
        needed = {consumer.source for other in self.ordered for consumer in other.consumers}
        self._moments = {source: found for source, found in self._moments.items() if source in needed}
        return collected

    def _observe(self, value: str) -> None:
        readers = {
            consumer.source: consumer
            for job in self.ordered
            for consumer in job.consumers
            if value in consumer.inputs
        }
        for source, consumer in readers.items():
            if source not in self._moments:
                self._moments[source] = Moments(consumer, len(self._stream), self._seed)
        for tap in self._stream.advance([value]):
            for source in readers:
                self._moments[source].update(tap, value)

    def _position(self, value: str) -> tuple[int, str]:
        return self._positions[value], value

    def _last(self, job: _Job) -> tuple[int, str]:
        return max((self._position(name) for name in _inputs(job)), default=(-1, ""))


def _inputs(job: _Job) -> set[str]:
    return {name for consumer in job.consumers for name in consumer.inputs}


def _positions(model: ir.Model) -> dict[str, int]:
    """Where in the graph's order each value is known."""
    positions = {str(value.name): -1 for value in model.graph.inputs}
    for index, node in enumerate(model.graph):
        positions |= {str(value.name): index for value in node.outputs}
    return positions


def _base_key(model: ir.Model, calibration: Sequence[Feeds], criterion: str, damp: float, seed: int) -> str:
    """A hash of what all groups are computed from."""
    digest = hashlib.sha256()
    for node in model.graph:
        digest.update(ir.to_proto(node).SerializeToString(deterministic=True))
    for feeds in calibration:
        for name in sorted(feeds):
            array = np.ascontiguousarray(feeds[name])
            digest.update(f"{name}:{array.dtype}:{array.shape};".encode())
            digest.update(array.tobytes())
    return _digest([_VERSION, content_hash(model), digest.hexdigest(), criterion, damp, seed])


def _digest(parts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _stored_name(kept: int, weight: str = "") -> str:
    """Of a weight at a level; without a weight, of the structures that stay."""
    return f"{kept}:{weight}"


def _file_name(group: str) -> str:
    """Readable, and different for different names."""
    readable = re.sub(r"[^\w.-]", "_", group)
    return readable if readable == group else f"{readable}-{_digest([group])[:8]}"
