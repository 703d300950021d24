"""A structure as text: what can be pruned, in which tensors, and why the rest must stay."""

from __future__ import annotations

import io

import numpy as np
from rich.console import Console
from rich.table import Table

from .groups import ChannelGroup, Indices, Member, Structure

_WIDTH = 160
_MOST_ROWS = 12
"""Members that are shown of a group."""


def format_structure(structure: Structure) -> str:
    """Tables of the groups with their tensors, of the residual modules, and of what must stay."""
    output = io.StringIO()
    console = Console(file=output, width=_WIDTH, highlight=False)
    if structure.groups:
        console.print(_group_table(structure))
    else:
        console.print("nothing can be pruned by channels")
    if structure.modules:
        console.print(_module_table(structure))
    for held in structure.unprunable:
        console.print(f"{held.name} stays: {held.reason}", markup=False)
    if not structure.groups and not structure.unprunable:
        console.print("no channels lie between two weights")
    return output.getvalue().rstrip("\n")


def _group_table(structure: Structure) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("group", "kind", "structures", "tensor", "axis", "role", "indices of each structure"):
        table.add_column(heading, overflow="fold", justify="right" if heading == "structures" else "left")
    for group in structure.groups:
        for row, member in enumerate(group.members[:_MOST_ROWS]):
            first = (group.name, group.kind, str(group.structures)) if row == 0 else ("", "", "")
            table.add_row(*first, member.tensor, str(member.axis), member.role, _indices(group, member))
        if len(group.members) > _MOST_ROWS:
            table.add_row("", "", "", f"… {len(group.members) - _MOST_ROWS} more")
    return table


def _module_table(structure: Structure) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("residual module", "kind", "nodes", "groups inside"):
        table.add_column(heading, overflow="fold", justify="right" if heading == "nodes" else "left")
    for module in structure.modules:
        table.add_row(module.name, module.kind, str(len(module.nodes)), ", ".join(module.groups) or "none")
    return table


def _indices(group: ChannelGroup, member: Member) -> str:
    """``0 | 1 | … | 1535``, ``0-31 | 32-63 | … | 352-383``."""
    shown = [0, 1, group.structures - 1] if group.structures > 2 else range(group.structures)
    parts = [_runs(member.indices[structure]) for structure in shown]
    if group.structures > 3:
        parts.insert(2, "…")
    return " | ".join(parts)


def _runs(indices: Indices) -> str:
    """``0-31,384-415`` of ascending indices."""
    runs = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ",".join(texts if len(texts) <= 4 else [*texts[:3], "…", texts[-1]])
