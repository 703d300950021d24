"""Models that belong to another: what its runtime runs beside it, such as the eviction of its cache."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

EVICTION = "evict"
"""The name of the graph that evicts tokens of a decoder's cache."""
EVICTS_KEY = "planish.evicts"
"""Metadata of a decoder that only planish's runtime can run: how tokens of its cache are evicted."""
_KEY = "planish.companions"


def companions_of(model: ir.Model) -> Mapping[str, ir.Model]:
    """The models that were attached to this one, by name."""
    found: Mapping[str, ir.Model] = model.meta.get(_KEY, {})
    return found


def attach(model: ir.Model, name: str, companion: ir.Model) -> None:
    """Let a model belong to another; copies of that one have it, too."""
    model.meta[_KEY] = {**companions_of(model), name: companion}
