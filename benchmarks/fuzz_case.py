"""One case of the fuzzer: a random model, a random pipeline, and onnxruntime before and after as the oracle.

What has to hold of a case:

- Nothing but planish's own errors is raised, and those only for reasons that they state. A pass that refuses
  a model is left out and counted, and the rest of the pipeline goes on.
- After exact passes alone, every output agrees with the original's, as onnxruntime computes it without graph
  optimisation: within the sum of the passes' tolerances, relative to the output's largest number. Where a
  model itself answers more strongly than that to a rounding of all its weights and inputs (`response`), it is
  allowed 64 times its answer: the numbers of two ways to compute it cannot agree better.
- After approximate passes, every output is finite, and on the inputs of the contract check no further from
  the original's than the errors together that the passes reported: ‖fₙ − f₀‖ ≤ Σ ‖fᵢ − fᵢ₋₁‖.
- What a target's kernels may add: the largest error that it accepts of a kernel, times the largest growth of
  a relative error in the model; and where activations are quantised once more what that cost, because float
  rounding moves some of them to the next step of their grid.
- The same seed gives the same bytes; a saved model is opened and gives the same numbers; a decoder's greedy
  tokens have the largest logits of the original, within what is allowed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import signal
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import planish
from onnx import numpy_helper
from planish.codegen import get_target
from planish.codegen.target import Target
from planish.ir import ops
from planish.ir.errors import (
    InputError,
    NothingCoveredError,
    PassError,
    PipelineError,
    PlanishError,
    TargetError,
)
from planish.passes.infrastructure.base import Contract, Coverage, PassResult
from planish.passes.infrastructure.instruments import Instrument, Invocation
from planish.passes.infrastructure.instruments.contract import ContractBrokenError, without_past
from planish.passes.infrastructure.pipeline import Pipeline
from planish.runtime.calibration.data import fitted
from planish.runtime.localize import relative_error
from random_models import Feeds, RandomModel, random_model
from random_pipelines import random_pipeline

Array = npt.NDArray[Any]

SECONDS = 120
"""A case that takes longer hangs."""
RESPONSES = 64
"""How many times a model's own answer to rounding two ways to compute it may differ by."""
INTEGER_KERNELS = 1e-2
"""What onnxruntime's choice of kernels for quantised weights may differ by, the target's ``max_error``."""
EXACT_KERNELS = 1e-4
"""What kernels of float weights may differ by: the tolerance of exact passes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is run; all of it follows from the seed, unless it was made smaller.

    Attributes:
        seed: of everything.
        blocks: numbers of the model's blocks that are built; None for all.
        pipeline: the passes; None for those of the seed.
        traced: whether architectures that are traced may be drawn.
    """

    seed: int
    blocks: tuple[int, ...] | None = None
    pipeline: Pipeline | None = None
    traced: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal:
    """A pass that did not want a model, and what it said."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a case.

    Attributes:
        family: of the model.
        blocks: names of the model's blocks.
        pipeline: the passes that were drawn.
        target: where it was to run.
        ran: names of the passes that ran.
        refusals: of the others.
        failure: what is wrong; empty if nothing is.
        trace: where it was raised, if it was.
        is_exact: whether only exact passes ran.
        error: the largest error of an output relative to what was allowed.
    """

    family: str
    blocks: tuple[str, ...]
    pipeline: str
    target: str
    ran: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    failure: str = ""
    trace: str = ""
    is_exact: bool = False
    error: float = 0.0


class _FindingError(Exception):
    """Something that must not be."""


@dataclasses.dataclass
class _Watch(Instrument):
    """Notes what the passes say."""

    redefined: set[str] = dataclasses.field(default_factory=set)
    coverages: dict[str, Coverage | None] = dataclasses.field(default_factory=dict)

    def after(self, invocation: Invocation, model: ir.Model, result: PassResult) -> None:
        """Note outputs with a new meaning."""
        del model
        self.redefined |= result.redefined_outputs
        self.coverages[invocation.pass_.name] = result.coverage


