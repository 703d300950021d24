"""Opening what `CompiledModel.save` wrote, to run it with the kernels that it was bound to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.text import Text

from ..codegen.target import BoundModel
from ..ir import load
from ..ir.companions import EVICTION, EVICTS_KEY, attach
from ..ir.errors import ModelError
from .folder import EVICTION_FILE, MODEL_FILE, PREFILL_FILE
from .provenance import RECIPE, REPORT, SESSION_OPTIONS


class SavedReport:
    """What a file says of how it was compiled.

    Args:
        recipe: the pipeline; empty for a file that something else wrote.
        report: as `PipelineReport.as_dict` gave it.
    """

    def __init__(self, recipe: str, report: dict[str, Any]) -> None:
        self._recipe, self._report = recipe, report

    def __rich__(self) -> Text:
        """The recipe."""
        return Text(self._recipe or "compiled by something else than planish")

    def as_dict(self, *, costs: bool = True) -> dict[str, Any]:
        """As it is in the file, where times and memory are not kept."""
        del costs
        return self._report


def prefill_file(path: Path) -> Path | None:
    """Where a decoder's kernels for prompts are, if it was saved with them: beside its ``model.onnx``."""
    folder = path if path.is_dir() else path.parent
    file = folder / PREFILL_FILE
    return file if file.is_file() and (path.is_dir() or path.name == MODEL_FILE) else None


def read_prefill(file: Path) -> BoundModel:
    """Those kernels.

    Raises:
        ModelError: the file is damaged.
    """
    model = load(file)
    return BoundModel(model=model, session_options=_session_options(file, dict(model.metadata_props)))


def _session_options(file: Path, properties: dict[str, str]) -> dict[str, str]:
    return {str(key): str(value) for key, value in _read_object(file, properties, SESSION_OPTIONS).items()}


def _read_object(file: Path, properties: dict[str, str], key: str) -> dict[str, Any]:
    try:
        found = json.loads(properties.get(key, "{}"))
        problem = "" if isinstance(found, dict) else f"expected an object, found {type(found).__name__}"
    except (ValueError, RecursionError) as error:
        problem = str(error)
    if problem:
        raise ModelError(
            f"{file}: its metadata is damaged: {key}: {problem}",
            hint="compile the model again from its source",
        )
    result: dict[str, Any] = found
    return result


def read_saved(path: Path) -> tuple[BoundModel, SavedReport]:
    """The bound model of a file, or of the folder that one is in, and its report.

    Raises:
        ModelError: there is no such file, or it is damaged.
    """
    file = path / MODEL_FILE if path.is_dir() else path
    model = load(file)
    properties = dict(model.metadata_props)
    options = _session_options(file, properties)
    report = SavedReport(properties.get(RECIPE, ""), _read_object(file, properties, REPORT))
    eviction = file.with_name(EVICTION_FILE)
    if EVICTS_KEY in properties:
        if not eviction.is_file():
            raise ModelError(
                f"{file} evicts tokens of its cache by {EVICTION_FILE}, which is not beside it",
                hint="copy the whole folder",
            )
        attach(model, EVICTION, load(eviction))
    return BoundModel(model=model, session_options=options), report
