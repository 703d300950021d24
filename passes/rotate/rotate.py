"""Rotate the channels of a model so that outliers are spread and few bits suffice; the function stays.

    R1  residual stream       weights only        `residual`
    R2  values, head by head  weights only        `values`
    R3  queries and keys      online              `online`
    R4  input of down_proj    online, undone in the weight

QuaRot (Ashkboos et al., 2024), SpinQuant (Liu et al., 2024). Preconditions: those of each rotation; R1 needs
norms without weights (`fold-norms`). Rotations are computed in float64, and weights rounded to their types.
With R2 and R3 the cache holds rotated keys and values: one that another model made does not fit.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from ...ir.errors import PipelineError
from ..infrastructure.base import Coverage, Fact, Pass, PassContext, PassResult, Skipped
from .change import Change
from .hadamard import Kind, kronecker_hadamard, rotation
from .online import down_rotations, key_rotations
from .residual import Draw, residual_rotations
from .untie import untie
from .values import value_rotations
from .vectors import VectorFunction, Vectors

ROTATIONS = ("R1", "R2", "R3", "R4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotate(Pass):
    """Rotate the residual stream, values, keys and the inputs of down projections.

    Attributes:
        rotations: which of R1, R2, R3 and R4.
        kind: of R1 and R2: ``hadamard``, ``random-hadamard`` (with drawn signs) or ``random-matrix``
            (drawn uniformly). R3 and R4 run online and are always Hadamard's.
        across_heads: R2 also transforms across heads, online, before the output projection.
    """

    name: ClassVar[str] = "rotate"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED})

    rotations: tuple[str, ...] = ROTATIONS
    kind: Literal["hadamard", "random-hadamard", "random-matrix"] = "hadamard"
    across_heads: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.rotations if name not in ROTATIONS]
        if unknown or not self.rotations:
            raise PipelineError(
                f"rotate: rotations={list(self.rotations)} is not known", hint=f"expected some of {ROTATIONS}"
            )

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        """Find all rotations in the graph as it comes, then make them."""
        untied = untie(model, ctx) if "R1" in self.rotations else 0
        changes: list[Change] = []
        skipped: list[Skipped] = []
        for name in self.rotations:
            found, left = self._find(name, model, ctx)
            changes += found
            skipped += left
        for change in ctx.progress(changes, "rotate"):
            change.make(model)
            for text in change.remarks:
                ctx.remark(change.label, text)
        for skip in skipped:
            ctx.remark(skip.name, f"not rotated: {skip.reason}")
        made = collections.Counter(change.rotation for change in changes)
        return PassResult(
            modified=bool(changes or untied),
            coverage=Coverage(unit="rotations", covered=len(changes), skipped=tuple(skipped)),
            statistics=dict(made) | ({"weights-untied": untied} if untied else {}),
        )

    def _find(self, name: str, model: ir.Model, ctx: PassContext) -> tuple[list[Change], list[Skipped]]:
        draw = _draw(self.kind, ctx.rng)
        match name:
            case "R1":
                return residual_rotations(model, draw)
            case "R2":
                return value_rotations(model, draw, across_heads=self.across_heads)
            case "R3":
                return key_rotations(model)
            case _:
                return down_rotations(model)


def _draw(kind: Kind, rng: np.random.Generator) -> Draw:
    """Rotations of one kind, one after the other. Those of Hadamard are applied factor by factor."""

    def matrix(features: int) -> tuple[VectorFunction, tuple[str, ...]]:
        drawn = rotation(features, kind, rng).matrix
        return lambda vectors: vectors @ drawn, ()

    def hadamard(features: int) -> tuple[VectorFunction, tuple[str, ...]]:
        transform = kronecker_hadamard(features)
        signs = rng.choice([-1.0, 1.0], features) if kind == "random-hadamard" else np.ones(features)

        def apply(vectors: Vectors) -> Vectors:
            return transform.apply(vectors * signs)

        return apply, () if transform.remark is None else (transform.remark,)

    return matrix if kind == "random-matrix" else hadamard