def run_case(case: Case) -> Outcome:
    """Run a case and judge it."""
    model = random_model(case.seed, only=case.blocks, traced=case.traced)
    has_cache = any(given.tensor.name.startswith("past_key_values") for given in model.inputs)
    pipeline = case.pipeline
    if pipeline is None:
        pipeline = random_pipeline(case.seed, has_cache=has_cache)
    target = _target(case.seed)
    run = _Run(case.seed, model, target)
    outcome = Outcome(
        family=model.family, blocks=tuple(model.blocks), pipeline=str(pipeline), target=_target_text(target)
    )
    failure = trace = ""
    try:
        with _limited(SECONDS):
            run.judge(pipeline)
    except _FindingError as finding:
        failure = str(finding)
    except Exception as error:  # noqa: BLE001 (whatever is raised is a finding)
        failure, trace = f"{type(error).__name__}: {_one_line(error)}", traceback.format_exc()
    return dataclasses.replace(
        outcome,
        ran=run.ran,
        refusals=tuple(run.refusals),
        failure=failure,
        trace=trace,
        is_exact=run.is_exact,
        error=run.worst,
    )


def _target(seed: int) -> Target:
    rng = np.random.default_rng((seed, 2))
    if rng.random() < 0.45:
        return get_target("portable")
    return get_target("onnxruntime-cpu", rows=(4,), max_error=float(rng.choice([1e-2, 1e-3])))


