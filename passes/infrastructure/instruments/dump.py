"""The model after every pass, as numbered files."""

from __future__ import annotations

import os
from pathlib import Path

import onnx_ir as ir

from ....ir import clone, format_model, save
from ....ir.files import write_text
from ..base import PassResult
from ..facts import facts_of, write_facts
from .base import Instrument, Invocation


class DumpAfterEachPass(Instrument):
    """Writes ``000_input``, ``001_canonicalize``, ``002_fuse``, … as ``.onnx`` and ``.txt`` into a folder.

    Args:
        folder: where to; made if it is missing.
        text_only: write no ``.onnx``, for models whose weights are too large to write after each pass.
    """

    def __init__(self, folder: str | os.PathLike[str], *, text_only: bool = False) -> None:
        self.folder = Path(folder)
        self.text_only = text_only

    def before(self, invocation: Invocation, model: ir.Model) -> None:
        """Write the input of the pipeline, once."""
        if invocation.position == 0:
            self._write(model, "000_input")

    def after(self, invocation: Invocation, model: ir.Model, result: PassResult) -> None:
        """Write what the pass left."""
        del result
        self._write(model, invocation.label)

    def _write(self, model: ir.Model, label: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / f"{label}.txt", format_model(model) + "\n")
        if not self.text_only:
            # The file keeps the facts, so that a pipeline can go on from it.
            dumped = clone(model)
            write_facts(dumped, facts_of(model))
            save(dumped, self.folder / f"{label}.onnx")
