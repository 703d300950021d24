"""How far two models are apart in what they compute, and where that begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from ..ir.errors import InputError
from .localize import TensorDifference, first_difference, relative_error
from .reference import run_model

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDifference:
    """How far what two models compute is apart.

    Attributes:
        tolerance: the largest error that is no difference.
        errors: by output that both have, its `relative_error` and that in words.
        only_one_has: names of outputs.
        first: the first tensor that differs and that a differing output depends on, if both have one.
    """

    tolerance: float
    errors: Mapping[str, tuple[float, str]]
    only_one_has: tuple[str, ...]
    first: TensorDifference | None

    @property
    def is_equal(self) -> bool:
        """Whether all outputs agree."""
        return not self.only_one_has and all(error <= self.tolerance for error, _ in self.errors.values())

    def __str__(self) -> str:
        worst = max(self.errors, key=lambda name: self.errors[name][0])
        error, detail = self.errors[worst]
        if self.is_equal:
            return f"outputs: equal within {self.tolerance:g}; the largest error is {error:.2g}"
        lines = [f"outputs: only one model has {name!r}" for name in self.only_one_has]
        if error > self.tolerance:
            lines.append(f"outputs: {worst!r} differs most, {detail}")
        return "\n".join(lines if self.first is None else [*lines, f"first difference: {self.first}"])


def model_difference(
    before: ir.Model, after: ir.Model, feeds: Mapping[str, Array], *, tolerance: float
) -> ModelDifference:
    """Run two models on the same inputs; where outputs differ, find the first tensor that does.

    Raises:
        InputError: the inputs do not fit both, or the models have no output in common.
        TargetError: onnxruntime cannot run one of them.
    """
    references, found = run_model(before, feeds), run_model(after, feeds)
    errors = {
        name: relative_error(found[name], reference)
        for name, reference in references.items()
        if name in found
    }
    if not errors:
        raise InputError(f"the models have no output in common: {list(found)} and {list(references)}")
    differing = [name for name, (error, _) in errors.items() if error > tolerance]
    first = None
    if differing:
        first = first_difference(before, after, feeds, tolerance=tolerance, outputs=differing)
    return ModelDifference(
        tolerance=tolerance,
        errors=errors,
        only_one_has=tuple(sorted(references.keys() ^ found.keys())),
        first=first,
    )
