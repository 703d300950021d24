"""The instrument protocol: what runs around every pass, in the manner of MLIR's pass instrumentation."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import onnx_ir as ir

from ....runtime.measure import Difference
from ..base import Pass, PassContext, PassResult
from ..pipeline import Pipeline


@dataclasses.dataclass
class Invocation:
    """One run of one pass: what instruments may look at, and where they leave what they measured.

    Attributes:
        pass_: the pass.
        position: its place in the pipeline, from 0.
        pipeline: the whole pipeline.
        context: what the pass was given; ``context.remarks`` grows while it runs.
        seed: the pipeline's seed.
        before: a copy of the model from before the pass (tensors shared); None unless an instrument wants it.
        seconds: wall time of the pass alone.
        peak_memory_growth: by how many bytes the pass raised the process's peak; None where not known.
        latency_ms_before: what a call took before the pass, in milliseconds; None unless it was measured.
        latency_ms_after: the same after the pass.
        errors: by output name, how far the model's outputs are from those before the pass.
    """

    pass_: Pass
    position: int
    pipeline: Pipeline
    context: PassContext
    seed: int = 0
    before: ir.Model | None = None
    seconds: float = 0.0
    peak_memory_growth: int | None = None
    latency_ms_before: float | None = None
    latency_ms_after: float | None = None
    errors: dict[str, Difference] = dataclasses.field(default_factory=dict)

    @property
    def label(self) -> str:
        """Number and name for files: ``003_fuse``."""
        return f"{self.position + 1:03}_{self.pass_.name}"


class Instrument:
    """Base of all instruments; every hook does nothing unless overridden.

    Instruments nest like brackets: ``before`` hooks run in the order given, ``after`` hooks in reverse, so
    the last instrument is the closest to the pass.
    """

    wants_copy: ClassVar[bool] = False
    """Set where ``after`` or ``failed`` needs ``invocation.before``, a copy of the model before the pass."""

    def should_run(self, invocation: Invocation, model: ir.Model) -> bool:
        """Whether the pass is to run at all; one instrument's False skips it."""
        del invocation, model
        return True

    def before(self, invocation: Invocation, model: ir.Model) -> None:
        """Called before the pass."""

    def around(self, invocation: Invocation) -> contextlib.AbstractContextManager[Any]:
        """A context in which the pass itself runs, whether it succeeds or fails."""
        del invocation
        return contextlib.nullcontext()

    def after(self, invocation: Invocation, model: ir.Model, result: PassResult) -> None:
        """Called after the pass succeeded. An exception raised here counts as the pass's failure."""

    def failed(self, invocation: Invocation, model: ir.Model, error: Exception) -> None:
        """Called after the pass, or an instrument's ``after``, raised; ``model`` may be half rewritten."""

    def progress(
        self, invocation: Invocation, items: Iterator[Any], total: int, description: str
    ) -> Iterator[Any]:
        """Wrap a loop inside the pass to show how far it is; yields the same items."""
        del invocation, total, description
        return items
