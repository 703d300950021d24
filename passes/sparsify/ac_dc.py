"""AC/DC: training in turns with pruned weights at zero (compressed) and with all weights (decompressed).

    dense │ compressed │ decompressed │ compressed │ … │ compressed to the end

Each compressed phase begins by pruning the weights of least magnitude; in a decompressed phase the pruned
ones start from zero and may grow back, so that the choice can be corrected. Peste et al., 2021.
"""

from __future__ import annotations

import dataclasses

from ...runtime.training import Parameters
from .masks import Method


@dataclasses.dataclass(kw_only=True)
class AlternatingCompression(Method):
    """Prunes, lets grow, prunes.

    Attributes:
        dense: updates before the first compressed phase.
        phase: updates of each phase.
        final: updates of the last, compressed phase.
    """

    dense: int
    phase: int
    final: int

    def is_compressed_at(self, step: int) -> bool:
        """Whether update ``step``, counted from 0, is made with pruned weights; the end of training is."""
        if step >= self.steps - self.final:
            return True
        return step >= self.dense and (step - self.dense) // self.phase % 2 == 0

    def update(self, step: int, parameters: Parameters) -> None:
        """A new mask where a compressed phase begins; none where a decompressed one does."""
        if not self.is_compressed_at(step):
            self.masks = {}
        elif not self.masks:
            self.masks = self.pruner.choose(parameters, self.sparsity)
