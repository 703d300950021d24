"""Which layers an option such as ``targets`` or ``ignore`` means: names, last parts of names, expressions."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...ir.errors import PipelineError

_REGULAR_EXPRESSION = "re:"


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether ``name`` is one of ``patterns``.

    A pattern is a module path or its last parts (``lm_head`` matches ``model.lm_head``), or ``re:`` and a
    regular expression that must match the beginning of the name, as in the recipes of compressed-tensors.

    Raises:
        PipelineError: a regular expression cannot be compiled.
    """
    return any(_matches(name, pattern) for pattern in patterns)


def _matches(name: str, pattern: str) -> bool:
    if not pattern.startswith(_REGULAR_EXPRESSION):
        return name == pattern or name.endswith("." + pattern)
    try:
        return re.match(pattern.removeprefix(_REGULAR_EXPRESSION), name) is not None
    except re.error as error:
        raise PipelineError(f"pattern {pattern!r} is not a regular expression: {error}") from error
