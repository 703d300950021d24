"""Algorithms that choose the integers of one weight, by name. A new one adds a file and a row here."""

from __future__ import annotations

import dataclasses
from typing import Any

from .awq_clip import AWQClip
from .base import Algorithm, LayerStatistics, Remark
from .gptaq import GPTAQ
from .gptq import GPTQ
from .rtn import RoundToNearest
from .spqr import SpQR

ALGORITHMS: dict[str, type[Any]] = {
    "awq-clip": AWQClip,
    "gptaq": GPTAQ,
    "gptq": GPTQ,
    "rtn": RoundToNearest,
    "spqr": SpQR,
}


def algorithm(
    name: str,
    *,
    act_order: bool = True,
    damp: float = 0.01,
    sweeps: int = 3,
    outlier_share: float = 0.01,
) -> Algorithm:
    """The algorithm called ``name``, a key of `ALGORITHMS`, with those of the settings that it has."""
    kind = ALGORITHMS[name]
    known = {field.name for field in dataclasses.fields(kind)}
    settings = {
        "act_order": act_order,
        "damp": damp,
        "sweeps": sweeps,
        "largest_share": outlier_share,
    }
    found: Algorithm = kind(**{key: value for key, value in settings.items() if key in known})
    return found


__all__ = ["ALGORITHMS", "Algorithm", "LayerStatistics", "Remark", "algorithm"]