def _target_text(target: Target) -> str:
    return f"{target.name} {getattr(target, 'max_error', '')}".strip()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:600]


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"it takes longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class _Run:
    """One case on its way."""

    def __init__(self, seed: int, model: RandomModel, target: Target) -> None:
        self.seed, self.model, self.target = seed, model, target
        self.refusals: list[Refusal] = []
        self.ran: tuple[str, ...] = ()
        self.is_exact = False
        self.worst = 0.0
        self._rng = np.random.default_rng((seed, 3))
        self._original = plain_session(model.proto)
        self._examples = model.feeds(seed)
        self._calibration = [model.feeds(seed + index, padded=False) for index in range(1, 4)]
        for feeds in self._calibration:
            for name in [name for name in feeds if name.startswith("past_key_values")]:
                feeds[name] = feeds[name][:, :, :0]
            _without_past_elsewhere(feeds)

    def judge(self, pipeline: Pipeline) -> None:
        """Compile, run and compare.

        Raises:
            _FindingError: something is wrong.
        """
        pipeline, watch, compiled = self._compile_what_goes(pipeline)
        self.ran = tuple(pass_.name for pass_ in pipeline)
        self.is_exact = all(pass_.contract is Contract.EXACT for pass_ in pipeline)
        self._compare(pipeline, watch, compiled, self._examples, is_example=True)
        self._compare(pipeline, watch, compiled, self.model.feeds(self.seed + 7), is_example=False)
        if self._rng.random() < 0.1:
            self._check_same_again(pipeline, compiled)
        if self._rng.random() < 0.1:
            self._check_saved(compiled)
        if self.is_exact and self._rng.random() < 0.3:
            self._check_generated(compiled)

    def _compile_what_goes(self, pipeline: Pipeline) -> tuple[Pipeline, _Watch, planish.CompiledModel]:
        """Compile with the passes that accept the model."""
        while True:
            watch = _Watch()
            try:
                return pipeline, watch, self._compile(pipeline, watch)
            except PlanishError as error:
                pipeline = self._without_refusing(pipeline, error)

    def _compile(self, pipeline: Pipeline, watch: _Watch) -> planish.CompiledModel:
        return planish.compile(
            self.model.proto,
            pipeline,
            example_inputs=self._examples,
            calibration=self._calibration,
            target=self.target,
            check="contract",
            seed=self.seed,
            instruments=[watch],
        )

    def _without_refusing(self, pipeline: Pipeline, error: PlanishError) -> Pipeline:
        """The passes without the one that refused the model, if that is what happened."""
        if isinstance(error, ContractBrokenError):
            raise _FindingError(self._contract_text(error))
        unexpected = error.__cause__
        if unexpected is not None and f": {type(unexpected).__name__}: " in error.message:
            where = "".join(traceback.format_tb(unexpected.__traceback__, limit=-3))
            raise _FindingError(f"{_one_line(error)} | {' '.join(where.split())[-500:]}")
        named = re.match(r"pass '([\w-]+)'", error.message)
        positions = [i for i, pass_ in enumerate(pipeline) if named and pass_.name == named.group(1)]
        if named is None or not positions or not _is_refusal(error):
            raise _FindingError(f"{type(error).__name__}: {_one_line(error)}")
        self.refusals.append(Refusal(name=named.group(1), reason=_normalized(error)))
        # Where the pass is there twice, the later one meets a model that was changed already.
        position = positions[-1]
        return Pipeline((*pipeline.passes[:position], *pipeline.passes[position + 1 :]))

    def _contract_text(self, error: ContractBrokenError) -> str:
        response = self._response(self._examples).get(error.output, 0.0)
        text = f"ContractBrokenError: {_one_line(error)}"
        return f"{text} (the model answers {response:.2g} to rounding)"

    # Numbers.

    def _compare(
        self,
        pipeline: Pipeline,
        watch: _Watch,
        compiled: planish.CompiledModel,
        feeds: Feeds,
        *,
        is_example: bool,
    ) -> None:
        has_past = any(name.startswith("past_key_values") and feeds[name].shape[2] for name in feeds)
        if watch.redefined or "GroupQueryAttention" in {node.op_type for node in compiled.bound.model.graph}:
            # That kernel takes several tokens on top of a past of one text only; `_check_generated` has both.
            feeds = dict(without_past(feeds))
        windows = _windows(compiled)
        found = compiled.run(_of_model(_with_buffers(feeds, windows), compiled))
        expected = self._original(feeds)
        # Errors were reported for a cache that was not empty.
        is_bounded = is_example and not (watch.redefined and has_past)
        for name in expected:
            if name in watch.redefined or name.replace("present", "past_key_values", 1) in windows:
                continue
            if name not in found:
                raise _FindingError(f"output {name!r} is gone")
            self._check_output(name, found[name], expected[name], pipeline, compiled, is_bounded, feeds)

    def _check_output(
        self,
        name: str,
        found: Array,
        expected: Array,
        pipeline: Pipeline,
        compiled: planish.CompiledModel,
        is_bounded: bool,
        feeds: Feeds,
    ) -> None:
        if name == "logits" and "last-logits" in self.ran:
            expected = expected[:, -1:]
        if found.shape != expected.shape or found.dtype != expected.dtype:
            raise _FindingError(
                f"output {name!r}: {found.dtype}{list(found.shape)} instead of "
                f"{expected.dtype}{list(expected.shape)}"
            )
        if not np.isfinite(found).all() and np.isfinite(expected).all():
            raise _FindingError(f"output {name!r} is not finite")
        if not self.is_exact and not is_bounded:
            return
        error, detail = relative_error(found, expected)
        allowed = self._allowed(name, expected, pipeline, compiled)
        if error > allowed:
            allowed += RESPONSES * self._response(feeds).get(name, 0.0)
        self.worst = max(self.worst, error / allowed)
        if error > allowed:
            raise _FindingError(f"output {name!r} differs {detail}, allowed are {allowed:.2g}")

    def _allowed(
        self, name: str, expected: Array, pipeline: Pipeline, compiled: planish.CompiledModel
    ) -> float:
        """Relative to the output's largest number."""
        scale = float(np.abs(expected).max()) if expected.size else 1.0
        exact = sum(pass_.tolerance for pass_ in pipeline if pass_.contract is Contract.EXACT)
        approximate = sum(
            report.errors[name].max_absolute / (scale or 1.0)
            for report, pass_ in zip(compiled.report.passes, pipeline, strict=True)
            if pass_.contract is Contract.APPROXIMATE and name in report.errors
        )
        return exact + 1.1 * approximate + self._kernels(compiled, approximate)

    def _kernels(self, compiled: planish.CompiledModel, approximate: float) -> float:
        """What the target's kernels may add."""
        nodes = [node for node in compiled.model.graph.all_nodes() if node.domain == ops.DOMAIN]
        if not nodes:
            return EXACT_KERNELS
        grows = self._growth()
        # Of what a portable model dequantises, onnxruntime makes kernels that quantise activations in blocks.
        largest = float(getattr(self.target, "max_error", INTEGER_KERNELS))
        return EXACT_KERNELS * grows + approximate + largest * grows * len(nodes) ** 0.5

    def _growth(self) -> float:
        """By how much a relative error of all weights grows on its way to an output, at most."""
        step = 1e-3
        answers = _answers(self.model.proto, self._examples, step, self._original)
        return max(1.0, max(answers.values(), default=0.0) / step)

    def _response(self, feeds: Feeds) -> Mapping[str, float]:
        """How strongly each output answers to a rounding of all weights and inputs."""
        step = 2.0**-11 if self.model.has_half else 2.0**-23
        return _answers(self.model.proto, feeds, step, self._original)

    # Again, from a file, and token after token.

    def _check_same_again(self, pipeline: Pipeline, compiled: planish.CompiledModel) -> None:
        again = self._compile(pipeline, _Watch())
        first, second = (ir.to_proto(each.bound.model).SerializeToString() for each in (compiled, again))
        if first != second:
            raise _FindingError("the same compilation gives another model")

    def _check_saved(self, compiled: planish.CompiledModel) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = compiled.save(Path(folder) / "saved")
            opened = planish.CompiledModel.open(path.parent, target=self.target)
            feeds = _of_model(self._examples, compiled)
            found, expected = opened.run(feeds), compiled.run(feeds)
        for name, array in expected.items():
            if not np.array_equal(found[name], array, equal_nan=array.dtype.kind == "f"):
                raise _FindingError(f"output {name!r} of the saved model is another")

    def _check_generated(self, compiled: planish.CompiledModel) -> None:
        names = set(compiled.input_names)
        if "past_key_values.0.key" not in names or "input_ids" not in names:
            return
        ids = self._examples["input_ids"][:1]
        text = compiled.generate(ids, 4)
        feeds = {name: array[:1] for name, array in without_past(self._examples).items()}
        feeds |= {"input_ids": text, "attention_mask": np.ones_like(text)}
        if "position_ids" in feeds:
            feeds["position_ids"] = np.arange(text.shape[1])[None]
        logits = self._original(feeds)["logits"][0]
        slack = 1e-3 * float(np.abs(logits).max()) + RESPONSES * self._response(feeds)["logits"]
        for position in range(ids.shape[1], text.shape[1]):
            row = logits[position - 1]
            if row[text[0, position]] < row.max() - slack:
                raise _FindingError(
                    f"token {position} that was generated is not the original's most likely one"
                )


