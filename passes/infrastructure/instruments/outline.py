"""What the model was before the passes: its outline, in canonical form where a pass establishes that."""

from __future__ import annotations

import onnx_ir as ir

from ....ir.outline import ModelOutline, outline
from ..base import Fact, PassResult
from .base import Instrument, Invocation


class OutlineBefore(Instrument):
    """Keeps the outline of the model as it was before the passes that compress it.

    Attributes:
        outline: None as long as no pass has run.
    """

    outline: ModelOutline | None = None

    def before(self, invocation: Invocation, model: ir.Model) -> None:
        """Outline the first pass's model, unless that pass brings it into canonical form."""
        if self.outline is None and Fact.CANONICAL not in invocation.pass_.establishes:
            self.outline = outline(model)

    def after(self, invocation: Invocation, model: ir.Model, result: PassResult) -> None:
        """Outline the canonical form."""
        del invocation, result
        if self.outline is None:
            self.outline = outline(model)
