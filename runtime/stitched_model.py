"""The loss of pruned models, of many of them: stitched from layers of a database, and physically shrunk.

One session serves all: weights that shrink are its inputs, see `planish.runtime.free_shapes`, so that a
candidate costs one run and slices of the weights that changed. Where a graph cannot be freed of a group's
sizes, candidates that shrink the group are shrunk in a copy of the model, in a session of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from ..ir import clone
from ..ir.structure import ChannelGroup, Choice, ResidualModule, Structure, drop, shrink
from .calibration.data import Feeds, fitted
from .free_shapes import FreeShapes
from .sensitivity import WeightSensitivity
from .session import Session


class StitchedModel:
    """A model, and how much its outputs change when groups of it shrink and modules go.

    Args:
        model: dense; not changed, its tensors are shared.
        structure: of the model.
        groups: those that will shrink.
        samples: complete feeds, one small batch each.

    Raises:
        InputError: there are no samples, no float outputs, or the dense outputs are not finite.
        TargetError: onnxruntime rejects the graph.
    """

    def __init__(
        self,
        model: ir.Model,
        structure: Structure,
        groups: Sequence[ChannelGroup],
        samples: Sequence[Feeds],
    ) -> None:
        self._model, self._samples = model, samples
        self._free = FreeShapes(model, groups, structure.modules)
        self._sensitivity = WeightSensitivity(self._free.model, self._free.replaceable, samples)

    @property
    def fixed(self) -> Mapping[str, str]:
        """Groups that take a session of their own for each candidate, by name, and why: this is slower."""
        return self._free.fixed

    def loss(self, choices: Sequence[Choice], dropped: Sequence[ResidualModule]) -> float:
        """The change of the outputs, as `WeightSensitivity` measures it; infinite if they are not finite.

        Args:
            choices: at most one per group; groups without one stay dense.
            dropped: modules whose branch goes.

        Raises:
            InputError: a module is not in the model.
        """
        if self._free.serves(choices, dropped):
            samples = self._free.samples(self._samples, choices, dropped)
            return self._sensitivity.loss(self._free.arrays(choices, dropped), samples)
        model = clone(self._model)
        shrink(model, choices)
        drop(model, dropped)
        session = Session(model)
        return self._sensitivity.change(session.run(fitted(feeds, model)) for feeds in self._samples)
