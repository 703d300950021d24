"""What stands in a report, in the form in which the page shows it: texts, charts and rows of tables."""

from __future__ import annotations

import collections
import dataclasses
import functools
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ...ir.outline import BlockOutline, LayerOutline, ModelOutline
from ...ir.printer import format_bytes
from ..layer_times import LayerTime
from ..provenance import Provenance
from . import charts, headline
from .block_rows import BlockRow, block_rows
from .headline import Figure, Row
from .measurements import Measurements

_MOST_TIMES = 24
"""Rows of the table of latencies; what is shorter is summed up in one more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One layer after the passes, with all that is known about it."""

    layer: LayerOutline
    block: BlockOutline
    kernel: str
    weight_error: float | None
    output_error: float | None
    ms: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Content:
    """Everything that a report is made of.

    Attributes:
        name: of the file, or of the folder that it is in.
        file_bytes: its size.
        file_bytes_before: of the file that it was compiled from, if that is at hand.
        provenance: what the file says of itself.
        costs: the report with times and memory, as `planish compile --report` writes it; else the file's own.
        measurements: what was measured now, if anything was.
        source_name: of the model that it was compiled from.
    """

    name: str
    file_bytes: int
    file_bytes_before: int | None
    provenance: Provenance
    costs: Mapping[str, Any]
    measurements: Measurements | None
    source_name: str

    @property
    def passes(self) -> Sequence[Row]:
        """What each did."""
        passes: Sequence[Row] = self.costs.get("passes", ())
        return passes

    @property
    def figures(self) -> list[Figure]:
        """The headline."""
        found = [
            headline.weights(self.passes),
            headline.file(self.passes, self.file_bytes, self.file_bytes_before),
            headline.error(self.passes, self.measurements),
        ]
        if self.measurements is not None and self.measurements.latencies:
            found.append(headline.latency(self.measurements))
        return found

    @property
    def facts(self) -> dict[str, str]:
        """What else identifies the file and how it was made."""
        report = self.provenance.report
        found = {
            "target": str(report.get("target", "")),
            "seed": self.provenance.seed,
            "compiled by": ", ".join(f"{name} {text}" for name, text in self.provenance.versions.items()),
            "compiled from": self.provenance.source,
        }
        if "seconds" in self.costs:
            found["passes took"] = f"{self.costs['seconds']:.1f} s"
        if self.costs.get("peak_memory"):
            found["peak memory"] = format_bytes(self.costs["peak_memory"])
        if self.measurements is not None:
            shapes = (f"{name} {list(shape)}" for name, shape in self.measurements.shapes.items())
            found["measured on"] = f"{self.measurements.machine}; inputs {', '.join(shapes)}"
        return {name: text for name, text in found.items() if text}

    @functools.cached_property
    def blocks(self) -> list[tuple[BlockRow, ...]]:
        """What the diagram of the graph shows."""
        before, after = self.provenance.before, self.provenance.after
        if before is None or after is None:
            return []
        return block_rows(before, after, self.provenance.kernels)

    @functools.cached_property
    def largest_block(self) -> int:
        """Bytes of weights of the largest block before or after, to which bars are relative."""
        outlines = (self.provenance.before, self.provenance.after)
        sizes = [bytes_of(block) for outline in outlines if outline for block in outline.blocks]
        return max(sizes, default=1) or 1

    @functools.cached_property
    def layers(self) -> list[LayerRow]:
        """The layers after the passes, in the graph's order; errors by the last pass that says any."""
        errors: dict[str, Row] = {}
        for row in self.passes:
            errors |= row.get("layers", {})
        measured = () if self.measurements is None else self.measurements.layers
        times = {time.name: time.ms for time in measured if time.is_layer}
        after = self.provenance.after or ModelOutline(blocks=(), weight_bytes=0)
        return [
            LayerRow(
                layer=layer,
                block=block,
                kernel=self.provenance.kernels.get(layer.node, ""),
                weight_error=errors.get(layer.name, {}).get("weight"),
                output_error=errors.get(layer.name, {}).get("output"),
                ms=times.get(layer.name),
            )
            for block in after.blocks
            for layer in block.layers
        ]

    @property
    def layer_charts(self) -> list[Markup]:
        """Bits, zeros and errors of every layer, one chart below the other; charts without data left out."""
        bits = sorted({2, 4, 8, 16, 32} & {row.layer.bits for row in self.layers} | {0})
        highest = max((row.layer.bits for row in self.layers), default=0)
        ticks = [(float(count), str(count)) for count in (bits if highest in bits else (*bits, highest))]
        zeros = [row.layer.zeros for row in self.layers]
        found = [
            self._chart("bits of a weight", lambda row: float(row.layer.bits), "{:g} bits", ticks),
            self._chart(
                "weights that are zero", lambda row: row.layer.zeros, "{:.1%}", _ticks(zeros, percent=True)
            ),
            self._chart("error of the weights, ‖W − Ŵ‖ / ‖W‖", lambda row: row.weight_error, "{:.3g}"),
            self._chart("error of the output, ‖X(W − Ŵ)‖ / ‖XW‖", lambda row: row.output_error, "{:.3g}"),
            self._chart("latency, ms", lambda row: row.ms, "{:.3f} ms"),
        ]
        return [chart for chart in found if chart is not None]

    def _chart(
        self,
        title: str,
        value: Callable[[LayerRow], float | None],
        form: str,
        ticks: Sequence[tuple[float, str]] | None = None,
    ) -> Markup | None:
        values = [value(row) for row in self.layers]
        if all(found is None for found in values):
            return None
        data = [
            charts.Column(
                row.layer.name, found, "not known" if found is None else form.format(found), row.block.kind
            )
            for row, found in zip(self.layers, values, strict=True)
        ]
        return charts.columns(title, data, _ticks(values) if ticks is None else ticks)

    @property
    def layer_times(self) -> list[LayerTime]:
        """Latencies, the longest first; the shortest are summed up."""
        measured = () if self.measurements is None else self.measurements.layers
        times = sorted(measured, key=lambda time: -time.ms)
        shown, rest = times[:_MOST_TIMES], times[_MOST_TIMES:]
        if rest:
            nodes, ms = sum(time.nodes for time in rest), sum(time.ms for time in rest)
            shown.append(LayerTime(f"{len(rest)} more", (), nodes, ms, is_layer=False))
        return shown

    @property
    def kinds(self) -> list[str]:
        """Of the blocks that have layers, as the legend of the charts lists them."""
        return list(collections.Counter(row.block.kind for row in self.layers))

    @property
    def pareto(self) -> Markup | None:
        """The front, if a search left one."""
        points = self.provenance.pareto
        return charts.pareto(points, "metric") if points else None

    @property
    def command(self) -> str:
        """What compiles the model again."""
        words = ["planish", "compile", self.source_name, "-o", self.name]
        words += ["--passes", str(self.provenance.report.get("pipeline", ""))]
        words += ["--target", str(self.provenance.report.get("target", ""))]
        return shlex.join([*words, "--seed", self.provenance.seed])


def bytes_of(block: BlockOutline) -> int:
    """Of the weights of its layers."""
    return sum(layer.stored_bytes for layer in block.layers)


def _ticks(values: Sequence[float | None], *, percent: bool = False) -> list[tuple[float, str]]:
    largest = max((value for value in values if value is not None), default=0.0)
    return charts.rising_ticks(largest, percent=percent)
