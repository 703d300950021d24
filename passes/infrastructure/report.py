"""What a pipeline did: one row for each pass, for people as a table and for programs as plain data."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
from rich import box
from rich.console import Console
from rich.table import Table

from ...ir.printer import format_bytes
from ...runtime.measure import Difference
from .base import Coverage, LayerErrors, Remark
from .options import plain_value

_COSTS = frozenset({"seconds", "peak_memory_growth", "latency_ms_before", "latency_ms_after"})
"""What differs from run to run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassReport:
    """What one pass did and cost.

    Attributes:
        name: the pass.
        options: its options that differ from their defaults.
        modified: whether it changed the model.
        coverage: what it covered of what it looked at, if it counts.
        statistics: rewrites by rule name.
        remarks: what it said about nodes and weights.
        seconds: wall time of the pass alone, without instruments.
        peak_memory_growth: by how many bytes it raised the process's peak memory; None where not known.
        latency_ms_before: what a call took before the pass, in milliseconds; None unless it was measured. To
            be compared with the one after, and not with those of other passes.
        latency_ms_after: the same after the pass.
        nodes_before: nodes of the graph and its subgraphs.
        nodes_after: the same after the pass.
        weight_bytes_before: size of all weights, in bytes, packed types as they are packed.
        weight_bytes_after: the same after the pass.
        errors: by output, how far the outputs are from those before the pass; empty without a contract check.
        layers: errors by layer, of passes that approximate weights.
    """

    name: str
    options: Mapping[str, Any]
    modified: bool
    coverage: Coverage | None
    statistics: Mapping[str, int]
    remarks: tuple[Remark, ...]
    seconds: float
    peak_memory_growth: int | None
    latency_ms_before: float | None
    latency_ms_after: float | None
    nodes_before: int
    nodes_after: int
    weight_bytes_before: int
    weight_bytes_after: int
    errors: Mapping[str, Difference]
    layers: Mapping[str, LayerErrors]

    def as_dict(self, *, costs: bool = True) -> dict[str, Any]:
        """JSON-serialisable form; numbers that JSON lacks (infinities) become null.

        Args:
            costs: with time and memory, which differ from run to run.
        """
        left_out = {"coverage", "remarks", "errors", "layers", "options", "statistics"}
        if not costs:
            left_out |= _COSTS
        data = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in left_out
        }
        data["options"] = {name: plain_value(value) for name, value in self.options.items()}
        data["statistics"] = {name: count for name, count in self.statistics.items() if count}
        data["coverage"] = _coverage_dict(self.coverage)
        data["remarks"] = [dataclasses.asdict(remark) for remark in self.remarks]
        for key, found in (("errors", self.errors), ("layers", self.layers)):
            data[key] = {name: _finite(dataclasses.asdict(error)) for name, error in found.items()}
        return data

    @property
    def worst_error(self) -> Difference | None:
        """The error of the output that is furthest from before, if it was measured."""
        return max(self.errors.values(), key=lambda error: error.max_relative, default=None)


@dataclasses.dataclass(frozen=True)
class Alternative:
    """A further result that a pass gave, taken through the rest of the pipeline."""

    model: ir.Model
    report: PipelineReport


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineReport:
    """What a pipeline did: its passes in the order in which they ran.

    Attributes:
        pipeline: text form of the pipeline that was asked for.
        target: name of the target.
        seed: what seeded the passes.
        passes: one report for each pass that ran.
        peak_memory: the most memory that the process had held by the end, in bytes; None where not known.
        alternatives: further results by their labels, such as ``1.5x``, with reports of their own.
    """

    pipeline: str
    target: str
    seed: int
    passes: tuple[PassReport, ...]
    peak_memory: int | None = None
    alternatives: Mapping[str, Alternative] = dataclasses.field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Wall time of all passes together."""
        return sum(report.seconds for report in self.passes)

    def as_dict(self, *, costs: bool = True) -> dict[str, Any]:
        """JSON-serialisable form.

        Args:
            costs: with time and memory, which differ from run to run.
        """
        total = {"seconds": self.seconds, "peak_memory": self.peak_memory} if costs else {}
        return {
            "pipeline": self.pipeline,
            "target": self.target,
            "seed": self.seed,
            **total,
            "passes": [report.as_dict(costs=costs) for report in self.passes],
        }

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    def table(self) -> Table:
        """The report as a rich table: one row for each pass; columns that were not measured are left out."""
        rows = [_row(report) for report in self.passes]
        table = Table(
            title=f"Pipeline for {self.target}",
            title_justify="left",
            box=box.SIMPLE,
            pad_edge=False,
            caption=self._caption(),
            caption_justify="left",
        )
        shown = [heading for heading in _HEADINGS if heading in _ALWAYS or any(row[heading] for row in rows)]
        for heading in shown:
            is_text = heading in ("pass", "did")
            table.add_column(heading, justify="left" if is_text else "right", no_wrap=heading != "did")
        for row in rows:
            table.add_row(*(row[heading] for heading in shown))
        return table

    def _caption(self) -> str | None:
        """The totals; a pass's memory is what it added to the peak of the passes before it."""
        if self.peak_memory is None:
            return None
        return f"{self.seconds:.1f} s in all, peak memory {format_bytes(self.peak_memory)}"

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=_TEXT_WIDTH)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


_TEXT_WIDTH = 110
"""Characters of a line where the report is printed as plain text."""


_HEADINGS = ("pass", "did", "nodes", "weights", "latency", "error", "cosine", "s", "memory")
_ALWAYS = _HEADINGS[:4]


def _row(report: PassReport) -> dict[str, str]:
    worst = report.worst_error
    return {
        "pass": report.name,
        "did": _summary(report),
        "nodes": _change(str(report.nodes_before), str(report.nodes_after)),
        "weights": _change(format_bytes(report.weight_bytes_before), format_bytes(report.weight_bytes_after)),
        "latency": _latency(report),
        "error": "" if worst is None else f"{worst.max_relative:.0e}",
        "cosine": "" if worst is None else f"{worst.cosine_min:.5f}",
        "s": f"{report.seconds:.2f}",
        "memory": f"+{format_bytes(report.peak_memory_growth)}" if report.peak_memory_growth else "",
    }


def _latency(report: PassReport) -> str:
    if report.latency_ms_before is None or report.latency_ms_after is None:
        return ""
    return _change(f"{report.latency_ms_before:.3g} ms", f"{report.latency_ms_after:.3g} ms")


def _summary(report: PassReport) -> str:
    if report.coverage is not None:
        return str(report.coverage)
    rewrites = sum(report.statistics.values())
    if rewrites:
        return f"{rewrites} rewrites"
    return "changed the model" if report.modified else "nothing to do"


def _change(before: str, after: str) -> str:
    """``521→193`` or ``90.9→23.0 MB``: a unit that both have is written once."""
    if before == after:
        return before
    unit = after.partition(" ")[2]
    return f"{before.removesuffix(f' {unit}') if unit else before}→{after}"


def _coverage_dict(coverage: Coverage | None) -> dict[str, Any] | None:
    if coverage is None:
        return None
    return {
        "unit": coverage.unit,
        "covered": coverage.covered,
        "total": coverage.total,
        "skipped": [dataclasses.asdict(skip) for skip in coverage.skipped],
    }


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
