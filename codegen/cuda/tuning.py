"""Tables of measured plans, one for each GPU: which configuration of a product's kernel was the fastest.

Plans look a product up here before they trust their predictions (see `planish.codegen.cuda.predict`). A row
holds for its N, K and format, and for every M down to the next power of two. The tables are measured by
``python -m planish.codegen.cuda.validate --tune`` and kept in planish's cache folder.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ...ir.errors import TargetError
from ...ir.files import write_whole
from ..machine import cache_directory
from .hardware import Gpu
from .products import LIBRARY, Configuration

T = TypeVar("T")

_FORMAT = 1
"""Of the files. Another one when kernels change as well, and what was measured holds no longer."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One product, as far as the fastest way to run it depends on it.

    Attributes:
        kernel: name of its module.
        m, n, k: sizes, not padded.
        dtype: of the result, in torch's words.
        group_size: rows that share a scale; 0 for all.
        bits: of weights.
        shifted: whether they have zero points.
    """

    kernel: str
    m: int
    n: int
    k: int
    dtype: str
    group_size: int
    bits: int = 4
    shifted: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """What was measured on one GPU. No two tables are equal, so plans that are kept by table are never stale.

    Attributes:
        gpu: its name.
        rows: the fastest configuration by case, whose m is a power of two.
    """

    gpu: str
    rows: Mapping[Case, Configuration]

    def fastest(self, case: Case, gpu: Gpu) -> Configuration | None:
        """The configuration that was; None for a product or a GPU that was not measured."""
        if gpu.name != self.gpu:
            return None
        return self.rows.get(dataclasses.replace(case, m=1 << (case.m - 1).bit_length()))

    def choice(self, candidates: Mapping[Configuration, T], case: Case, gpu: Gpu) -> T | None:
        """The candidate with the fastest configuration; None where it is not known, or not among them."""
        configuration = self.fastest(case, gpu)
        return None if configuration is None else candidates.get(configuration)


NOTHING = Table("", {})
"""The table of no GPU."""


@functools.cache
def tuned(gpu: str) -> Table:
    """The table of the GPU of that name, read once; an empty one where there is none that can be read."""
    path = _path(gpu)
    try:
        content = json.loads(path.read_text())
        if content["planish_tuning_table"] != _FORMAT or content["gpu"] != gpu:
            raise ValueError(f"expected format {_FORMAT} and the GPU {gpu}")
        return Table(gpu, {Case(**row["case"]): _configuration(row["fastest"]) for row in content["rows"]})
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"cuda: plans are predicted, because {path} is no tuning table of this version ({error!r}): "
            "remove it, or run python -m planish.codegen.cuda.validate --tune",
            stacklevel=2,
        )
    return Table(gpu, {})


def _configuration(stored: Any) -> Configuration:
    if stored == LIBRARY:
        return LIBRARY
    rows, splits = map(int, stored)
    return rows, splits


def add(gpu: str, rows: Mapping[Case, Configuration]) -> Path:
    """Write rows into the table of a GPU, beside others that it has; plans use them from now on.

    Returns:
        The file, which appears whole or not at all.

    Raises:
        TargetError: it cannot be written.
    """
    tuned.cache_clear()
    all_rows = {**tuned(gpu).rows, **rows}
    content = {
        "planish_tuning_table": _FORMAT,
        "gpu": gpu,
        "rows": [
            {"case": dataclasses.asdict(case), "fastest": configuration}
            for case, configuration in all_rows.items()
        ],
    }
    path = _path(gpu)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(content, indent=1).encode())
    except OSError as error:
        raise TargetError(f"cuda: the tuning table {path} cannot be written: {error.strerror}") from error
    tuned.cache_clear()
    return path


def _path(gpu: str) -> Path:
    return cache_directory() / "tuning" / f"{re.sub('[^a-z0-9]+', '-', gpu.lower())}.json"