def _without_past_elsewhere(feeds: Feeds) -> None:
    """Masks and positions of a cache that has been emptied."""
    length = feeds["input_ids"].shape[1] if "input_ids" in feeds else 0
    for name in ("attention_mask", "position_ids"):
        if name in feeds and any(each.startswith("past_key_values") for each in feeds):
            feeds[name] = feeds[name][:, -length:]
            if name == "position_ids":
                feeds[name] = np.broadcast_to(np.arange(length), feeds[name].shape).copy()


def _of_model(feeds: Feeds, compiled: planish.CompiledModel) -> Feeds:
    return dict(fitted(feeds, compiled.bound.model))


def _windows(compiled: planish.CompiledModel) -> dict[str, int]:
    """The pasts in which a kernel forgets what lies before a window, and how many tokens that has."""
    return {
        str(past.name): node.attributes["local_window_size"].as_int()
        for node in compiled.bound.model.graph
        if "sliding_window_cache" in node.attributes
        for past in node.inputs[3:5]
        if past is not None
    }


def _with_buffers(feeds: Feeds, windows: Mapping[str, int]) -> Feeds:
    """Buffers that such a kernel has room in, instead of pasts of no tokens."""
    return {
        name: np.zeros((*array.shape[:2], windows[name], array.shape[3]), array.dtype)
        if name in windows
        else array
        for name, array in feeds.items()
    }


