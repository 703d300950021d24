"""When a pass fails: the model before it, the pipeline that fails, and the command that fails again."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ....ir import clone, save
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
        assert invocation.before is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        before = clone(invocation.before)
        write_facts(before, facts_of(before))
        save(before, self.folder / "before.onnx")
        (self.folder / "pipeline.txt").write_text(f"{format_pass(invocation.pass_)}\n", encoding="utf-8")
        if self.examples:
            np.savez(self.folder / "inputs.npz", allow_pickle=False, **self.examples[0])
        command = self._command(invocation)
        (self.folder / "reproduce.sh").write_text(
            f"# {type(error).__name__}: {' '.join(str(error).split())}\n{command}\n", encoding="utf-8"
        )
        error.add_note(f"reproduce with: {command}")

    def _command(self, invocation: Invocation) -> str:
        words = ["planish", "compile", str(self.folder / "before.onnx")]
        words += ["-o", str(self.folder / "after.onnx")]
        words += ["--passes", format_pass(invocation.pass_)]
        words += ["--target", invocation.context.target.name]
        words += ["--check", self.check, "--seed", str(invocation.seed)]
        if self.examples:
            words += ["--inputs", str(self.folder / "inputs.npz")]
        return shlex.join(words)
