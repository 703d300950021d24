"""The few numbers that a report begins with: size, error and latency, before and after."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...ir.printer import format_bytes
from .measurements import Measurements

Row = Mapping[str, Any]
"""A pass, as in `PassReport.as_dict`."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """One number of the headline.

    Attributes:
        title: what it is.
        value: the number, before and after.
        note: a sentence about it.
        share: how much of it is left, for a bar.
    """

    title: str
    value: str
    note: str
    share: float | None = None


def weights(passes: Sequence[Row]) -> Figure:
    """The size of all weights."""
    before, after = _ends(passes, "weight_bytes")
    share = after / before if before else 1.0
    return Figure("weights", change(before, after, format_bytes), f"{share:.1%} of what they were", share)


def file(passes: Sequence[Row], size: int, size_before: int | None) -> Figure:
    """The size of the file, beside that of the model it was compiled from where that is at hand."""
    note = change(*_ends(passes, "nodes"), lambda count: f"{count} nodes")
    if size_before is None:
        return Figure("file", format_bytes(size), note)
    return Figure("file", change(size_before, size, format_bytes), note, size / size_before)


def error(passes: Sequence[Row], measured: Measurements | None) -> Figure:
    """How far the outputs moved: as measured now, else by the pass that moved them furthest."""
    if measured is not None and measured.errors:
        errors: Mapping[str, Row] = {
            name: dataclasses.asdict(found) for name, found in measured.errors.items()
        }
        where = "against the model before"
    else:
        checked = [row for row in passes if row.get("errors")]
        if not checked:
            return Figure("outputs", "not compared", "compile with --check contract, or give --before")
        costliest = max(checked, key=lambda row: largest(worst(row["errors"])))
        errors, where = costliest["errors"], f"after {costliest['name']}, the pass that costs most"
    found = worst(errors)
    return Figure(
        "cosine of outputs",
        f"{found['cosine_min']:.5f}",
        f"the lowest, {where}; largest error {largest(found):.2g} of the largest value",
    )


def latency(measured: Measurements) -> Figure:
    """What a call takes here."""
    after, before = measured.latencies["after"], measured.latencies.get("before")
    if before is None:
        return Figure("latency", f"{after.median_ms:.3g} ms", "median on this machine")
    faster = after.speedup_over(before)
    value = f"{before.median_ms:.3g} → {after.median_ms:.3g} ms"
    return Figure("latency", value, f"{faster:.2f} times as fast, on this machine", 1 / faster)


def worst(errors: Mapping[str, Row]) -> Row:
    """The error of the output that is furthest off."""
    return max(errors.values(), key=largest)


def largest(found: Row) -> float:
    """Of one output, relative to its largest value; null stands for infinity, which JSON lacks."""
    value = found["max_relative"]
    return float("inf") if value is None else float(value)


def _ends(passes: Sequence[Row], key: str) -> tuple[int, int]:
    """Something before the first and after the last pass."""
    return (passes[0][f"{key}_before"], passes[-1][f"{key}_after"]) if passes else (0, 0)


def change(before: int, after: int, form: Callable[[int], str] = str) -> str:
    """``518 → 100 nodes``: a unit that both have is written once, and what is equal too."""
    first, last = form(before), form(after)
    unit = last.partition(" ")[2]
    return last if first == last else f"{first.removesuffix(f' {unit}') if unit else first} → {last}"
