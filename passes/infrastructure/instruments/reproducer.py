"""When a pass fails: the model before it, the pipeline that fails, and the command that fails again."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ....ir import clone, save
from ....ir.errors import ModelError
from ....ir.files import replacing, write_text
from ..base import Feeds
from ..facts import facts_of, write_facts
from ..options import format_pass
from .base import Instrument, Invocation


class CrashReproducer(Instrument):
    """Writes ``before.onnx``, ``pipeline.txt``, ``inputs.npz`` and ``reproduce.sh`` when a pass fails.

    ``reproduce.sh`` holds one command: it runs the failing pass alone, with the same seed, on the model as it
    was before that pass.

    Args:
        folder: where to; made when a pass fails.
        check: what the command is to check: ``"none"``, ``"verify"`` or ``"contract"``.
        examples: inputs for a contract check; the first goes into ``inputs.npz``.
    """

    wants_copy: ClassVar[bool] = True

    def __init__(
        self, folder: str | os.PathLike[str], *, check: str = "verify", examples: tuple[Feeds, ...] = ()
    ) -> None:
        self.folder = Path(folder)
        self.check = check
        self.examples = examples

    def failed(self, invocation: Invocation, model: ir.Model, error: Exception) -> None:
        """Write the reproducer, and say in the error where it is."""
        del model
        try:
            error.add_note(f"reproduce with: {self._write(invocation, error)}")
        except (OSError, ModelError) as obstacle:  # the pass's own error is the one to be told
            error.add_note(f"no reproducer: {obstacle}")

    def _write(self, invocation: Invocation, error: Exception) -> str:
        """The command that fails again."""
        assert invocation.before is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        before = clone(invocation.before)
        write_facts(before, facts_of(before))
        save(before, self.folder / "before.onnx")
        write_text(self.folder / "pipeline.txt", f"{format_pass(invocation.pass_)}\n")
        if self.examples:
            with replacing(self.folder / "inputs.npz") as (file,):
                np.savez(file, allow_pickle=False, **self.examples[0])
        command = self._command(invocation)
        text = f"# {type(error).__name__}: {' '.join(str(error).split())}\n{command}\n"
        write_text(self.folder / "reproduce.sh", text)
        return command

    def _command(self, invocation: Invocation) -> str:
        words = ["planish", "compile", str(self.folder / "before.onnx")]
        words += ["-o", str(self.folder / "after.onnx")]
        words += ["--passes", format_pass(invocation.pass_)]
        words += ["--target", invocation.context.target.name]
        words += ["--check", self.check, "--seed", str(invocation.seed)]
        if self.examples:
            words += ["--inputs", str(self.folder / "inputs.npz")]
        return shlex.join(words)
