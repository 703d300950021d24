"""What each group of channels costs at each of its sizes, measured on the target: what pruning searches over.

    seconds of the model ≈ total − Σ_g seconds[g][dense] + Σ_g seconds[g][kept_g]

For a group that has a residual module to itself, its time is that of the module, so that nothing is left of
it at level 0; for another group, that of the nodes that shrink with it. A node that shrinks with two groups,
such as a convolution between two others, counts for both.

The sum predicts, and a measurement of the whole model decides: a piece that runs by itself has its weights in
the cache, and onnxruntime cannot fuse it with its neighbours. Method: the latency table of ZipLM
(arXiv:2302.04089), whose pieces are attention and feed-forward modules.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import onnx_ir as ir
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..codegen.machine import fingerprint
from ..codegen.target import Target
from ..ir import clone
from ..ir.errors import InputError
from ..ir.files import write_whole
from ..ir.structure import ChannelGroup, Structure
from .calibration.data import Feeds
from .end_to_end import end_to_end_latency, fitted_feeds, open_bound, threads_of
from .latency_bench import RUNTIME, Bench, Timer, interleaved, target_text
from .latency_feeds import deployment_feeds
from .latency_pieces import Piece, extract, group_nodes, own_module

__all__ = ["LatencyTable", "deployment_feeds", "end_to_end_latency", "measure_latency_table"]

T = TypeVar("T")
_FORMAT = 1
_DROPPED = 0


class Progress(Protocol):
    """Wraps a loop to show how far it is."""

    def __call__(self, items: Sequence[T], description: str, /) -> Iterator[T]:
        """Iterate over ``items``."""


def _silent(items: Sequence[T], description: str, /) -> Iterator[T]:
    del description
    return iter(items)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Seconds of every group at every level, and what they hold for.

    Attributes:
        target: with its options, as text.
        machine: fingerprint of the machine that was measured on.
        runtime: name and version.
        threads: within an op; None for the runtime's choice.
        batch: samples of a call.
        sequence: tokens of a sample.
        deployed_with: text of the pipeline that models go through before they run.
        total: seconds of the whole dense model.
        seconds: by group name, then by structures kept; at 0 the group's residual module is dropped.
    """

    target: str
    machine: str
    runtime: str
    threads: int | None
    batch: int
    sequence: int
    deployed_with: str
    total: float
    seconds: Mapping[str, Mapping[int, float]]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON; the file appears whole or not at all.

        Raises:
            InputError: the file cannot be written.
        """
        content = {"planish_latency_table": _FORMAT, **dataclasses.asdict(self)}
        try:
            write_whole(Path(path), json.dumps(content, indent=1))
        except OSError as error:
            raise InputError(f"latency table {path}: cannot be written: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read a table that `save` wrote.

        Raises:
            InputError: there is no such file, or it is no latency table, damaged, or of another format.
        """
        try:
            content = json.loads(Path(path).read_text())
        except OSError as error:
            raise InputError(f"latency table {path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise _damaged(path, f"it is no JSON ({error})") from error
        if not isinstance(content, dict) or content.pop("planish_latency_table", None) != _FORMAT:
            raise _damaged(path, f"it does not begin with planish_latency_table: {_FORMAT}")
        return cls(**_checked(path, content))

    def check(
        self,
        *,
        target: Target,
        batch: int,
        sequence: int,
        deployed_with: str,
        levels: Mapping[str, Sequence[int]],
        force: bool = False,
    ) -> None:
        """Refuse a table that was measured for something else, or that lacks a level.

        Args:
            target: where the model will run, on this machine and with this runtime.
            batch: samples of a call.
            sequence: tokens of a sample.
            deployed_with: text of the pipeline.
            levels: structures kept that must be there, by group name.
            force: accept times of another machine, target, runtime or size; levels must be there anyway.

        Raises:
            InputError: says all differences, or the first level that is missing.
        """
        wanted = {
            "machine": (self.machine, fingerprint()),
            "target": (self.target, target_text(target)),
            "runtime": (self.runtime, RUNTIME),
            "threads": (self.threads, threads_of(target)),
            "batch": (self.batch, batch),
            "sequence": (self.sequence, sequence),
            "deployed_with": (self.deployed_with, deployed_with),
        }
        different = [
            f"{name} {found!r} instead of {expected!r}"
            for name, (found, expected) in wanted.items()
            if found != expected
        ]
        if different and not force:
            raise InputError(
                f"the latency table was measured for {', '.join(different)}",
                hint="measure it again here, or force its use",
            )
        for name, counts in levels.items():
            missing = sorted(set(counts) - set(self.seconds.get(name, {})), reverse=True)
            if missing:
                raise InputError(
                    f"the latency table lacks group {name!r} with {missing[0]} structures kept"
                    + (f" and {len(missing) - 1} more levels" if missing[1:] else ""),
                    hint="measure it again for this model and these levels",
                )

    def __rich__(self) -> Table:
        """One row per level; groups with the same times share their rows."""
        table = Table(title=Text(self._title()))
        table.add_column("group", overflow="fold")
        for column in ("kept", "ms", "of dense", "speed-up"):
            table.add_column(column, justify="right")
        for names, seconds in self._alike():
            others = f" (and {len(names) - 1} alike)" if names[1:] else ""
            dense = seconds[max(seconds)]
            for index, kept in enumerate(sorted(seconds, reverse=True)):
                share = seconds[kept] / dense if dense else 0.0
                table.add_row(
                    Text("" if index else names[0] + others),
                    str(kept) if kept != _DROPPED else "dropped",
                    f"{seconds[kept] * 1e3:.4f}",
                    f"{share:.1%}",
                    f"{1 / share:.2f}x" if share else "",
                    end_section=index == len(seconds) - 1,
                )
        return table

    def __str__(self) -> str:
        """The same table as text."""
        text = io.StringIO()
        Console(file=text, width=100).print(self)
        return text.getvalue()

    def _title(self) -> str:
        dense = sum(row[max(row)] for row in self.seconds.values())
        return (
            f"{self.target} on {self.machine}, {self.runtime}, batch {self.batch}, sequence {self.sequence}: "
            f"{self.total * 1e3:.2f} ms in all, {dense * 1e3:.2f} ms in {len(self.seconds)} groups"
        )

    def _alike(self) -> list[tuple[list[str], Mapping[int, float]]]:
        groups: dict[tuple[tuple[int, float], ...], list[str]] = {}
        for name, seconds in self.seconds.items():
            groups.setdefault(tuple(sorted(seconds.items())), []).append(name)
        return [(names, dict(key)) for key, names in groups.items()]


def measure_latency_table(
    model: ir.Model,
    structure: Structure,
    levels: Mapping[str, Sequence[int]],
    *,
    target: Target,
    feeds: Feeds,
    batch: int,
    sequence: int,
    deployed_with: str,
    prepare: Callable[[ir.Model], None],
    progress: Progress = _silent,
    timer: Timer = interleaved,
) -> LatencyTable:
    """Time every group of a dense model at every level, as the target will run it.

    Pieces that are alike but for names and weights are timed once, and levels that were timed before are read
    from the cache on disk. One piece is open at a time. Other work on the machine falsifies the times.

    Args:
        model: dense and canonical; not changed.
        structure: of ``model``.
        levels: structures kept, by group name; the dense level is added, 0 means that the module is dropped.
        target: what pieces are bound to.
        feeds: inputs of the deployment (`deployment_feeds`).
        batch: of ``feeds``, for the record.
        sequence: of ``feeds``, for the record.
        deployed_with: text of what ``prepare`` does, for the record.
        prepare: the passes that come after pruning, in place; also run on single pieces.
        progress: wraps the loop over distinct pieces.
        timer: times calls against each other; ``steady_ms`` of each counts.

    Raises:
        InputError: a level is not possible, or ``feeds`` do not fit.
        TargetError: the target cannot run the model.
    """
    groups = [structure.group(name) for name in levels]
    counts = {group.name: _checked_counts(structure, group, levels[group.name]) for group in groups}
    pieces = extract(model, {group.name: group_nodes(structure, group) for group in groups}, feeds)
    bench = Bench(target, prepare, timer)
    alike = _grouped(groups, pieces, counts)
    seconds: dict[str, dict[int, float]] = {}
    for names in progress(alike, "time pieces of the model"):
        name = names[0]
        timed = [count for count in counts[name] if count != _DROPPED]
        times = bench.seconds(pieces[name], structure.group(name), timed)
        for other in names:
            seconds[other] = {count: times.get(count, 0.0) for count in counts[other]}
    return LatencyTable(
        target=target_text(target),
        machine=fingerprint(),
        runtime=RUNTIME,
        threads=threads_of(target),
        batch=batch,
        sequence=sequence,
        deployed_with=deployed_with,
        total=_total(model, target, feeds, prepare, timer),
        seconds={group.name: seconds[group.name] for group in groups},
    )


def _total(
    model: ir.Model, target: Target, feeds: Feeds, prepare: Callable[[ir.Model], None], timer: Timer
) -> float:
    copy = clone(model)
    prepare(copy)
    run = open_bound(copy, target).repeatable(fitted_feeds(copy, feeds))
    return timer({"dense": run})["dense"].steady_ms / 1e3


def _checked_counts(structure: Structure, group: ChannelGroup, counts: Sequence[int]) -> list[int]:
    """Falling, the dense level first."""
    wrong = next((count for count in counts if not 0 <= count <= group.structures), None)
    if wrong is not None:
        raise InputError(
            f"latency table: {wrong} structures of group {group.name!r} cannot be kept, "
            f"it has {group.structures}"
        )
    if _DROPPED in counts and own_module(structure, group) is None:
        raise InputError(
            f"latency table: group {group.name!r} has no residual module to itself that could be dropped",
            hint="leave out its level 0",
        )
    return sorted({group.structures, *map(int, counts)}, reverse=True)


def _grouped(
    groups: Sequence[ChannelGroup], pieces: Mapping[str, Piece], counts: Mapping[str, Sequence[int]]
) -> list[list[str]]:
    """Names of groups whose pieces take the same time at the same levels."""
    alike: dict[object, list[str]] = {}
    for group in groups:
        tensors = list(pieces[group.name].model.graph.initializers)
        members = tuple(
            (tensors.index(member.tensor), member.axis, member.indices.shape)
            for member in group.members
            if member.tensor in tensors
        )
        key = (pieces[group.name].signature(), members, tuple(counts[group.name]))
        alike.setdefault(key, []).append(group.name)
    return list(alike.values())


def _damaged(path: str | os.PathLike[str], why: str) -> InputError:
    return InputError(f"{path}: not a latency table of this version: {why}", hint="measure it again")


def _checked(path: str | os.PathLike[str], content: dict[str, Any]) -> dict[str, Any]:
    """The fields, with levels as numbers."""
    types = {
        "target": str,
        "machine": str,
        "runtime": str,
        "threads": int | None,
        "batch": int,
        "sequence": int,
        "deployed_with": str,
        "total": int | float,
        "seconds": dict,
    }
    if sorted(content) != sorted(types):
        raise _damaged(path, f"expected the fields {sorted(types)}, found {sorted(content)}")
    for name, wanted in types.items():
        if not isinstance(content[name], wanted) or isinstance(content[name], bool):
            raise _damaged(path, f"{name} is {content[name]!r}")
    try:
        seconds = {
            str(group): {int(kept): float(time) for kept, time in row.items()}
            for group, row in content["seconds"].items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise _damaged(path, f"seconds: {error}") from error
    times = [content["total"], *(time for row in seconds.values() for time in row.values())]
    if not all(math.isfinite(time) and time >= 0 for time in times) or not all(seconds.values()):
        raise _damaged(path, "times must be finite numbers of seconds, and every group needs one")
    return {**content, "seconds": seconds}
