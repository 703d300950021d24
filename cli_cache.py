"""``planish cache``: what is kept of long work, and how to be rid of it."""

from __future__ import annotations

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

out = Console()
app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Show or delete what is kept of long work, for commands that go on after they were killed.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_UNITS = ((86400, "d"), (3600, "h"), (60, "min"))


@app.command("list")
def list_entries() -> None:
    """List what is kept: of which pass and pipeline, how large, when it was used last.

    Results are deleted by themselves, the oldest first, beyond 20 GB, or as many bytes as the environment
    variable `PLANISH_CACHE_LIMIT` says.
    """
    from .ir.printer import format_bytes
    from .runtime.work_cache import WorkCache, age

    cache = WorkCache()
    entries = cache.entries()
    table = Table(
        title=f"{cache.folder}: {format_bytes(sum(entry.bytes for entry in entries))}",
        title_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
    )
    for heading in ("pass", "model", "size", "used", "pipeline"):
        table.add_column(heading, justify="right" if heading in ("size", "used") else "left")
    for entry in entries:
        about = entry.about
        table.add_row(
            escape(about.get("pass", entry.path.name)),
            escape(about.get("model", "")),
            format_bytes(entry.bytes),
            f"{_duration(age(entry))} ago",
            escape(about.get("pipeline", "")),
        )
    out.print(table)


@app.command()
def clear() -> None:
    """Delete everything that is kept and that no process is using."""
    from .ir.printer import format_bytes
    from .runtime.work_cache import WorkCache

    cache = WorkCache()
    freed, left = cache.clear(), len(cache.entries())
    still = f"; {left} in use by other processes stay" if left else ""
    out.print(f"{cache.folder}: deleted {format_bytes(freed)}{still}", highlight=False)


def _duration(seconds: float) -> str:
    size, unit = next(((size, unit) for size, unit in _UNITS if seconds >= size), (1, "s"))
    return f"{seconds / size:.0f} {unit}"
