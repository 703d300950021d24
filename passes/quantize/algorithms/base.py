"""What the algorithms share: the statistics of a layer's inputs, and how an algorithm is called."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Protocol

import numpy as np

from ....runtime.workers import SERIAL, Workers
from ..grid import Doubles, Format
from ..quantized_weight import Floats, QuantizedWeight

_WIDEST = 1024
"""Columns: a slab with its errors stays small beside the model, and a block of its rows in the cache."""
_NARROWEST = 128
_STEP = 16
Remark = Callable[[str], None]
"""Takes one sentence about the layer at hand."""


@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    """Second moments of a linear layer's input of K features, over the calibration tokens.

    Attributes:
        covariance: [K, K] float64, mean over tokens of x̂ x̂ᵀ; x̂ is what the layer gets in the quantised model.
        prefix_error: [K, K] float64, mean over tokens of (x − x̂) x̂ᵀ, x from the dense model; None where it
            was not asked for.
        tokens: how many.
    """

    covariance: Doubles
    prefix_error: Doubles | None
    tokens: int


class Algorithm(Protocol):
    """Chooses integers, scales and zero points for one weight; a frozen dataclass that holds its settings."""

    needs_statistics: ClassVar[bool]
    needs_prefix_error: ClassVar[bool]

    def __call__(
        self,
        weight: Floats,
        grid: Format,
        statistics: LayerStatistics | None,
        remark: Remark,
        workers: Workers = SERIAL,
    ) -> QuantizedWeight:
        """Quantise ``weight`` [K, N] float32, finite, to ``grid``; K is a multiple of the block size.

        Layers that read the same input may come as one weight, concatenated along N: columns are independent,
        and go to the workers in `slabs`.

        Raises:
            ValueError: the algorithm needs statistics that are missing or do not have K features.
        """


def slabs(columns: int) -> list[slice]:
    """How the columns of a weight are shared out: by their number alone, so that results are always the same.

    An even number of slabs, so that two workers end together, none so narrow that calls take longer than
    arithmetic.
    """
    pairs = -(-columns // (2 * _WIDEST))
    width = max(_NARROWEST, -(-columns // (2 * pairs or 1)))
    width = -(-width // _STEP) * _STEP
    return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]


def covariance_of(statistics: LayerStatistics | None, features: int) -> Doubles:
    """The covariance [K, K] of a layer of ``features`` inputs.

    Raises:
        ValueError: there are no statistics, or not of ``features`` inputs.
    """
    if statistics is None:
        raise ValueError("expected the covariance of the layer's inputs, found none")
    if statistics.covariance.shape != (features, features):
        raise ValueError(f"expected a covariance of {features} features, found {statistics.covariance.shape}")
    return np.asarray(statistics.covariance, np.float64)
