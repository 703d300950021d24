"""An ONNX file as plain onnxruntime runs it: what comparisons and timings of files use."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from ..ir.errors import InputError, ModelError
from .session import first_line, open_session, run_session

Array = np.ndarray[Any, Any]


class ModelFile:
    """An ONNX file, opened with onnxruntime's defaults and nothing of planish in between.

    Args:
        path: the file.
        threads: intra-op threads; one per core when absent.

    Raises:
        ModelError: there is no such file.
        TargetError: onnxruntime rejects it.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ModelError(f"{self.path}: no such file")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if threads is not None:
            options.intra_op_num_threads = threads
        self._session = open_session(str(self.path), options)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Any]:
        """Run once; arrays in, arrays out, by name.

        Raises:
            InputError: an input is missing, unknown or of the wrong type, or onnxruntime fails on it.
        """
        return run_session(self._session, feeds)


def read_inputs(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Inputs from an ``.npz`` file, by graph-input name.

    Raises:
        InputError: the file is missing, is no ``.npz``, or holds pickled objects.
    """
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise InputError(f"{path}: expected an .npz archive with one array per input, found one array")
        with archive:
            return dict(archive)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path}: cannot be read as inputs: {first_line(error)}",
            hint="write it with numpy.savez(path, input_ids=..., attention_mask=...)",
        ) from error
