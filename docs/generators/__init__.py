"""The pages of the site that are written by the code itself: passes, ops, targets, commands, results."""

from __future__ import annotations

from . import command_line, notebook, ops, passes, results, targets

__all__ = ["pages", "pictures"]


def pages() -> dict[str, str]:
    """Markdown by the path of the page, relative to ``docs/``."""
    return {
        **passes.pages(),
        "ops.md": ops.page(),
        "targets.md": targets.page(),
        "command_line.md": command_line.page(),
        **results.pages(),
        "quick_start.md": notebook.page(),
    }


def pictures() -> dict[str, str]:
    """Files that generated pages show: their path on the site, and where they are."""
    return results.pictures()
