"""Telling a pass which layers to leave alone, for those whose options ``targets`` and ``ignore`` say so."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from ...ir.outline import ModelOutline
from .base import Pass
from .patterns import matches


def layers_of(pass_: Pass, model: ModelOutline) -> list[str]:
    """Names of the layers that the options of ``pass_`` allow it to touch, in the graph's order."""
    names = dict.fromkeys(layer.name for layer in model.layers)
    targets, ignore = _patterns(pass_, "targets"), _patterns(pass_, "ignore")
    return [name for name in names if not matches(name, ignore) and (not targets or matches(name, targets))]


def without_layers(pass_: Pass, names: Sequence[str]) -> Pass | None:
    """The same pass with these layers among those that it ignores; None if it has no such options."""
    if not {"targets", "ignore"} <= {field.name for field in dataclasses.fields(pass_)}:
        return None
    exactly = tuple(f"re:{re.escape(name)}$" for name in names)
    changed: dict[str, Any] = {"ignore": (*_patterns(pass_, "ignore"), *exactly)}
    return dataclasses.replace(pass_, **changed)


def _patterns(pass_: Pass, option: str) -> tuple[str, ...]:
    found: tuple[str, ...] = getattr(pass_, option)
    return found
