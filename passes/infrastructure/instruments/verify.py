"""Verify the graph's structure after every pass."""

from __future__ import annotations

import onnx_ir as ir

from ....ir import verify
from ..base import PassResult
from .base import Instrument, Invocation


class VerifyAfterEachPass(Instrument):
    """Runs `planish.ir.verify` after every pass, so that a broken graph names the pass that broke it.

    Raises:
        VerificationError: from the driver, with the pass's name in front.
    """

    def after(self, invocation: Invocation, model: ir.Model, result: PassResult) -> None:
        """Check the structural rules of the IR."""
        del invocation, result
        verify(model)
