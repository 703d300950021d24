"""How long the model takes before and after every pass, bound to the target and run in turns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import onnx_ir as ir

from ....codegen.target import Target
from ....runtime.calibration.data import fitted
from ....runtime.example_inputs import example_inputs
from ....runtime.executor import open_executor
from ....runtime.measure import interleaved_latency
from ..base import Feeds, PassResult
from .base import Instrument, Invocation


class LatencyAfterEachPass(Instrument):
    """Writes ``latency_ms_before`` and ``latency_ms_after`` of the invocation.

    Two models are held, as the target binds them, while one is timed against the other.

    Args:
        examples: inputs, of which the first is run; made up from the graph's declarations if empty.
        repeats: counted runs of each model.
    """

    def __init__(self, examples: Sequence[Feeds] = (), *, repeats: int = 24) -> None:
        self._examples = tuple(examples)
        self._repeats = repeats
        self._model: ir.Model | None = None
        self._run: Callable[[], object] | None = None

    def before(self, invocation: Invocation, model: ir.Model) -> None:
        """Bind the model as it comes, unless the pass before left it so."""
        if self._model is not model:
            self._model = model
            self._run = self._bound(model, invocation.context.target)

    def after(self, invocation: Invocation, model: ir.Model, result: PassResult) -> None:
        """Time what the pass left against what it was given."""
        del result
        assert self._run is not None
        now = self._bound(model, invocation.context.target)
        latencies = interleaved_latency({"before": self._run, "after": now}, repeats=self._repeats)
        invocation.latency_ms_before = latencies["before"].median_ms
        invocation.latency_ms_after = latencies["after"].median_ms
        self._run = now

    def _bound(self, model: ir.Model, target: Target) -> Callable[[], object]:
        if not self._examples:
            self._examples = (example_inputs(model),)
        feeds = fitted(self._examples[0], model)
        return functools.partial(open_executor(target.bind(model), target).run, feeds)
