"""What removing branches of the residual stream costs: the change of the model's outputs on calibration data.

Each branch is multiplied by a gate of one element, and one session with the gates as inputs serves every
combination of removals: x + 1·f(x), or x + 0·f(x) = x exactly. What is measured, and how, is in
`planish.runtime.sensitivity`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...ir import clone
from ...ir.errors import PassError
from ...ir.structure import ResidualModule
from ...runtime.gates import add_gates
from ...runtime.sensitivity import WeightSensitivity
from ..infrastructure.base import Feeds

Array = npt.NDArray[Any]
T = TypeVar("T")


class RemovalLoss:
    """The loss of a model without some of its residual modules, relative to the model with all of them.

    Args:
        model: not changed; its tensors are shared.
        modules: those that may be removed.
        samples: complete feeds, one small batch each.
        weights: names of initializers that may be replaced as well.

    Raises:
        InputError: there are no samples, no float outputs, or the outputs are not finite.
        PassError: a branch is not added to the stream where its module says.
    """

    def __init__(
        self,
        model: ir.Model,
        modules: Sequence[ResidualModule],
        samples: Sequence[Feeds],
        weights: Sequence[str] = (),
    ) -> None:
        gated = clone(model)
        self._gates = add_gates(gated.graph, modules)
        odd = next((module for module in modules if module.name not in self._gates), None)
        if odd is not None:
            raise PassError(f"{odd.name}: expected {odd.output!r} to add the branch {odd.branch!r}")
        self._sensitivity = WeightSensitivity(gated, [*self._gates.values(), *weights], samples)

    def __call__(
        self, removed: Collection[ResidualModule], changed: Mapping[str, Array] | None = None
    ) -> float:
        """The change of the outputs without ``removed`` and with ``changed`` weights: `WeightSensitivity`."""
        closed = {self._gates[module.name]: np.zeros(1) for module in removed}
        return self._sensitivity.loss({**closed, **(changed or {})})


def greedy_removals(
    candidates: Sequence[T], loss: Callable[[Sequence[T]], float], track: Callable[[Sequence[T]], Iterator[T]]
) -> Iterator[tuple[T, float]]:
    """Remove one after the other what raises the loss least: each, and the loss without all so far.

    Of equals, the last is removed: later blocks matter less.

    Args:
        candidates: what may be removed, in the order of the model.
        loss: of the model without some of them.
        track: iterates the candidates of a step, and shows how far it is.
    """
    removed: list[T] = []
    left = list(candidates)
    while left:
        losses = {index: loss([*removed, candidate]) for index, candidate in enumerate(track(left))}
        best = min(losses, key=lambda index: (losses[index], -index))
        removed.append(left.pop(best))
        yield removed[-1], losses[best]
