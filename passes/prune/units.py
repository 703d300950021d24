"""What `prune` chooses a level for: one unit for each prunable group, and the shapes that a choice leads to.

A unit's levels are numbers of structures that stay, from all of them (dense) downwards; 0, the last level,
stands for the whole residual module that the group lies in: the branch is dropped and x + f(x) becomes x.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...ir.structure import ChannelGroup, Choice, ResidualModule, Structure, drop, shrink
from ..infrastructure.base import Skipped
from .levels import level_counts

DROPPED = 0
"""The level at which nothing of a unit's module is left."""


@dataclasses.dataclass(frozen=True, eq=False)
class Unit:
    """One group and its levels.

    Attributes:
        group: whose structures go.
        module: what is dropped at level 0; None where that level is not among ``counts``.
        counts: structures that stay at each level, falling; the first is all of them.
    """

    group: ChannelGroup
    module: ResidualModule | None
    counts: tuple[int, ...]

    @property
    def name(self) -> str:
        """The group's name."""
        return self.group.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """Which levels a group of some kind and size has.

    Attributes:
        factor: each level of channels keeps this share of the level before; heads go one by one.
        smallest: the least share of a group's channels that is a level.
        multiple: numbers of channels that stay are multiples of this.
        drops_modules: whole modules may go.
    """

    factor: float
    smallest: float
    multiple: int
    drops_modules: bool

    def unit(self, group: ChannelGroup, structure: Structure) -> Unit:
        """The group with its levels."""
        counts = level_counts(
            group.structures,
            kind=group.kind,
            factor=self.factor,
            smallest=self.smallest,
            multiple=self.multiple,
        )
        module = _own_module(group, structure) if self.drops_modules else None
        return Unit(group, module, (*counts, DROPPED) if module is not None else tuple(counts))


def _own_module(group: ChannelGroup, structure: Structure) -> ResidualModule | None:
    """The module that this group alone fills; where several share one, none drops it alone."""
    return next((module for module in structure.modules if module.groups == (group.name,)), None)


def select_units(
    structure: Structure,
    grid: Grid,
    kinds: Collection[str],
    refusal: Callable[[str], str | None],
) -> tuple[list[Unit], list[Skipped]]:
    """The units among a model's groups, and why the other groups are none.

    Args:
        structure: of the model.
        grid: their levels.
        kinds: kinds of groups that are wanted.
        refusal: why a group of some name is not wanted; None if it is.
    """
    units: list[Unit] = []
    skipped = [Skipped(entry.name, entry.reason) for entry in structure.unprunable]
    for group in structure.groups:
        reason = refusal(group.name)
        if reason is None and group.kind not in kinds:
            reason = f"its kind {group.kind!r} is not among the structures asked for"
        unit = grid.unit(group, structure)
        if reason is None and len(unit.counts) < 2:
            reason = f"its {group.structures} structures leave no level to choose"
        if reason is None:
            units.append(unit)
        else:
            skipped.append(Skipped(group.name, reason))
    return units, skipped


def weights_at_levels(model: ir.Model, unit: Unit) -> npt.NDArray[np.float64]:
    """[levels]: how many numbers the unit's tensors hold at each level, all other groups dense."""
    gone = 1.0 - np.asarray(unit.counts) / unit.group.structures
    left: dict[str, npt.NDArray[np.float64]] = {}
    for member in unit.group.members:
        shape = _shape(model, member.tensor)
        dense = left.get(member.tensor, np.full(len(gone), float(math.prod(shape))))
        left[member.tensor] = dense * (1.0 - gone * member.indices.size / shape[member.axis])
    total: npt.NDArray[np.float64] = np.sum(list(left.values()), axis=0)
    return total


def _shape(model: ir.Model, tensor: str) -> tuple[int, ...]:
    constant = model.graph.initializers[tensor].const_value
    assert constant is not None
    return constant.numpy().shape


def apply_shapes(model: ir.Model, units: Sequence[Unit], levels: Sequence[int]) -> None:
    """Give ``model`` the shapes of a choice with the first structures of each unit: for timing only."""
    choices = [
        Choice(unit.group, np.arange(unit.counts[level]), {})
        for unit, level in zip(units, levels, strict=True)
        if level and unit.counts[level] != DROPPED
    ]
    shrink(model, choices)
    drop(model, dropped_modules(units, levels))


def describe(units: Sequence[Unit], levels: Sequence[int]) -> str:
    """What stays of each unit: ``12,1376,0``."""
    return ",".join(str(unit.counts[level]) for unit, level in zip(units, levels, strict=True))


def dropped_modules(units: Sequence[Unit], levels: Sequence[int]) -> list[ResidualModule]:
    """The modules that a choice drops."""
    return [
        unit.module
        for unit, level in zip(units, levels, strict=True)
        if unit.module is not None and unit.counts[level] == DROPPED
    ]
