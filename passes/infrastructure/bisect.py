"""Find the pass that breaks a model, then the layer, then the rewrite, by binary search.

In the manner of LLVM's OptBisect: the pipeline runs from the start with a limit on its pass invocations
(`BisectLimit`), and the smallest limit at which the check fails names the pass. The same search goes on
inside that pass: over the layers that it may touch, if it can be told which, and over its rewrites, if they
go through the rewriting driver.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import onnx_ir as ir

from ...codegen.target import Target
from ...ir import clone
from ...ir.errors import InputError, PlanishError
from ...ir.outline import outline
from ...runtime.example_inputs import example_inputs
from ...runtime.localize import first_difference, nearest_layer
from .base import Contract, Feeds, Pass, PassResult
from .bisect_judges import Check, Judge, judge_of
from .bisect_layers import layers_of, without_layers
from .driver import run_pipeline
from .facts import facts_of
from .instruments import BisectLimit, ContractBrokenError, ContractCheck, Instrument, Invocation
from .pipeline import Pipeline
from .rewrite_limit import Rewrite, RewriteLimit, limit_rewrites


@dataclasses.dataclass(frozen=True, kw_only=True)
class BisectResult:
    """What a bisection found.

    Attributes:
        culprit: the first pass after which the check fails; None if it never does.
        position: its place in the pipeline, from 0; -1 without a culprit.
        reason: what is wrong after it, in one line.
        error: class of the error that the culprit raised, and of its cause; empty if it did not raise.
        violation: the broken contract, with its layer and first differing tensor, where that is what broke.
        layer: where in the model it happens: the layer whose turn makes the check fail when the culprit takes
            one after the other, else that of the rewrite or of the first differing tensor; empty if unknown.
        rewrite: the rewrite inside the pass that does it, where the pass rewrites by rules.
        runs: how often the pipeline, or a part of it, was run.
    """

    culprit: Pass | None
    position: int = -1
    reason: str = ""
    error: tuple[type[BaseException], ...] = ()
    violation: ContractBrokenError | None = None
    layer: str = ""
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
    search = _Search(model, pipeline, arguments, judge_of(model, pipeline, examples, check, tolerance), write)
    if search.failure(0) is not None:
        raise InputError("the check fails on the input model already, before any pass has run")
    by_contract = check is None and tolerance is None
    if search.failure(len(pipeline)) is None:
        # Errors that each stay below what a whole stretch of passes is allowed only show pass by pass.
        return search.step_by_step() if by_contract else BisectResult(culprit=None, runs=search.runs)
    limit = first_bad(lambda count: search.failure(count) is not None, len(pipeline))
    return search.explain(limit, by_contract=by_contract)


def first_bad(is_bad: Callable[[int], bool], high: int) -> int:
    """The smallest n that is bad, by binary search, given that 0 is good and ``high`` is bad."""
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_bad(middle) else (middle, high)
    return high


@dataclasses.dataclass(frozen=True)
class Failure:
    """What is wrong with a model, in one line, and the kind of error if a pass raised one."""

    reason: str
    kind: tuple[type[BaseException], ...] = ()

    @classmethod
    def of(cls, error: PlanishError) -> Failure:
        """A pass raised: errors are alike if they, and what caused them, are of one class."""
        causes = (error, error.__cause__)
        return cls(str(error), tuple(type(cause) for cause in causes if cause is not None))


class _Search:
    """Runs parts of the pipeline on copies of the model and has what comes out judged."""

    def __init__(
        self,
        model: ir.Model,
        pipeline: Pipeline,
        arguments: Mapping[str, Any],
        judge: Judge,
        write: Callable[[str], object] | None,
    ) -> None:
        self.runs = 0
        self._model = model
        self._pipeline = pipeline
        self._arguments = arguments
        self._judge = judge
        self._write = write
        self._failures: dict[int, Failure | None] = {}

    def failure(self, count: int) -> Failure | None:
        """What is wrong after the first ``count`` passes, here or at a boundary before."""
        for boundary in self._judge.boundaries:
            if boundary < count and (found := self._own_failure(boundary)) is not None:
                return found
        return self._own_failure(count)

    def _own_failure(self, count: int) -> Failure | None:
        if count not in self._failures:
            found = self._run_and_judge(count)
            self._failures[count] = found
            self._say(f"first {count} of {len(self._pipeline)} passes", found)
        return self._failures[count]

    def _say(self, what: str, found: Failure | None) -> None:
        if self._write is not None:
            self._write(f"{what}: {'good' if found is None else found.reason}")

    def _run_and_judge(
        self, count: int, *instruments: Instrument, pipeline: Pipeline | None = None
    ) -> Failure | None:
        try:
            model = self._run(count, *instruments, pipeline=pipeline)
        except PlanishError as error:
            return Failure.of(error)
        reason = self._judge.reason(count, model)
        return None if reason is None else Failure(reason)

    def _run(self, count: int, *instruments: Instrument, pipeline: Pipeline | None = None) -> ir.Model:
        """A copy of the model after the first ``count`` passes, of another pipeline if one is given."""
        self.runs += 1
        model = clone(self._model)
        run_pipeline(
            model,
            pipeline or self._pipeline,
            instruments=(BisectLimit(count), *instruments),
            **self._arguments,
        )
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
        rewrite, layer = self._culprit_rewrite(count)
        failure = self.failure(count)
        assert failure is not None
        return BisectResult(
            culprit=self._pipeline.passes[position],
            position=position,
            reason=violation.message if violation else failure.reason,
            error=failure.kind,
            violation=violation,
            layer=self._culprit_layer(count, failure) or layer or self._differing_layer(count, violation),
            rewrite=rewrite,
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
                layer=violation.first.layer if violation.first else "",
                rewrite=None,
                runs=self.runs,
            )
        return BisectResult(culprit=None, runs=self.runs)

    def _culprit_layer(self, count: int, failure: Failure) -> str:
        """The layer that breaks the model as soon as the culprit may touch it, after those before it."""
        passes = self._pipeline.passes
        culprit = passes[count - 1]
        if without_layers(culprit, ()) is None:
            return ""
        names = layers_of(culprit, outline(self._run(count - 1)))

        def is_bad(touched: int) -> bool:
            limited = without_layers(culprit, names[touched:])
            pipeline = Pipeline((*passes[: count - 1], limited or culprit, *passes[count:]))
            found = self._run_and_judge(count, pipeline=pipeline)
            is_same = found is not None and found.kind == failure.kind
            self._say(
                f"{culprit.name} on the first {touched} of {len(names)} layers", found if is_same else None
            )
            return is_same

        if not names or is_bad(0):
            return ""  # what is wrong is none of the layers
        return names[first_bad(is_bad, len(names)) - 1]

    def _differing_layer(self, count: int, violation: ContractBrokenError | None) -> str:
        """The layer of the first tensor that an exact pass changes."""
        if violation is not None:
            return violation.first.layer if violation.first else ""
        culprit = self._pipeline.passes[count - 1]
        if culprit.contract is Contract.APPROXIMATE or not self._arguments["examples"]:
            return ""
        feeds = self._arguments["examples"][0]
        with contextlib.suppress(PlanishError):  # it raised, or what it left cannot be run
            before, after = self._run(count - 1), self._run(count)
            found = first_difference(before, after, feeds, tolerance=culprit.tolerance)
            return found.layer if found else ""
        return ""

    def _culprit_rewrite(self, count: int) -> tuple[Rewrite | None, str]:
        """The first rewrite of the culprit that breaks the model, and its layer; None if no rule does."""

        def is_bad(rewrites: int) -> bool:
            probe = _LimitRewritesAt(count - 1, rewrites)
            found = self._run_and_judge(count, probe)
            probes[rewrites] = probe
            return found is not None

        probes: dict[int, _LimitRewritesAt] = {}
        if is_bad(0) or not is_bad(sys.maxsize):
            return None, ""
        total = probes[sys.maxsize].count
        first = first_bad(is_bad, total) if total else 0
        rewrite = (probes.get(first) or probes[sys.maxsize]).last
        if rewrite is None:
            return None, ""
        before = self._run(count, _LimitRewritesAt(count - 1, first - 1))
        roots = [node for node in before.graph.all_nodes() if node.name == rewrite.node]
        return rewrite, nearest_layer(roots)


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
