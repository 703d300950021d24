"""What a small compilation says about the whole, as numbers that can be extrapolated."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from typing import TypeAlias

from .layers import starred
from .task import Outcome, phase_of

Key: TypeAlias = tuple[str, ...]
Quantities: TypeAlias = Mapping[Key, float]
"""The first part of a key says what is counted:

| key | number |
|---|---|
| ``seconds``, phase | wall time of a phase |
| ``peak``, phase | the most memory in it, in bytes |
| ``covered`` or ``looked at``, phase, unit | of a pass |
| ``skipped``, phase, name, reason | likewise; numbers in the name are ``*`` |
| ``weights``, phase | bytes of weights after a pass |
| ``nodes``, phase | nodes after a pass |
| ``form``, form | weights stored in this form, and ``form bytes``, form: their bytes |
| ``kernel``, kernel | nodes bound to it |
| ``file`` | bytes of the file |
"""


def quantities(outcome: Outcome) -> dict[Key, float]:
    """What a compilation that went well did and cost."""
    found: collections.defaultdict[Key, float] = collections.defaultdict(float)
    for key, number in _quantities(outcome):
        found[key] += number
    return dict(found)


def _quantities(outcome: Outcome) -> Iterator[tuple[Key, float]]:
    assert outcome.provenance is not None
    for phase in outcome.phases:
        yield ("seconds", phase.name), phase.seconds
        if phase.peak is not None:
            yield ("peak", phase.name), phase.peak
    for position, report in enumerate(outcome.provenance.report["passes"]):
        name = phase_of(position, report["name"])
        yield ("weights", name), report["weight_bytes_after"]
        yield ("nodes", name), report["nodes_after"]
        if (coverage := report["coverage"]) is not None:
            yield ("covered", name, coverage["unit"]), coverage["covered"]
            yield ("looked at", name, coverage["unit"]), coverage["total"]
            for skip in coverage["skipped"]:
                yield ("skipped", name, starred(skip["name"]), skip["reason"]), 1
    assert outcome.provenance.after is not None
    for layer in outcome.provenance.after.layers:
        yield ("form", layer.form), layer.weights
        yield ("form bytes", layer.form), layer.stored_bytes
    for kernel in outcome.provenance.kernels.values():
        yield ("kernel", kernel), 1
    yield ("file",), outcome.file_bytes
