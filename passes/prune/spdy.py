"""Which level of pruning each unit gets, so that all units together keep a budget of time.

    minimise loss(s)   subject to   Σ_l t[l, s_l] ≤ T

over one level s_l for each unit l, where only t is a sum over units. The loss is searched through the
solutions of the problem that adds up,

    minimise Σ_l c_l · p[l, s_l]   subject to   Σ_l t[l, s_l] ≤ T

with p the error of each level in its own layer: the coefficients c say how much the units matter, each c
gives one choice, and the search mutates the c of the choice that lost least. The solutions come from a
dynamic programme over time buckets. What no coefficients can say, such as that one level of a unit is better
than its error says, is found in the second half of the search: it takes the best choice, and moves time from
some units to another.

The programme and the coefficient search are SPDY's (Frantar and Alistarh, 2022), for structures as in ZipLM
(Kurtic, Frantar and Alistarh, 2023); the exchange of levels is an addition.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Progress = Callable[[Sequence[int], str], Iterator[int]]

_COEFFICIENTS_SHARE = 0.5
"""Of the evaluations, how many are of solutions for coefficients; the others exchange levels."""
_RANDOM_SHARE = 0.1
"""Of the evaluations, how many are of random coefficients, before those of mutated ones."""
_MUTATED_SHARE = 0.1
"""Of the coefficients, how many are mutated at once."""
_MOST_RANKS = 3
"""By how many levels one unit gets slower in an exchange."""
_MOST_REPEATS = 50
"""Where so many proposals of one kind in a row were all seen before, the other kind's turn comes; and where
those were seen too, the search ends."""


def solve(
    errors: Sequence[npt.NDArray[Any]],
    seconds: Sequence[npt.NDArray[Any]],
    budget: float,
    *,
    buckets: int = 10_000,
) -> list[int] | None:
    """One level for each unit, with the least total error among those whose total time keeps the budget.

    A unit's time counts from that of its fastest level, so that the fastest choice is exact, and is rounded
    up to whole buckets of what the budget leaves over, so that the true time keeps the budget. The error is
    at most the least one within a budget that is smaller by one bucket for each unit.

    Args:
        errors: [levels] of each unit, not negative.
        seconds: [levels] of each unit.
        budget: the largest total of seconds.
        buckets: how finely time is divided.

    Returns:
        The index of the level of each unit; None if even the fastest levels take longer than the budget.
    """
    steps = _steps(seconds, budget, buckets)
    if steps is None:
        return None
    # least[l][t]: the least error of the first l units within t buckets.
    least = np.full((len(errors) + 1, buckets + 1), np.inf)
    least[0] = 0.0
    for before, after, error, step in zip(least, least[1:], errors, steps, strict=False):
        for level in np.flatnonzero(step <= buckets):
            taken = int(step[level])
            np.minimum(after[taken:], before[: buckets + 1 - taken] + error[level], out=after[taken:])
    left = buckets
    choice: list[int] = []
    for before, error, step in zip(least[-2::-1], reversed(errors), reversed(steps), strict=True):
        possible = np.flatnonzero(step <= left)
        best = int(possible[np.argmin(before[left - step[possible]] + error[possible])])
        choice.append(best)
        left -= int(step[best])
    return choice[::-1]


def _steps(
    seconds: Sequence[npt.NDArray[Any]], budget: float, buckets: int
) -> list[npt.NDArray[np.int64]] | None:
    """[levels] of each unit: buckets above its fastest level, more than ``buckets`` where it cannot be."""
    above = [np.asarray(times, np.float64) - np.min(times) for times in seconds]
    spare = budget - float(sum(np.min(times) for times in seconds))
    # A budget that is the sum of the fastest times, added in another order, may differ in its last bits.
    if spare < -1e-12 * abs(budget):
        return None
    # Beyond twice what the slowest levels take, all fit however they are rounded.
    spare = min(max(spare, 0.0), 2.0 * float(sum(times.max() for times in above)))
    width = spare / buckets if spare else np.inf
    # Clipped before the division: a time may be too many buckets for an integer.
    return [
        np.where(times <= spare, np.ceil(np.minimum(times, spare) / width), buckets + 1).astype(np.int64)
        for times in above
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """The choice that lost least.

    Attributes:
        choice: the index of the level of each unit.
        coefficients: [units] what the error of each unit was multiplied by where the choice, or the one that
            it was exchanged from, came up.
        loss: the fitness of the choice.
        evaluations: different choices that were looked at.
    """

    choice: tuple[int, ...]
    coefficients: Doubles
    loss: float
    evaluations: int


def _no_progress(items: Sequence[int], description: str) -> Iterator[int]:
    return iter(items)


def search(
    errors: Sequence[npt.NDArray[Any]],
    seconds: Sequence[npt.NDArray[Any]],
    budget: float,
    fitness: Callable[[Sequence[int]], float],
    *,
    evaluations: int,
    rng: np.random.Generator,
    start: npt.NDArray[Any] | None = None,
    near: Sequence[int] | None = None,
    progress: Progress = _no_progress,
) -> Found | None:
    """The best choice within the budget that ``evaluations`` different choices show.

    The same arguments and generator ask for the same choices in the same order: a search that was interrupted
    goes on where it was if it is run again with a fitness that remembers.

    Args:
        errors: [levels] of each unit: the error of each level in its own layer, not negative.
        seconds: [levels] of each unit.
        budget: the largest total of seconds.
        fitness: the loss of a choice, one level for each unit; may be infinite. Never asked for twice.
        evaluations: how many different choices to look at, at least one.
        rng: draws coefficients.
        start: [units] measured sensitivities of the units, not negative: coefficients to try early.
        near: the best choice within another budget: brought within this one, it is looked at first.
        progress: shows how far the search is.

    Returns:
        None if even the fastest levels take longer than the budget.
    """
    if solve(errors, seconds, budget) is None:
        return None
    untried = _first_coefficients(len(errors), start, evaluations, rng)
    # What was learned for another budget is where mutations go on from.
    best = Found((), untried[0 if start is None else 1], np.inf, 0)
    seen: set[tuple[int, ...]] = set()
    first_choice = None if near is None else brought_within(near, _weighted(errors, start), seconds, budget)

    def by_coefficients() -> tuple[tuple[int, ...], Doubles]:
        coefficients = untried.pop(0) if untried else _mutated(best.coefficients, rng)
        return tuple(solve(_weighted(errors, coefficients), seconds, budget) or ()), coefficients

    def by_exchange() -> tuple[tuple[int, ...], Doubles]:
        return _exchanged(best.choice, seconds, budget, rng), best.coefficients

    for done in progress(range(evaluations), "search levels"):
        first, second = by_coefficients, by_exchange
        if done >= _COEFFICIENTS_SHARE * evaluations:
            first, second = second, first
        proposals = (way() for way in (first, second) for _ in range(_MOST_REPEATS))
        choice, coefficients = first_choice, best.coefficients
        if choice is None or done:
            choice, coefficients = next(
                (new for new in proposals if new[0] not in seen), (None, best.coefficients)
            )
        if choice is None:
            break
        seen.add(choice)
        loss = float(fitness(choice))
        if loss < best.loss or not best.choice:
            best = Found(choice, coefficients, loss, len(seen))
    return dataclasses.replace(best, evaluations=len(seen))


def _weighted(
    errors: Sequence[npt.NDArray[Any]], coefficients: npt.NDArray[Any] | None
) -> list[npt.NDArray[Any]]:
    if coefficients is None:
        return list(errors)
    return [factor * unit for factor, unit in zip(coefficients, errors, strict=True)]


def brought_within(
    choice: Sequence[int],
    errors: Sequence[npt.NDArray[Any]],
    seconds: Sequence[npt.NDArray[Any]],
    budget: float,
) -> tuple[int, ...] | None:
    """A choice that keeps the budget, with as few levels changed as that takes.

    While it takes too long, the level changes that raises the error least for the time that it saves; then,
    while something fits into what is left over, the one that lowers the error most.

    Returns:
        None if the fastest levels take longer than the budget.
    """
    levels = [int(level) for level in choice]
    spare = budget - sum(float(times[level]) for times, level in zip(seconds, levels, strict=True))

    def change(unit: int, level: int) -> tuple[float, float]:
        """What the error rises by, and the time."""
        current = levels[unit]
        return (
            float(errors[unit][level] - errors[unit][current]),
            float(seconds[unit][level] - seconds[unit][current]),
        )

    every = [(unit, level) for unit, times in enumerate(seconds) for level in range(len(times))]
    while spare < 0:
        faster = [(each, *change(*each)) for each in every if change(*each)[1] < 0]
        if not faster:
            return None
        (unit, level), _, slower = min(faster, key=lambda entry: entry[1] / -entry[2])
        levels[unit], spare = level, spare - slower
    while True:
        better = [(each, *change(*each)) for each in every]
        better = [entry for entry in better if entry[1] < 0 and entry[2] <= spare]
        if not better:
            return tuple(levels)
        (unit, level), _, slower = min(better, key=lambda entry: entry[1])
        levels[unit], spare = level, spare - slower


def _first_coefficients(
    units: int, start: npt.NDArray[Any] | None, evaluations: int, rng: np.random.Generator
) -> list[Doubles]:
    """All ones, the measured sensitivities, and random ones; the largest of each about one."""
    measured = [] if start is None else [np.asarray(start, np.float64) / (np.max(start) or 1.0)]
    return [np.ones(units), *measured, *rng.random((round(_RANDOM_SHARE * evaluations), units))]


def _mutated(coefficients: Doubles, rng: np.random.Generator) -> Doubles:
    """Some coefficients drawn anew, or moved by a factor: those of measured sensitivities span decades."""
    units = len(coefficients)
    changed = rng.permutation(units)[: max(1, round(_MUTATED_SHARE * units))]
    anew = (coefficients.max() or 1.0) * rng.random(len(changed))
    moved = coefficients[changed] * np.exp(rng.standard_normal(len(changed)))
    result = coefficients.copy()
    result[changed] = anew if rng.random() < 0.5 else moved
    return result


def _exchanged(
    choice: tuple[int, ...], seconds: Sequence[npt.NDArray[Any]], budget: float, rng: np.random.Generator
) -> tuple[int, ...]:
    """One unit takes a slower level; others, in random order, faster ones as the budget needs."""
    order = [np.argsort(times, kind="stable") for times in seconds]
    times = [unit[ranked].tolist() for unit, ranked in zip(seconds, order, strict=True)]
    ranks = [ranked.tolist().index(level) for ranked, level in zip(order, choice, strict=True)]

    def is_over() -> bool:
        return bool(sum(unit[rank] for unit, rank in zip(times, ranks, strict=True)) > budget)

    slower, *others = rng.permutation(len(choice)).tolist()
    ranks[slower] = min(ranks[slower] + int(rng.integers(1, _MOST_RANKS + 1)), len(times[slower]) - 1)
    for unit in others:
        while is_over() and ranks[unit]:
            ranks[unit] -= 1
    if is_over():
        return choice
    for unit in [*reversed(others), slower]:  # what the last step freed too much
        while not is_over() and ranks[unit] < len(times[unit]) - 1:
            ranks[unit] += 1
        ranks[unit] -= is_over()
    return tuple(int(ranked[rank]) for ranked, rank in zip(order, ranks, strict=True))
