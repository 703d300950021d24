"""Find the pass that breaks a model by binary search over the number of passes that run.

In the manner of LLVM's OptBisect: the pipeline runs from the start with a limit on its pass invocations
(`BisectLimit`), and the smallest limit at which the check fails names the pass. Inside that pass the same
search goes on over its rewrites, if they go through the rewriting driver.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import onnx_ir as ir

from ...codegen.target import Target
from ...ir import clone
from ...ir.errors import InputError, PlanishError
from ...runtime.example_inputs import example_inputs
from ...runtime.reference import run_model
from .base import Contract, Feeds, Pass, PassResult
from .driver import run_pipeline
from .facts import facts_of
from .instruments import BisectLimit, ContractBrokenError, ContractCheck, Instrument, Invocation
from .instruments.contract import Outputs, broken_output, no_longer_finite
from .pipeline import Pipeline
from .rewrite_limit import Rewrite, RewriteLimit, limit_rewrites

Check = Callable[[ir.Model], bool]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BisectResult:
    """What a bisection found.

    Attributes:
        culprit: the first pass after which the check fails; None if it never does.
        position: its place in the pipeline, from 0; -1 without a culprit.
        reason: what is wrong after it, in one line.
        violation: the broken contract, with its layer and first differing tensor, where that is what broke.
        rewrite: the rewrite inside the pass that does it, where the pass rewrites by rules.
        runs: how often the pipeline, or a part of it, was run.
    """

    culprit: Pass | None
    position: int = -1
    reason: str = ""
    violation: ContractBrokenError | None = None
    rewrite: Rewrite | None = None
    runs: int = 0


def bisect(
    model: ir.Model,
    pipeline: Pipeline,
    *,
    target: Target,
    examples: Sequence[Feeds] = (),
    calibration: Iterable[Feeds] = (),
    seed: int = 0,
    check: Check | None = None,
    tolerance: float | None = None,
    write: Callable[[str], object] | None = None,
) -> BisectResult:
    """Find the first pass of a pipeline that breaks a model.

    What "breaks" means: ``check(model)`` is False, if a check is given. Else, with a ``tolerance``, an output
    is further than that from the input model's. Else a pass breaks its contract: between approximate passes,
    the outputs move by more than the exact passes' tolerances allow together, or stop being finite. A pass
    that raises is broken too.

    Args:
        model: the input model; not changed.
        pipeline: what to search.
        target: as in `run_pipeline`.
        examples: inputs to run on; made up from the graph's declarations if empty and needed.
        calibration: as in `run_pipeline`.
        seed: as in `run_pipeline`.
        check: True for a good model. It must accept the input model.
        tolerance: largest relative error of any output against the input model.
        write: takes one line about each step of the search.

    Raises:
        InputError: the check already fails on the input model.
        PipelineError: the order of the passes is not legal.
    """
    pipeline.check_legal(facts_of(model))
    examples = tuple(examples) or (() if check else (example_inputs(model),))
    arguments = {"target": target, "examples": examples, "calibration": tuple(calibration), "seed": seed}
    search = _Search(model, pipeline, arguments, _judge(model, pipeline, examples, check, tolerance), write)
    if search.reason(0) is not None:
        raise InputError("the check fails on the input model already, before any pass has run")
    by_contract = check is None and tolerance is None
    if search.reason(len(pipeline)) is None:
        # Errors that each stay below what a whole stretch of passes is allowed only show pass by pass.
        return search.step_by_step() if by_contract else BisectResult(culprit=None, runs=search.runs)
    limit = _first(lambda count: search.reason(count) is not None, len(pipeline))
    return search.explain(limit, by_contract=by_contract)


def _first(is_bad: Callable[[int], bool], high: int) -> int:
    """The smallest n that is bad, by binary search, given that 0 is good and ``high`` is bad."""
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_bad(middle) else (middle, high)
    return high


class _Judge(abc.ABC):
    """Says what is wrong with a model after so many passes."""

    boundaries: tuple[int, ...] = ()
    """Numbers of passes at which the model is judged too, on the way to any larger number."""

    @abc.abstractmethod
    def reason(self, count: int, model: ir.Model) -> str | None:
        """What is wrong with ``model`` after ``count`` passes; None if nothing is."""


class _CheckJudge(_Judge):
    """The user's own check."""

    def __init__(self, check: Check) -> None:
        self._check = check

    def reason(self, count: int, model: ir.Model) -> str | None:
        return None if self._check(model) else "the check fails"


