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

_REPORT, _RECIPE, _OPTIONS = "planish.report", "planish.recipe", "planish.session_options"


class SavedReport:
    """What a file says of how it was compiled.

    Args:
        properties: the file's metadata.
    """

    def __init__(self, properties: dict[str, str]) -> None:
        self._recipe = properties.get(_RECIPE, "")
        self._report: dict[str, Any] = json.loads(properties.get(_REPORT, "{}"))

    def __rich__(self) -> Text:
        """The recipe."""
        return Text(self._recipe or "compiled by something else than planish")

    def as_dict(self, *, costs: bool = True) -> dict[str, Any]:
        """As it is in the file, where times and memory are not kept."""
        del costs
        return self._report


def note_session_options(bound: BoundModel) -> None:
    """Write into a bound model what its kernels rely on, for whoever runs the file."""
    if bound.session_options:
        bound.model.metadata_props[_OPTIONS] = json.dumps(dict(bound.session_options))


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
    try:
        options: dict[str, str] = json.loads(properties.get(_OPTIONS, "{}"))
    except ValueError as error:
        raise ModelError(
            f"{file}: its metadata is damaged: {error}", hint="compile the model again from its source"
        ) from error
    return options


def read_saved(path: Path) -> tuple[BoundModel, SavedReport]:
    """The bound model of a file, or of the folder that one is in, and its report.

    Raises:
        ModelError: there is no such file, or it is damaged.
    """
    file = path / MODEL_FILE if path.is_dir() else path
    model = load(file)
    properties = dict(model.metadata_props)
    options = _session_options(file, properties)
    try:
        report = SavedReport(properties)
    except ValueError as error:
        raise ModelError(
            f"{file}: its metadata is damaged: {error}", hint="compile the model again from its source"
        ) from error
    eviction = file.with_name(EVICTION_FILE)
    if EVICTS_KEY in properties:
        if not eviction.is_file():
            raise ModelError(
                f"{file} evicts tokens of its cache by {EVICTION_FILE}, which is not beside it",
                hint="copy the whole folder",
            )
        attach(model, EVICTION, load(eviction))
    return BoundModel(model=model, session_options=options), report
