"""How long models take where they will run, end to end, relative to the original one.

Single pieces are timed with their weights in the cache and without their neighbours, so their sum only
*predicts* what a model takes. What counts is measured here: the original and the candidate, both with the
passes that come after pruning, bound to the target and run in turns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from ...codegen.target import Target
from ...runtime.calibration.data import fitted
from ...runtime.latency_table import deployment_feeds, end_to_end_latency
from ..infrastructure.base import Fact, Feeds
from ..infrastructure.driver import run_pipeline
from ..infrastructure.facts import set_facts
from ..infrastructure.pipeline import Pipeline
from .deployed import deployed

_ORIGINAL, _CANDIDATE = "original", "candidate"
_SECONDS, _FEWEST, _MOST = 6.0, 12, 48
"""How long a pair of models is timed, about, in seconds, and the limits of the number of rounds."""
_CAREFUL = 3
"""How many times longer a pair is timed where the result decides."""
_ROUND_MS = 100.0
"""Of a round's pauses."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """What a candidate takes beside the original, in seconds.

    Attributes:
        original: the median.
        candidate: the original's median over the speed-up, which is the median of the rounds' own.
    """

    original: float
    candidate: float

    @property
    def speedup(self) -> float:
        """How many times faster the candidate is."""
        return self.original / self.candidate


class Deployment:
    """A target, the size of the inputs there, and the passes that models go through on their way to it.

    Args:
        original: what speed-ups are relative to; not changed.
        target: where models run.
        batch: samples of a call.
        sequence: tokens of a sample, where inputs have such an axis.
        examples: real inputs to tile to that size; made up if none has all inputs of ``original``, such as
            the caches that a pass before this one has removed.
        deployed_with: text of the pipeline.
    """

    def __init__(
        self,
        original: ir.Model,
        *,
        target: Target,
        batch: int,
        sequence: int,
        examples: Sequence[Feeds],
        deployed_with: str,
    ) -> None:
        self.target = target
        self.batch, self.sequence = batch, sequence
        self.deployed_with = deployed_with
        self.feeds = deployment_feeds(
            original, batch=batch, sequence=sequence, examples=_complete(examples, original)
        )
        self._original = self.deployed(original)
        self._rounds = _FEWEST

    def deployed(self, model: ir.Model) -> ir.Model:
        """A clone of a model with the passes applied."""
        return deployed(model, self.deployed_with, self.target)

    def prepare(self, piece: ir.Model) -> None:
        """Apply the passes to a piece of a canonical model, in place."""
        set_facts(piece, {Fact.CANONICAL})
        run_pipeline(piece, Pipeline.parse(self.deployed_with), target=self.target)

    def feeds_of(self, model: ir.Model) -> Feeds:
        """The inputs, fitted to a model that has lost some of them."""
        return fitted(self.feeds, model)

    def measure(self, candidate: ir.Model, *, careful: bool = False) -> Timing:
        """Time a candidate, canonical as it comes from pruning, against the original.

        Args:
            candidate: not changed.
            careful: for longer, because the candidate may be the result.
        """
        models = {_ORIGINAL: self._original, _CANDIDATE: self.deployed(candidate)}
        latency = end_to_end_latency(
            models,
            target=self.target,
            feeds=self.feeds,
            repeats=self._rounds * (_CAREFUL if careful else 1),
            burst=1,
        )
        before, after = latency[_ORIGINAL], latency[_CANDIDATE]
        # In each round, one call of either is counted, and one before it is not.
        round_ms = 2 * (before.median_ms + after.median_ms) + _ROUND_MS
        self._rounds = max(_FEWEST, min(_MOST, round(_SECONDS * 1e3 / round_ms)))
        seconds = before.median_ms / 1e3
        return Timing(seconds, seconds / after.speedup_over(before))


def _complete(examples: Sequence[Feeds], model: ir.Model) -> list[Feeds]:
    """Those that have all inputs of a model."""
    inputs = {str(value.name) for value in model.graph.inputs if value.name not in model.graph.initializers}
    return [feeds for feeds in examples if inputs <= set(feeds)]
