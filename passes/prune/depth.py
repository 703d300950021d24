"""What depth pruning drops: residual modules, alone or those of a layer together; and in which order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence

import onnx_ir as ir

from ...ir import clone
from ...ir.errors import InputError
from ...ir.structure import ResidualModule, drop, layers_of
from ...ir.walk import all_values


@dataclasses.dataclass(frozen=True, eq=False)
class DepthUnit:
    """Modules that are dropped together.

    Attributes:
        name: of the module, or of the first and last.
        modules: in the order of the graph.
        layer: which layer they belong to, from 0.
        weights: how many numbers only they read.
        spans: names of the values of the stream before and after. Several of them, where something between
            the modules gives the stream another shape.
    """

    name: str
    modules: tuple[ResidualModule, ...]
    layer: int
    weights: int
    spans: tuple[tuple[str, str], ...]


def depth_units(
    model: ir.Model, modules: Sequence[ResidualModule], wanted: Collection[ResidualModule], *, by_layer: bool
) -> list[DepthUnit]:
    """The units that can be dropped, in the order of the graph.

    Args:
        model: that the modules were found in.
        modules: all of them, in the order of the graph; layers are counted along them.
        wanted: those that may go.
        by_layer: those of a layer go together.
    """
    weights = module_weights(model, modules)
    units = []
    for number, layer in enumerate(layers_of(modules)):
        left = [module for module in layer if module in wanted]
        for group in [left] if by_layer and left else [[module] for module in left]:
            names = dict.fromkeys((group[0].name, group[-1].name))
            size = sum(weights[module.name] for module in group)
            spans = _spans(model, group)
            units.append(DepthUnit(" to ".join(names), tuple(group), number, size, spans))
    return units


def _spans(model: ir.Model, modules: Sequence[ResidualModule]) -> tuple[tuple[str, str], ...]:
    """From the first module to the last one, or to where the stream's shape changes between two."""
    names = {name for module in modules for name in (module.input, module.output)}
    shapes = {value.name: value.shape for value in all_values(model) if value.name in names}
    spans: list[tuple[str, str]] = []
    for module in modules:
        if spans and shapes[spans[-1][1]] == shapes[module.input]:
            spans[-1] = (spans[-1][0], module.output)
        else:
            spans.append((module.input, module.output))
    return tuple(spans)


def module_weights(model: ir.Model, modules: Sequence[ResidualModule]) -> dict[str, int]:
    """How many numbers the float weights hold that only one module reads, by its name."""
    owner = {name: module.name for module in modules for name in module.nodes}
    sizes = dict.fromkeys((module.name for module in modules), 0)
    for value in model.graph.initializers.values():
        readers = {owner.get(str(use.node.outputs[0].name)) for use in value.uses()}
        constant = value.const_value
        if len(readers) == 1 and constant is not None and constant.dtype.is_floating_point():
            (reader,) = readers
            if reader is not None:
                sizes[reader] += constant.size
    return sizes


@dataclasses.dataclass(frozen=True)
class Kept:
    """A module that cannot go if all others do, and why."""

    module: ResidualModule
    reason: str


def must_stay(model: ir.Model, modules: Sequence[ResidualModule]) -> Kept | None:
    """The first attention, if the model cannot do without all of these modules; None if it can.

    A decoder that counts its positions from the length of a cache needs one attention with a cache.
    """
    try:
        drop(clone(model), modules)
    except InputError as error:
        first = next((module for module in modules if module.kind == "attention"), None)
        if first is None:
            raise
        return Kept(first, error.message)
    return None


@dataclasses.dataclass(frozen=True)
class Removal:
    """A unit and what its place in the order comes from: its entropy gain, or the loss without it."""

    unit: DepthUnit
    score: float


Ranking = Callable[[Sequence[DepthUnit], Sequence[DepthUnit]], Iterator[Removal]]
"""Some units in the order in which they go, given those that went before."""


class RemovalOrder:
    """In which order units go; found only as far as it is asked for.

    Args:
        units: all of them.
        protected: those that go after all others.
        ranked: the order among those that are protected, and among the others.
    """

    def __init__(self, units: Sequence[DepthUnit], protected: Collection[DepthUnit], ranked: Ranking) -> None:
        self.units = tuple(units)
        self._protected = frozenset(protected)
        self._ranked = ranked
        self._source = self._in_turn()
        self._found: list[Removal] = []

    def first(self, count: int) -> list[Removal]:
        """The first ``count`` that go."""
        while len(self._found) < count:
            self._found.append(next(self._source))
        return self._found[:count]

    def is_protected(self, unit: DepthUnit) -> bool:
        """Whether the unit only goes where the target cannot be reached otherwise."""
        return unit in self._protected

    def _in_turn(self) -> Iterator[Removal]:
        free = [unit for unit in self.units if unit not in self._protected]
        yield from self._ranked(free, [])
        yield from self._ranked([unit for unit in self.units if unit in self._protected], free)


def fewest_reaching(target: float, most: int, speedup: Callable[[int], float]) -> tuple[int | None, float]:
    """The fewest removals that reach a speed-up, and the speed-up then; found by bisection.

    Args:
        target: the speed-up to reach.
        most: how many can be removed.
        speedup: as measured after some number of removals, growing.

    Returns:
        None, and the speed-up after all removals, if that does not reach the target.
    """
    reached = speedup(most)
    if reached < target:
        return None, reached
    low, high = -1, most
    while high - low > 1:
        middle = (low + high) // 2
        found = speedup(middle)
        if found >= target:
            high, reached = middle, found
        else:
            low = middle
    return high, reached
