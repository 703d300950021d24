"""Weights that are held at zero while the others are trained."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping

import torch

from .trainer import Parameters


@dataclasses.dataclass(kw_only=True)
class Masked(abc.ABC):
    """Base of hooks of the trainer that hold some weights at zero.

    Attributes:
        masks: True where a weight is zero now, by name; weights without a mask are free.
    """

    masks: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict, repr=False, init=False)

    @abc.abstractmethod
    def update(self, step: int, parameters: Parameters) -> None:
        """Choose `masks` after ``step`` updates."""

    def before_step(self, parameters: Parameters) -> None:
        """Weights at zero have no gradient, so that the optimiser does not gather any for them."""
        for name, mask in self.masks.items():
            gradient = parameters[name].grad
            if gradient is not None:
                gradient.masked_fill_(mask, 0)

    def after_step(self, step: int, parameters: Parameters) -> None:
        """Choose the masks for the next update, and set their weights to zero."""
        self.update(step, parameters)
        with torch.no_grad():
            for name, mask in self.masks.items():
                parameters[name].masked_fill_(mask, 0)

    def state(self) -> dict[str, torch.Tensor]:
        """The masks."""
        return dict(self.masks)

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over the masks."""
        self.masks = dict(state)


@dataclasses.dataclass(kw_only=True)
class KeepZeros(Masked):
    """What is zero before training stays zero.

    Attributes:
        names: the weights that this is about.
    """

    names: tuple[str, ...]

    def update(self, step: int, parameters: Parameters) -> None:
        """The zeros before the first update."""
        if step == 0:
            self.masks = {name: parameters[name] == 0 for name in self.names if name in parameters}
