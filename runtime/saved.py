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
from .folder import EVICTION_FILE, MODEL_FILE

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


def read_saved(path: Path) -> tuple[BoundModel, SavedReport]:
    """The bound model of a file, or of the folder that one is in, and its report.

    Raises:
        ModelError: there is no such file, or it is damaged.
    """
    file = path / MODEL_FILE if path.is_dir() else path
    model = load(file)
    properties = dict(model.metadata_props)
    try:
        options = json.loads(properties.get(_OPTIONS, "{}"))
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