def plain_session(proto: onnx.ModelProto) -> Any:
    """The model as onnxruntime runs it node by node: feeds to outputs by name."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(None, dict(feeds)), strict=True))


def _answers(proto: onnx.ModelProto, feeds: Feeds, step: float, original: Any) -> dict[str, float]:
    """‖f(w·(1 + step·ξ)) − f(w)‖∞ / ‖f(w)‖∞ of each output for random signs ξ; the largest of three.

    Weights are arrays of more than one number: a scalar may be an exponent.
    """
    expected = original(feeds)
    made_of = {name: node.input for node in proto.graph.node for name in node.output}
    pending = [node.input[2] for node in proto.graph.node if node.op_type == "Resize"]
    factors = set[str]()
    while pending:
        name = pending.pop()
        factors.add(name)
        pending += made_of.get(name, ())
    answers = dict.fromkeys(expected, 0.0)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        moved = onnx.ModelProto()
        moved.CopyFrom(proto)
        for tensor in moved.graph.initializer:
            array = numpy_helper.to_array(tensor)
            if array.dtype.kind == "f" and array.size > 1 and tensor.name not in factors:
                tensor.CopyFrom(numpy_helper.from_array(_moved(array, step, rng), tensor.name))
        near = {
            name: _moved(array, step, rng) if array.dtype.kind == "f" else array
            for name, array in feeds.items()
        }
        found = plain_session(moved)(near)
        for name in expected:
            error, _ = relative_error(found[name], expected[name])
            answers[name] = max(answers[name], error)
    return answers


def _moved(array: Array, step: float, rng: np.random.Generator) -> Array:
    moved: Array = (array * (1 + step * rng.choice([-1.0, 1.0], array.shape))).astype(array.dtype)
    return moved


def _is_refusal(error: PlanishError) -> bool:
    """Whether a pass says of a model that it does not want it, and not that it has broken it."""
    if isinstance(error, (InputError, TargetError)):
        return not re.search(r"onnxruntime|\binput '|inputs do not match", error.message)
    return isinstance(error, (NothingCoveredError, PipelineError, PassError))


def _normalized(error: PlanishError) -> str:
    """What was said, without the names and numbers of one model."""
    text = re.sub(r"^pass '[\w-]+': ", "", error.message)
    nothing = re.match(r"covered nothing: .* skipped: ([^,(]*)", text)
    text = text if nothing is None else f"covered nothing: {nothing.group(1)}"
    text = re.sub(r"'[^']*'", "'…'", text)
    text = re.sub(r"(?<![\w'])[\w./:]+(?:\.[\w./:]+)+", "…", text)
    return re.sub(r"\d+(\.\d+)?", "n", text)[:160]


def smaller(case: Case, outcome: Outcome, *, most: int = 40) -> tuple[Case, Outcome]:
    """A case with fewer passes, options and blocks that fails in the same way; few are tried."""
    kind = _kind(outcome)
    for _ in range(most):
        for candidate in _candidates(case, outcome):
            most -= 1
            try:
                found = run_case(candidate)
            except Exception:  # noqa: BLE001 (without these blocks there is no model)
                continue
            if found.failure and _kind(found) == kind:
                case, outcome = candidate, found
                break
            if most <= 0:
                return case, outcome
        else:
            return case, outcome
    return case, outcome


def _kind(outcome: Outcome) -> str:
    return re.sub(r"'[^']*'|\d+(\.\d+)?(e-?\d+)?", "", outcome.failure)[:40]


def _candidates(case: Case, outcome: Outcome) -> Iterator[Case]:
    pipeline = case.pipeline or Pipeline.of(outcome.pipeline)
    for position in reversed(range(len(pipeline))):
        rest = (*pipeline.passes[:position], *pipeline.passes[position + 1 :])
        yield dataclasses.replace(case, pipeline=Pipeline(rest))
    blocks: Sequence[int] = case.blocks if case.blocks is not None else range(len(outcome.blocks))
    for number in blocks:
        kept = tuple(other for other in blocks if other != number)
        yield dataclasses.replace(case, blocks=kept, pipeline=pipeline)
    for position, pass_ in enumerate(pipeline):
        for option in pass_.changed_options():
            with contextlib.suppress(PlanishError, TypeError):
                options = {name: value for name, value in pass_.changed_options().items() if name != option}
                changed = (
                    *pipeline.passes[:position],
                    type(pass_)(**options),
                    *pipeline.passes[position + 1 :],
                )
                yield dataclasses.replace(case, pipeline=Pipeline(changed))
