"""What the command line shows, as rich tables: of a file, of a pass, of a comparison."""

from __future__ import annotations

import collections
import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .ir.errors import ModelError
from .ir.printer import format_bytes, format_type
from .ir.views import linears
from .passes.infrastructure.registry import PassDescription
from .runtime.measure import Difference
from .runtime.provenance import KERNELS, OUTLINE, PARETO, Provenance


def facts_table(graph: ir.Model, path: Path) -> Table:
    """What a file is: its size, producer, opsets, parameters."""
    tensors = [
        value.const_value
        for subgraph in graph.graphs()
        for value in subgraph.initializers.values()
        if value.const_value is not None
    ]
    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in graph.opset_imports.items())
    table = Table(show_header=False, box=box.SIMPLE, title=escape(str(path)), title_justify="left")
    table.add_row("file", format_bytes(file_bytes(path)))
    table.add_row("producer", escape(f"{graph.producer_name or ''} {graph.producer_version or ''}".strip()))
    table.add_row("opset", f"{opsets} (as loaded), IR {graph.ir_version}")
    table.add_row("parameters", f"{sum(tensor.size for tensor in tensors):,}")
    table.add_row("weights", format_bytes(sum(tensor.nbytes for tensor in tensors)))
    return table


def interface_table(graph: ir.Model) -> Table:
    """Graph inputs and outputs with their types; weights that are listed as inputs are left out."""
    table = Table("input / output", "type", box=box.SIMPLE)
    for direction, values in (("→", graph.graph.inputs), ("←", graph.graph.outputs)):
        for value in values:
            if value.name not in graph.graph.initializers:
                table.add_row(f"{direction} {escape(value.name or '')}", escape(format_type(value)))
    return table


def linears_table(graph: ir.Model, *, limit: int | None) -> Table:
    """The linears, the first ``limit`` of them."""
    found = linears(graph)
    shown = found[:limit]
    more = f", the first {len(shown)} of them" if len(shown) < len(found) else ""
    table = Table("linear", title=f"{len(found)} linears{more}", title_justify="left", box=box.SIMPLE)
    products = sum(node.op_type in ("MatMul", "Gemm") for node in graph.graph.all_nodes())
    others = products - sum(linear.node.op_type in ("MatMul", "Gemm") for linear in found)
    if others:
        table.caption = f"{others} more MatMul or Gemm multiply activations, or wait for `canonicalize`"
    for heading in ("in", "out", "weight", "bias"):
        table.add_column(heading, justify="right")
    for linear in shown:
        dtype = linear.weight.dtype.name if linear.weight.dtype is not None else "?"
        bias = "yes" if linear.bias is not None else ""
        table.add_row(escape(linear.name), str(linear.in_features), str(linear.out_features), dtype, bias)
    return table


def layers_table(metadata: Mapping[str, str], *, limit: int | None) -> Table | None:
    """The first ``limit`` layers of a file that planish compiled, with the kernels that run them."""
    try:
        provenance = Provenance.read(metadata)
    except ModelError:
        return None
    if provenance.after is None:
        return None
    layers = provenance.after.layers
    shown = layers[:limit]
    more = f", the first {len(shown)} of them" if len(shown) < len(layers) else ""
    table = Table(title=f"{len(layers)} layers{more}", title_justify="left", box=box.SIMPLE)
    table.add_column("layer", overflow="fold")
    for heading in ("weight", "bytes", "zero"):
        table.add_column(heading, justify="right")
    for heading in ("stored as", "kernel"):
        table.add_column(heading)
    for layer in shown:
        table.add_row(
            escape(layer.name),
            "×".join(map(str, layer.shape)),
            format_bytes(layer.stored_bytes),
            "" if layer.zeros is None else f"{layer.zeros:.1%}",
            escape(layer.form),
            escape(provenance.kernels.get(layer.node, "")),
        )
    return table


def history_table(metadata: Mapping[str, str]) -> Table | None:
    """What planish wrote into the file: its recipe, what each pass did and what that cost."""
    entries = {
        key.removeprefix("planish."): text
        for key, text in metadata.items()
        if key.startswith("planish.") and key not in _FOR_PROGRAMS
    }
    if not entries:
        return None
    table = Table(title="made by planish", title_justify="left", show_header=False, box=box.SIMPLE)
    rows = _history_rows(entries.pop("report", "{}"))
    for key, text in (*entries.items(), *rows):
        table.add_row(key, escape(text.strip()))
    return table


_FOR_PROGRAMS = frozenset({OUTLINE, KERNELS, PARETO})
"""What `layers_table` shows, and `planish report`."""


def _history_rows(text: str) -> list[tuple[str, str]]:
    """Each pass and what it did; a file edited by others may hold anything, which is then left out."""
    try:
        return [(str(row["name"]), _history_line(row)) for row in json.loads(text).get("passes", ())]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []


def _history_line(row: Mapping[str, Any]) -> str:
    words = [f"{row.get('nodes_before', '?')} → {row.get('nodes_after', '?')} nodes"]
    if coverage := row.get("coverage"):
        words.append(f"{coverage['covered']} of {coverage['total']} {coverage['unit']}")
    words += [f"{name}: cosine {error['cosine_mean']:.5f}" for name, error in row.get("errors", {}).items()]
    return "; ".join(words)


def ops_table(graph: ir.Model) -> Table:
    """How many nodes of each op there are, subgraphs included."""
    counts = collections.Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph.graph.all_nodes()
    )
    table = Table("op", title=f"{counts.total()} nodes", title_justify="left", box=box.SIMPLE)
    table.add_column("count", justify="right")
    for op, count in counts.most_common():
        table.add_row(op, str(count))
    return table


def differences_table(differences: Mapping[str, Difference], title: str) -> Table:
    """How far each output is from its reference."""
    table = Table("output", title=title, title_justify="left", box=box.SIMPLE)
    for heading in ("cosine mean", "cosine min", "max absolute", "max relative", "KL"):
        table.add_column(heading, justify="right")
    for name, found in differences.items():
        table.add_row(
            escape(name),
            f"{found.cosine_mean:.6f}",
            f"{found.cosine_min:.6f}",
            f"{found.max_absolute:.2e}",
            f"{found.max_relative:.2e}",
            "" if found.kl_divergence is None else f"{found.kl_divergence:.2e}",
        )
    return table


def file_bytes(path: Path) -> int:
    """Size of an ONNX file together with the file of external data that planish writes beside it."""
    size = path.stat().st_size
    with contextlib.suppress(FileNotFoundError):
        size += path.with_name(f"{path.name}.data").stat().st_size
    return size


def pass_table(description: PassDescription) -> Group:
    """One pass: what it promises and needs, its options, and an example."""
    facts = Table(show_header=False, box=box.SIMPLE)
    facts.add_row("contract", description.contract.value)
    for heading in ("requires", "forbids", "establishes", "destroys"):
        names = sorted(fact.value for fact in getattr(description, heading))
        if names:
            facts.add_row(heading, ", ".join(names))
    heading = f"[bold]{description.name}[/]  {escape(description.summary)}"
    if not description.options:
        return Group(heading, facts)
    table = Table("option", "accepts", "default", "", box=box.SIMPLE)
    for option in description.options:
        default = "required" if option.default is None else escape(option.default)
        table.add_row(option.name, escape(option.accepts), default, escape(option.doc))
    option = description.options[0]
    example = f'--passes "{description.name}{{{option.name}={option.default or "..."}}}"'
    return Group(heading, facts, table, Text(f"for example: {example}"))
