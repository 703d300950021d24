"""Every error that planish raises on purpose: one line that says what happened and what to do next.

A message names, in this order and as far as they are known: the pass or step, the node or file, what was
expected, what was found. What the user can do goes into ``hint``.
"""

from __future__ import annotations

_LONGEST = 2000
"""Characters of a message; the middle of a longer one is left out."""


class PlanishError(Exception):
    """Base of all deliberate errors; ``str()`` is one line, with the hint at its end."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = message = _printable(message)
        self.hint = hint
        super().__init__(f"{message} — {hint}" if hint else message)


def _printable(text: str) -> str:
    """The text in one line: names in damaged files may be endless, and hold codes for terminals."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class ModelError(PlanishError):
    """The input model cannot be read: truncated, missing external data, NaN weights, unsupported opset."""


class TraceError(PlanishError):
    """torch.export could not trace the module; names the submodule and source line that stopped it."""


class VerificationError(PlanishError):
    """The graph broke a structural rule of the IR (definition before use, ownership, names, types)."""


class PipelineError(PlanishError):
    """The pipeline is not legal: unknown pass or option, bad text, or an order that breaks a pass's facts."""


class PassError(PlanishError):
    """A pass failed while running; names the pass and the node."""


class NothingCoveredError(PassError):
    """A pass was asked to do work and covered nothing."""


class ContractError(PassError):
    """A pass changed what the model computes by more than its contract allows."""


class InputError(PlanishError):
    """The data given (example inputs, calibration) does not fit the model's inputs."""


class BudgetError(PlanishError):
    """A search found no model within its budget; says what came nearest."""


class MissingDataError(InputError):
    """A pass needs calibration or training data, and none was given."""


class TargetError(PlanishError):
    """The target is unknown, or cannot bind or run an op of the model."""


class WorkerError(PlanishError):
    """Workers on other machines were lost, or cannot do what is asked of them."""
