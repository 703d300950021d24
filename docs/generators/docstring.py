"""Docstrings as Markdown: what is code there is code here, and sections of fields are left to tables."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

_SECTION = re.compile(
    r"^(?:Args|Attributes|Options|Raises|Returns):\n(?:[ \t]+.*(?:\n|\Z)|\n)+", re.MULTILINE
)
_ENTRY = re.compile(r"^    (\w+): (.*(?:\n        .*)*)", re.MULTILINE)


def markdown(text: str | None) -> str:
    """A docstring without the sections that list fields."""
    return code(_SECTION.sub("", inspect.cleandoc(text or "")).strip())


def sentence(text: str | None) -> str:
    """The first paragraph, in one line."""
    return " ".join(markdown(text).split("\n\n")[0].split())


def rest(text: str | None) -> str:
    """Everything behind the first paragraph."""
    return markdown(text).partition("\n\n")[2]


def fields(text: str | None) -> dict[str, str]:
    """What the section ``Attributes`` says about each field, in one line each."""
    _, _, section = inspect.cleandoc(text or "").partition("Attributes:\n")
    return {name: code(" ".join(words.split())) for name, words in _ENTRY.findall(section)}


def code(text: str) -> str:
    """Literals with the marks of Markdown; a colon that begins a block of code is one colon."""
    lines = text.replace("::\n", ":\n").split("\n")
    return "\n".join(line if line.startswith("    ") else _prose(line) for line in lines)


def _prose(line: str) -> str:
    """``W<bits>`` is no tag of HTML, unless it is code already."""
    parts = line.replace("``", "`").split("`")
    return "`".join(part if index % 2 else part.replace("<", "&lt;") for index, part in enumerate(parts))


def row(*cells: str) -> str:
    """One row of a table: a bar inside of a cell does not end it."""
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; empty without rows."""
    if not rows:
        return ""
    lines = [row(*headings), row(*("---" for _ in headings)), *(row(*cells) for cells in rows)]
    return "\n".join(lines)


def blocks(*parts: str) -> str:
    """Blocks of a page, one below the other; empty ones are left out."""
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"