class _ToleranceJudge(_Judge):
    """Every output stays within a tolerance of the input model's."""

    def __init__(self, model: ir.Model, examples: Sequence[Feeds], tolerance: float) -> None:
        self._examples = examples
        self._reference = [run_model(model, feeds) for feeds in examples]
        self._tolerance = tolerance

    def reason(self, count: int, model: ir.Model) -> str | None:
        outputs = [run_model(model, feeds) for feeds in self._examples]
        return _disagreement(outputs, self._reference, self._tolerance)


class _ContractJudge(_Judge):
    """Between approximate passes the outputs move no further than the exact ones may together."""

    def __init__(self, pipeline: Pipeline, examples: Sequence[Feeds]) -> None:
        self._passes = pipeline.passes
        self._examples = examples
        self._outputs: dict[int, Sequence[Outputs]] = {}
        approximate = [
            index for index, pass_ in enumerate(pipeline) if pass_.contract is Contract.APPROXIMATE
        ]
        self.boundaries = tuple(sorted({0, *approximate, *(index + 1 for index in approximate)}))

    def reason(self, count: int, model: ir.Model) -> str | None:
        outputs = [run_model(model, feeds) for feeds in self._examples]
        if count in self.boundaries:
            self._outputs.setdefault(count, outputs)
        if count == 0:
            return None
        start = max(boundary for boundary in self.boundaries if boundary < count)
        stretch = self._passes[start:count]
        if stretch[0].contract is Contract.APPROXIMATE:
            return _not_finite(outputs, self._outputs[start])
        # The triangle inequality: each pass may move the outputs by its own tolerance.
        return _disagreement(outputs, self._outputs[start], sum(pass_.tolerance for pass_ in stretch))


def _judge(
    model: ir.Model,
    pipeline: Pipeline,
    examples: Sequence[Feeds],
    check: Check | None,
    tolerance: float | None,
) -> _Judge:
    if check is not None:
        return _CheckJudge(check)
    if tolerance is not None:
        return _ToleranceJudge(model, examples, tolerance)
    return _ContractJudge(pipeline, examples)


def _disagreement(outputs: Sequence[Outputs], reference: Sequence[Outputs], tolerance: float) -> str | None:
    for found, expected in zip(outputs, reference, strict=True):
        broken = broken_output(found, expected, tolerance)
        if broken is not None:
            return f"output {broken.name!r} differs {broken.detail}"
    return None


def _not_finite(outputs: Sequence[Outputs], reference: Sequence[Outputs]) -> str | None:
    for found, expected in zip(outputs, reference, strict=True):
        broken = no_longer_finite(found, expected)
        if broken is not None:
            return f"output {broken.name!r} differs {broken.detail}"
    return None


