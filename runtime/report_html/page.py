"""The page itself: one HTML file with its style, script and charts inside, and nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ...ir.printer import format_bytes
from .block_rows import local_name
from .charts import bar
from .content import Content, bytes_of
from .headline import change, largest, worst

_FOLDER = Path(__file__).parent
_MOST_GROUPS = 16
"""Of blocks that are shown before the reader asks for more."""


def render(content: Content) -> str:
    """The report as HTML. What comes from the model is escaped, and the page forbids itself the network."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("page.html")
    return page.render(
        content=content,
        shown=_shown(content),
        style=_own("style.css"),
        script=_own("script.js"),
        bar=bar,
        breakable=breakable,
        bytes=format_bytes,
        largest=largest,
        small=small,
        bytes_of=bytes_of,
        change=change,
        local_name=local_name,
        most_groups=_MOST_GROUPS,
        option=option,
        worst=worst,
        total_ms=sum(time.ms for time in content.layer_times) or 1.0,
    )


def breakable(name: str) -> Markup:
    """A path of modules that may be broken behind its dots."""
    return Markup(".<wbr>").join(name.split("."))


def option(value: Any) -> str:
    """The value of an option as in the text of a pipeline: ``[W4A16,W8A16]``."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}={option(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(option, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def small(value: float) -> str:
    """An error: ``1.3e-01``; none at all is ``0``."""
    return f"{value:.1e}" if value else "0"


def _own(name: str) -> Markup:
    """A file of this package, which needs no escaping."""
    return Markup((_FOLDER / name).read_text(encoding="utf-8"))


def _shown(content: Content) -> dict[str, bool]:
    """Which columns and sentences there is something for."""
    passes = content.passes
    return {
        "latency": any(row.get("latency_ms_after") is not None for row in passes),
        "errors": any(row.get("errors") for row in passes),
        "costs": any("seconds" in row for row in passes),
        "remarks": any(row.get("remarks") for row in passes),
        "activations": any(row.layer.activation_bits for row in content.layers),
    }
