"""The pass that scales channels between a producer and the linears that read it.

    x = source(…; c),  y = x W          →          source(…; c / s),  (x / s) (diag(s) W)

Nothing is added to the graph: 1 / s goes into the norm or linear before, see `pairs`. The methods differ in
how s is chosen, see `smoothquant` and `awq`. Cached values of an attention whose output projection is scaled
are given divided by s. All statistics are of the model as it came, collected in one
run over the calibration data, group after group; the scales are folded when it is over, so that no group sees
another one's scale. (Scaling a linear's columns does not change what its own grid costs it, for a grid per
column, and scaling its rows does not change its output.)

Preconditions: x comes from constants with one entry per channel, by ops that keep channels apart, and only
these linears read what is scaled on the way; see `pairs`.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

import onnx_ir as ir

from ...ir.errors import PipelineError
from ...ir.views import Linear
from ...runtime.calibration import Tap
from ..infrastructure.base import Contract, Coverage, Fact, Pass, PassContext, PassResult, Skipped
from ..infrastructure.patterns import matches
from ..quantize.scheme import parse_scheme
from .awq import AWQ
from .fold import Doubles, fold
from .kept_choices import from_arrays, to_arrays
from .method import Method, Watcher
from .pairs import ScalingGroup, scaling_groups
from .smoothquant import SmoothQuant


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale(Pass):
    """Scale channels so that quantising costs less: SmoothQuant (weights and activations), AWQ (weights).

    Attributes:
        method: ``smoothquant`` evens out the ranges of activations at the cost of the weights; ``awq``
            searches for the scale whose quantised weights change the outputs least.
        alpha: smoothquant: how much of the difficulty moves from activations to weights, 0 to 1; 0.5 is
            usual, 0.85 for models of the Llama family.
        scheme: awq: what the weights will be quantised to, as in ``quantize``.
        group_size: awq: as in ``quantize``.
        symmetric: awq: as in ``quantize``.
        clip: awq: measure with weights clipped where that lowers their error, as ``quantize`` does below
            5 bits; takes about ten times as long.
        candidates: awq: how many exponents r = i / candidates are tried.
        targets: names or ``re:`` patterns of the layers that will be quantised; empty means all.
        ignore: names or ``re:`` patterns of the layers that will not. Inputs that only such layers read
            are left alone.
    """

    name: ClassVar[str] = "scale"
    contract: ClassVar[Contract] = Contract.EXACT
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED})

    method: Literal["smoothquant", "awq"] = "smoothquant"
    alpha: float = 0.5
    scheme: str = "W4A16"
    group_size: int | None = None
    symmetric: bool | None = None
    clip: bool = False
    candidates: int = 20
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ("lm_head",)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise PipelineError(f"scale: alpha: expected 0 to 1, found {self.alpha}")
        if self.candidates < 2:
            raise PipelineError(f"scale: candidates: expected 2 or more, found {self.candidates}")
        parse_scheme(self.scheme, self.group_size, self.symmetric)

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        """Choose the scales of all groups, then fold them."""
        groups, skipped = scaling_groups(model)
        groups = self._asked_for(groups, skipped)
        scales = self._choose(model, ctx, groups) if groups else []
        covered, folded = 0, {"norm": 0, "linear": 0}
        redefined: set[str] = set()
        for group, scale in zip(groups, scales, strict=True):
            reason = None if scale is None else fold(group, scale)
            if reason is not None:
                skipped.append(Skipped(group.name, reason))
                continue
            covered += 1
            if scale is not None:
                folded[group.source.kind] += 1
                redefined.update(str(cache.name) for cache in group.source.caches)
        for skip in skipped:
            ctx.remark(skip.name, f"not scaled: {skip.reason}")
        return PassResult(
            modified=any(folded.values()),
            coverage=Coverage(unit="inputs of linears", covered=covered, skipped=tuple(skipped)),
            statistics={f"folded into a {kind}": count for kind, count in folded.items() if count},
            redefined_outputs=frozenset(redefined),
        )

    def _asked_for(self, groups: list[ScalingGroup], skipped: list[Skipped]) -> list[ScalingGroup]:
        """The groups with a linear that will be quantised, and that the method can scale."""
        method, kept = self._method(), []
        for group in groups:
            linears = self._targets_of(group)
            reason = method.reason_to_skip(linears) if linears else "ignored"
            if reason is None:
                kept.append(group)
            else:
                skipped.append(Skipped(group.name, reason))
        return kept

    def _choose(self, model: ir.Model, ctx: PassContext, groups: list[ScalingGroup]) -> list[Doubles | None]:
        """The scale of every group, or None where it is best left as it is; the model is not changed."""
        work, decided_by = ctx.work(model), self._decisions(groups)
        kept = [work.recall(group.name, by) for group, by in zip(groups, decided_by, strict=True)]
        choices = {index: from_arrays(found) for index, found in enumerate(kept) if found is not None}
        missing = [index for index in range(len(groups)) if index not in choices]
        # Where something was kept the data moves on all the same: what follows is the same to the last bit.
        to_pass = groups[: missing[-1] + 1] if missing else []
        stream = ctx.activation_stream(model) if missing else None
        for index, group in enumerate(ctx.progress(to_pass, f"scale: {self.method}")):
            assert stream is not None
            taps = stream.advance([group.value])
            if index in choices:
                collections.deque(taps, maxlen=0)
                continue
            choices[index] = self._watched(group, taps).choose(ctx.workers)
            work.keep(group.name, decided_by[index], to_arrays(choices[index]))
        for index, group in enumerate(groups):
            ctx.remark(group.name, choices[index].remark)
        return [choices[index].scale for index in range(len(groups))]

    def _watched(self, group: ScalingGroup, taps: Iterable[Tap]) -> Watcher:
        watcher = self._method().watch(str(group.value.name), self._targets_of(group))
        for tap in taps:
            watcher.update(tap.rows(group.value))
        return watcher

    def _decisions(self, groups: Sequence[ScalingGroup]) -> list[str]:
        """For each group what decides its scale: options, and where the run over the data stops before it."""
        options = (self.method, self.alpha, self.scheme, self.group_size, self.symmetric, self.clip)
        digest = hashlib.sha256(repr((options, self.candidates)).encode())
        found = []
        for group in groups:
            digest.update(repr([linear.name for linear in self._targets_of(group)]).encode())
            found.append(digest.hexdigest())
        return found

    def _targets_of(self, group: ScalingGroup) -> list[Linear]:
        return [linear for linear in group.linears if self._is_target(linear.name)]

    def _method(self) -> Method:
        if self.method == "smoothquant":
            return SmoothQuant(self.alpha)
        scheme = parse_scheme(self.scheme, self.group_size, self.symmetric)
        return AWQ(
            lambda dtype: scheme.grid(dtype, clip=self.clip, limit_pairs=False),
            scheme.group_size,
            self.candidates,
        )

    def _is_target(self, name: str) -> bool:
        return not matches(name, self.ignore) and (not self.targets or matches(name, self.targets))
