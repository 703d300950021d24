"""Does every pass keep its contract? Checked by running the model before and after it on real inputs.

Exact passes: every output must agree, ``‖after − before‖∞ ≤ tolerance · ‖before‖∞``, for a tolerance that the
pass states, or for the `rounding` of a model that computes in fewer bits than float32. Where one does not,
the error names the pass, the output, and the first tensor that differs with its layer. Approximate passes:
the error they caused is measured and goes into the report.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from ....ir.errors import ContractError
from ....ir.walk import all_values
from ....runtime.calibration.data import fitted, input_types
from ....runtime.example_inputs import example_inputs
from ....runtime.localize import TensorDifference, first_difference, relative_error
from ....runtime.measure import difference
from ....runtime.reference import run_model
from ..base import Contract, Feeds, Pass, PassResult
from .base import Instrument, Invocation

Outputs = Mapping[str, Any]

# Sums of a few thousand terms, taken in another order, lose a few of the last bits.
_EPSILONS_ALLOWED = 16
_EPSILONS = {ir.DataType.FLOAT16: 2.0**-10, ir.DataType.BFLOAT16: 2.0**-7}
_PAST = "past_key_values."


class ContractBrokenError(ContractError):
    """A pass broke its contract.

    Attributes:
        pass_name: the pass.
        output: the first graph output that is wrong.
        error: its `relative_error`.
        first: the first tensor that differs, and its layer; None if all tensors that both graphs have agree.
    """

    def __init__(
        self, message: str, *, pass_name: str, output: str, error: float, first: TensorDifference | None
    ) -> None:
        super().__init__(message, hint="`planish diff` shows what the pass changed")
        self.pass_name = pass_name
        self.output = output
        self.error = error
        self.first = first


@dataclasses.dataclass(frozen=True)
class OutputDifference:
    """The first output of an exact pass that is further from its reference than allowed."""

    name: str
    error: float
    detail: str


class ContractCheck(Instrument):
    """Runs the model after every pass and compares with before.

    Args:
        examples: inputs to run on, each by graph-input name; made up from the graph's declarations if empty.

    Attributes:
        violation: the broken contract that was found, if one was.
    """

    wants_copy: ClassVar[bool] = True

    def __init__(self, examples: Sequence[Feeds] = ()) -> None:
        self._examples = tuple(examples)
        self._outputs: Sequence[Outputs] = ()
        self._model: ir.Model | None = None
        self.violation: ContractBrokenError | None = None

    def before(self, invocation: Invocation, model: ir.Model) -> None:
        """Run the model as it comes, unless these are the outputs of the pass before."""
        del invocation
        if not self._examples:
            self._examples = (example_inputs(model),)
        if self._model is not model:
            self._model = model
            self._outputs = [run_model(model, feeds) for feeds in self._examples]

    def after(self, invocation: Invocation, model: ir.Model, result: PassResult) -> None:
        """Run the model again, then judge or measure.

        Raises:
            ContractBrokenError: an exact pass changed an output by more than its tolerance, or an
                approximate one made it infinite or NaN.
        """
        assert invocation.before is not None
        examples, references = self._examples, self._outputs
        if result.redefined_outputs:
            # A cache in the old form means something else now: both models start from an empty one.
            examples = tuple(without_past(feeds) for feeds in examples)
            references = [run_model(invocation.before, feeds) for feeds in examples]
            examples = tuple(fitted(feeds, model) for feeds in examples)
        references = [_without(outputs, result.redefined_outputs) for outputs in references]
        outputs = [run_model(model, feeds) for feeds in examples]
        for feeds, before, after in zip(examples, references, outputs, strict=True):
            self._judge(invocation.pass_, invocation.before, model, feeds, before, after)
        _record_errors(invocation, references, outputs)
        self._examples, self._outputs = examples, outputs

    def _judge(
        self,
        pass_: Pass,
        model_before: ir.Model,
        model: ir.Model,
        feeds: Feeds,
        before: Outputs,
        after: Outputs,
    ) -> None:
        if pass_.contract is Contract.EXACT:
            broken = broken_output(after, before, max(pass_.tolerance, rounding(model_before)))
        else:
            broken = no_longer_finite(after, before)
        if broken is not None:
            self.violation = _violation(pass_, broken, model_before, model, feeds)
            raise self.violation

    def failed(self, invocation: Invocation, model: ir.Model, error: Exception) -> None:
        """Forget the outputs: the model may be half rewritten."""
        del invocation, model, error
        self._model = None


def without_past(feeds: Feeds) -> Feeds:
    """The same call with an empty cache: past keys and values go, and the part of the mask that is theirs."""
    caches = [array for name, array in feeds.items() if name.startswith(_PAST)]
    past = caches[0].shape[2] if caches and caches[0].ndim == 4 else 0
    shortened = {name: array[:, :, past:] for name, array in feeds.items() if name.startswith(_PAST)}
    if past and "attention_mask" in feeds:
        shortened["attention_mask"] = feeds["attention_mask"][..., past:]
    return {**feeds, **shortened}


def _without(outputs: Outputs, names: frozenset[str]) -> Outputs:
    return {name: value for name, value in outputs.items() if name not in names}


def broken_output(after: Outputs, before: Outputs, tolerance: float) -> OutputDifference | None:
    """The first output that is missing or further from its reference than ``tolerance``, if any."""
    for name, reference in before.items():
        if name not in after:
            return OutputDifference(name, float("inf"), "in that it is no longer an output")
        error, detail = relative_error(after[name], reference)
        if error > tolerance:
            return OutputDifference(name, error, detail)
    return None


def no_longer_finite(after: Outputs, before: Outputs) -> OutputDifference | None:
    """The first output that is missing, or that was finite before and is not now, if any."""
    for name, reference in before.items():
        if name not in after:
            return OutputDifference(name, float("inf"), "in that it is no longer an output")
        if _is_finite(reference) and not _is_finite(after[name]):
            return OutputDifference(name, float("inf"), "in that it is no longer finite")
    return None


def _is_finite(value: Any) -> bool:
    """Whether ``value`` is an array of floating-point numbers, all of them finite."""
    return isinstance(value, np.ndarray) and value.dtype.kind == "f" and bool(np.isfinite(value).all())


def rounding(model: ir.Model) -> float:
    """What reordering alone may cost a model that computes in types narrower than float32; 0 for others.

    Also where outputs are float32: what comes before them counts. Weights that are only converted do not.
    """
    epsilons = {
        _EPSILONS[value.dtype]
        for value in all_values(model)
        if value.dtype in _EPSILONS
        and (value.is_graph_output() or any(use.node.op_type != "Cast" for use in value.uses()))
    }
    return _EPSILONS_ALLOWED * max(epsilons, default=0.0)


def _violation(
    pass_: Pass, broken: OutputDifference, before: ir.Model, after: ir.Model, feeds: Feeds
) -> ContractBrokenError:
    is_exact = pass_.contract is Contract.EXACT
    # What an approximate pass changes is its right; only the tensor that stops being finite is of interest.
    tolerance = pass_.tolerance if is_exact else sys.float_info.max
    takes_same = input_types(before) == input_types(after)
    first = (
        first_difference(before, after, feeds, tolerance=tolerance, outputs=[broken.name])
        if takes_same
        else None
    )
    where = f"first difference: {first}" if first else "no tensor that both graphs have differs before it"
    contract = f"exact to {pass_.tolerance:g}" if is_exact else "approximate"
    return ContractBrokenError(
        f"pass {pass_.name!r} broke its contract ({contract}): "
        f"output {broken.name!r} differs {broken.detail}; {where}",
        pass_name=pass_.name,
        output=broken.name,
        error=broken.error,
        first=first,
    )


def _record_errors(invocation: Invocation, before: Sequence[Outputs], after: Sequence[Outputs]) -> None:
    """Leave the worst difference over all examples of every floating-point output."""
    for reference, found in zip(before, after, strict=True):
        for name in reference.keys() & found.keys():
            old, new = reference[name], found[name]
            if not (_is_finite(old) and _is_finite(new) and old.shape == new.shape):
                continue
            measured = difference(new, old, logits="logits" in name)
            worst = invocation.errors.get(name)
            if worst is None or measured.max_relative > worst.max_relative:
                invocation.errors[name] = measured
