"""Every error that planish raises on purpose: one line that says what happened and what to do next.

A message names, in this order and as far as they are known: the pass or step, the node or file, what was
expected, what was found. What the user can do goes into ``hint``.
"""

from __future__ import annotations


class PlanishError(Exception):
    """Base of all deliberate errors; ``str()`` is one line, with the hint at its end."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = message
        self.hint = hint
        super().__init__(f"{message} — {hint}" if hint else message)


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


class TargetError(PlanishError):
    """The target is unknown, or cannot bind or run an op of the model."""
