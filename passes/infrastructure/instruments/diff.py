"""What every pass changed, printed."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import onnx_ir as ir

from ....ir.diff import diff_models
from ..base import PassResult
from .base import Instrument, Invocation


class PrintDiff(Instrument):
    """Prints the difference between the model before and after each pass that changed it.

    Args:
        write: takes the text of each difference.
    """

    wants_copy: ClassVar[bool] = True

    def __init__(self, write: Callable[[str], object] = print) -> None:
        self._write = write

    def after(self, invocation: Invocation, model: ir.Model, result: PassResult) -> None:
        """Print the difference."""
        del result
        assert invocation.before is not None
        difference = str(diff_models(invocation.before, model))
        self._write(f"--- {invocation.label}\n{difference or 'no change'}")
