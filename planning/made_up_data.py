"""Calibration data for a plan, where the user has not given any yet: shapes are what matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..ir.errors import InputError
from ..runtime.calibration import CalibrationData
from ..runtime.example_inputs import example_inputs

TOKENS = 128
"""Of a made-up sample."""
_CACHE = "past_key_values."


def made_up_data(model: ir.Model, samples: int) -> Sequence[Mapping[str, np.ndarray[Any, Any]]]:
    """So many samples of `TOKENS` tokens, or of the sizes that the inputs declare; caches are empty.

    Raises:
        InputError: nothing can be made up for an input of the model.
    """
    if samples < 1:
        raise InputError(f"samples: expected at least 1, found {samples}")
    dims = {
        str(dim)
        for value in model.graph.inputs
        if not str(value.name).startswith(_CACHE)
        for dim in value.shape or ()
        if not isinstance(dim, int)
    }
    sizes = {dim: 1 if "batch" in dim else TOKENS for dim in dims if "batch" in dim or _is_sequence(dim)}
    feeds = example_inputs(model, sizes=sizes)
    has_cache = any(name.startswith(_CACHE) for name in feeds)
    item = {name: array for name, array in feeds.items() if not has_cache or name == "input_ids"}
    # The same arrays again and again: they take the memory of one sample.
    return CalibrationData.read([item] * samples, model)


def _is_sequence(dim: str) -> bool:
    return "seq" in dim and "past" not in dim and "total" not in dim and "+" not in dim
