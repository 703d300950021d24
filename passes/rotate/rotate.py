"""Rotate the channels of a model so that outliers are spread and few bits suffice; the function stays.

    R1  residual stream       weights only        `residual`
    R2  values, head by head  weights only        `values`
    R3  queries and keys      online              `online`
    R4  input of down_proj    online, undone in the weight

QuaRot (Ashkboos et al., 2024), SpinQuant (Liu et al., 2024). Preconditions: those of each rotation; R1 needs
norms without weights (`fold-norms`). Rotations are computed in float64, and weights rounded to their types.
With R2 and R3 the cache holds rotated keys and values: one that another model made does not fit.

With calibration data, the model is run on all of it once for the online rotations and once for the others, to
say what they do to activations; learning goes through the data as often as its steps need.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import onnx_ir as ir

from ...ir.errors import PipelineError
from ...ir.views import linears
from ..infrastructure.base import Coverage, Fact, Pass, PassContext, PassResult, Skipped
from ..quantize.scheme import parse_scheme
from .change import Change
from .draws import learned_draw, random_draw
from .online import down_rotations, key_rotations
from .probes import record_probes
from .residual import Draw, residual_rotations
from .untie import untie
from .values import value_rotations
from .verdict import Judge, Verdict, layer_remarks

OFFLINE = ("R1", "R2")
ONLINE = ("R3", "R4")
LEARNED_BITS = 4
"""Of the activations for which rotations are learned, where the scheme leaves activations alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotate(Pass):
    """Rotate the residual stream, values, keys and the inputs of down projections.

    Attributes:
        rotations: which of R1, R2, R3 and R4.
        kind: of R1 and R2: ``hadamard``, ``random-hadamard`` (with drawn signs), ``random-matrix`` (drawn
            uniformly) or ``learned`` (on the calibration data, for activations of the scheme's bits). R3 and
            R4 run online and are always Hadamard's.
        across_heads: R2 also transforms across heads, online, before the output projection.
        when: ``always``, or where it ``pays``: the mean quantisation error of the layers concerned falls and
            online transforms cost no more than ``max_cost``. R1 is kept or left as a whole, the others by
            layer. R3 can only be measured on calibration data.
        max_cost: the largest share that online transforms may take of the time of the linear that follows.
        scheme: the scheme that errors are measured for; activations count if it quantises them and there is
            calibration data.
        steps: of learning.
        sequences: calibration sequences for each step of learning.
        learning_rate: of the first step; it falls to zero.
    """

    name: ClassVar[str] = "rotate"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED})

    rotations: tuple[str, ...] = (*OFFLINE, *ONLINE)
    kind: Literal["hadamard", "random-hadamard", "random-matrix", "learned"] = "hadamard"
    across_heads: bool = False
    when: Literal["always", "pays"] = "always"
    max_cost: float = 0.25
    scheme: str = "W4A4"
    steps: int = 100
    sequences: int = 8
    learning_rate: float = 100.0

    def __post_init__(self) -> None:
        if not self.rotations or not set(self.rotations) <= {*OFFLINE, *ONLINE}:
            raise PipelineError(
                f"rotate: expected rotations among {[*OFFLINE, *ONLINE]}, found {list(self.rotations)}"
            )

        parse_scheme(self.scheme)

    @property
    def training_steps(self) -> int | None:
        """Only learned rotations are trained."""
        return self.steps if self.kind == "learned" else None

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        """First the online rotations, R3 and R4, which others may be learned for; then R1 and R2."""
        if self.kind == "learned":
            ctx.work(model)  # of the model as it came: what is learned is kept
        untied = untie(model, ctx) if "R1" in self.rotations else 0
        found: list[Change] = []
        made: list[tuple[Change, Verdict]] = []
        skipped: list[Skipped] = []
        for wanted in (ONLINE, OFFLINE):
            changes, left = self._find([name for name in self.rotations if name in wanted], model, ctx)
            found += changes
            skipped += left
            for skip in left:
                ctx.remark(skip.name, f"not rotated: {skip.reason}")
            made += self._make(changes, model, ctx, skipped)
        counts = collections.Counter(sorted(change.rotation for change, _ in made))
        caches = (change.cache for change, _ in made if change.cache is not None)
        return PassResult(
            modified=bool(made or untied),
            coverage=Coverage(
                unit="rotations",
                covered=len(made),
                skipped=tuple(skipped),
                required=self.when == "always" or not found,
            ),
            redefined_outputs=frozenset(str(cache.name) for cache in caches if cache.is_graph_output()),
            statistics=dict(counts)
            | _report(made, model, ctx)
            | ({"weights-untied": untied} if untied else {}),
        )

    def _find(
        self, names: Sequence[str], model: ir.Model, ctx: PassContext
    ) -> tuple[list[Change], list[Skipped]]:
        """The rotations that the graph allows, and why it does not allow others."""
        changes: list[Change] = []
        skipped: list[Skipped] = []
        draw = self._draw(model, ctx) if set(names) & set(OFFLINE) else None
        for name in names:
            if draw is None:
                found, left = key_rotations(model) if name == "R3" else down_rotations(model)
            elif name == "R1":
                found, left = residual_rotations(model, draw)
            else:
                found, left = value_rotations(model, draw, across_heads=self.across_heads)
            changes += found
            skipped += left
        return changes, skipped

    def _make(
        self, changes: Sequence[Change], model: ir.Model, ctx: PassContext, skipped: list[Skipped]
    ) -> Iterator[tuple[Change, Verdict]]:
        """Measure and make the changes one after the other; those that must pay and do not are skipped."""
        scheme = parse_scheme(self.scheme)
        probes = record_probes(model, changes, scheme.activation_bits, ctx)
        judge = Judge(model, scheme, ctx.target, probes)
        for change in ctx.progress(changes, "rotate"):
            verdict = Verdict()
            if self.when == "always":
                change.make(model, judge.watch(change, verdict))
                yield change, verdict
                continue
            collections.deque(judge.watch(change, verdict), maxlen=0)
            reason = verdict.reason_to_drop(self.max_cost)
            if reason is None:
                change.make(model)
                yield change, verdict
            else:
                ctx.remark(change.label, f"not rotated: {reason}; {verdict}")
                skipped.append(Skipped(change.label, reason))

    def _draw(self, model: ir.Model, ctx: PassContext) -> Draw:
        """Where R1 and R2 come from."""
        if self.kind != "learned":
            return random_draw(self.kind, ctx.rng)
        return learned_draw(
            model,
            ctx,
            steps=self.steps,
            sequences=self.sequences,
            learning_rate=self.learning_rate,
            activation_bits=parse_scheme(self.scheme).activation_bits or LEARNED_BITS,
        )


def _report(made: Sequence[tuple[Change, Verdict]], model: ir.Model, ctx: PassContext) -> dict[str, int]:
    """A remark for every rotation and every layer; counts the layers whose error fell and the others."""
    for change, verdict in made:
        ctx.remark(change.label, "; ".join((str(verdict), *change.remarks)))
    counts = {"layers-better": 0, "layers-worse": 0}
    order = {linear.name: index for index, linear in enumerate(linears(model))}
    layers = layer_remarks([verdict for _, verdict in made])
    for name, text, is_better in sorted(layers, key=lambda layer: order.get(layer[0], len(order))):
        ctx.remark(name, text)
        counts["layers-better" if is_better else "layers-worse"] += 1
    return counts