class _Search:
    """Runs parts of the pipeline on copies of the model and has what comes out judged."""

    def __init__(
        self,
        model: ir.Model,
        pipeline: Pipeline,
        arguments: Mapping[str, Any],
        judge: _Judge,
        write: Callable[[str], object] | None,
    ) -> None:
        self.runs = 0
        self._model = model
        self._pipeline = pipeline
        self._arguments = arguments
        self._judge = judge
        self._write = write
        self._reasons: dict[int, str | None] = {}

    def reason(self, count: int) -> str | None:
        """What is wrong after the first ``count`` passes, here or at a boundary before."""
        for boundary in self._judge.boundaries:
            if boundary < count and (found := self._own_reason(boundary)) is not None:
                return found
        return self._own_reason(count)

    def _own_reason(self, count: int) -> str | None:
        if count not in self._reasons:
            self._reasons[count] = self._run_and_judge(count)
            if self._write is not None:
                verdict = self._reasons[count] or "good"
                self._write(f"first {count} of {len(self._pipeline)} passes: {verdict}")
        return self._reasons[count]

    def _run_and_judge(self, count: int, *instruments: Instrument) -> str | None:
        try:
            model = self._run(count, *instruments)
        except PlanishError as error:
            return str(error)
        return self._judge.reason(count, model)

    def _run(self, count: int, *instruments: Instrument) -> ir.Model:
        """A copy of the model after the first ``count`` passes."""
        self.runs += 1
        model = clone(self._model)
        run_pipeline(model, self._pipeline, instruments=(BisectLimit(count), *instruments), **self._arguments)
        return model

    def explain(self, count: int, *, by_contract: bool) -> BisectResult:
        """All that can be said about the last of the first ``count`` passes, which is the culprit."""
        position = count - 1
        violation = None
        if by_contract:
            contract = ContractCheck(self._arguments["examples"])
            with contextlib.suppress(PlanishError):  # that it fails is known; why is in the violation
                self._run(count, _OnlyAt(position, contract))
            violation = contract.violation
        return BisectResult(
            culprit=self._pipeline.passes[position],
            position=position,
            reason=violation.message if violation else self.reason(count) or "",
            violation=violation,
            rewrite=self._culprit_rewrite(count),
            runs=self.runs,
        )

    def step_by_step(self) -> BisectResult:
        """Check every pass's own contract, one after the other."""
        contract, failure = ContractCheck(self._arguments["examples"]), _FailurePosition()
        try:
            self._run(len(self._pipeline), contract, failure)
        except ContractBrokenError as violation:
            return BisectResult(
                culprit=self._pipeline.passes[failure.position],
                position=failure.position,
                reason=violation.message,
                violation=violation,
                rewrite=None,
                runs=self.runs,
            )
        return BisectResult(culprit=None, runs=self.runs)

    def _culprit_rewrite(self, count: int) -> Rewrite | None:
        """The first rewrite of the culprit pass that breaks the model; None if its rules do not."""

        def is_bad(rewrites: int) -> bool:
            probe = _LimitRewritesAt(count - 1, rewrites)
            reason = self._run_and_judge(count, probe)
            probes[rewrites] = probe
            return reason is not None

        probes: dict[int, _LimitRewritesAt] = {}
        if is_bad(0) or not is_bad(sys.maxsize):
            return None
        total = probes[sys.maxsize].count
        first = _first(is_bad, total) if total else 0
        return probes[first].last if first in probes else probes[sys.maxsize].last


class _OnlyAt(Instrument):
    """Another instrument, for one position of the pipeline only."""

    wants_copy: ClassVar[bool] = True

    def __init__(self, position: int, instrument: Instrument) -> None:
        self._position = position
        self._instrument = instrument

    def before(self, invocation: Invocation, model: ir.Model) -> None:
        if invocation.position == self._position:
            self._instrument.before(invocation, model)

    def after(self, invocation: Invocation, model: ir.Model, result: PassResult) -> None:
        if invocation.position == self._position:
            self._instrument.after(invocation, model, result)


class _FailurePosition(Instrument):
    """Notes which position of the pipeline failed."""

    position = -1

    def failed(self, invocation: Invocation, model: ir.Model, error: Exception) -> None:
        self.position = invocation.position


class _LimitRewritesAt(Instrument):
    """Lets one pass of the pipeline do only so many rewrites."""

    def __init__(self, position: int, limit: int) -> None:
        self._position = position
        self._counter = RewriteLimit(limit)

    @property
    def count(self) -> int:
        """How many rewrites there were."""
        return self._counter.count

    @property
    def last(self) -> Rewrite | None:
        """The last rewrite that happened."""
        return self._counter.last

    @contextlib.contextmanager
    def around(self, invocation: Invocation) -> Iterator[None]:
        if invocation.position != self._position:
            yield
            return
        with limit_rewrites(self._counter):
            yield
