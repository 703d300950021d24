"""What "broken" means to a bisection: the user's check, a tolerance, or the contracts of the passes."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence

import onnx_ir as ir

from ...ir.errors import InputError
from ...runtime.reference import run_model
from .base import Contract, Feeds
from .instruments.contract import Outputs, broken_output, no_longer_finite, rounding
from .pipeline import Pipeline

Check = Callable[[ir.Model], bool]
"""True for a good model."""


class Judge(abc.ABC):
    """Says what is wrong with a model after so many passes."""

    boundaries: tuple[int, ...] = ()
    """Numbers of passes at which the model is judged too, on the way to any larger number."""

    @abc.abstractmethod
    def reason(self, count: int, model: ir.Model) -> str | None:
        """What is wrong with ``model`` after ``count`` passes; None if nothing is."""


class CheckJudge(Judge):
    """The user's own check."""

    def __init__(self, check: Check) -> None:
        self._check = check

    def reason(self, count: int, model: ir.Model) -> str | None:
        """What the check answers.

        Raises:
            InputError: the check raised.
        """
        try:
            is_good = self._check(model)
        except Exception as error:
            raise InputError(f"the check raised {error!r}") from error
        return None if is_good else "the check fails"


class ToleranceJudge(Judge):
    """Every output stays within a tolerance of the input model's."""

    def __init__(self, model: ir.Model, examples: Sequence[Feeds], tolerance: float) -> None:
        self._examples = examples
        self._reference = [run_model(model, feeds) for feeds in examples]
        self._tolerance = tolerance

    def reason(self, count: int, model: ir.Model) -> str | None:
        """The first output that is further off."""
        outputs = [run_model(model, feeds) for feeds in self._examples]
        return _disagreement(outputs, self._reference, self._tolerance)


class ContractJudge(Judge):
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
        """The first output that moved too far since the last boundary."""
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
        tolerance = max(sum(pass_.tolerance for pass_ in stretch), rounding(model))
        return _disagreement(outputs, self._outputs[start], tolerance)


def judge_of(
    model: ir.Model,
    pipeline: Pipeline,
    examples: Sequence[Feeds],
    check: Check | None,
    tolerance: float | None,
) -> Judge:
    """Judge by the user's check, if there is one, else by a tolerance, else by the passes' contracts."""
    if check is not None:
        return CheckJudge(check)
    if tolerance is not None:
        return ToleranceJudge(model, examples, tolerance)
    return ContractJudge(pipeline, examples)


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
