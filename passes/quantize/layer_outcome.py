"""What quantising one layer comes to: the residual that makes up for its error, and what errors are left."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from ..infrastructure.base import LayerErrors
from .activations import Activations
from .algorithms import Algorithm, LayerStatistics
from .algorithms.gptq import GPTQ
from .kept_results import LayerResult
from .linear_layers import LowRank
from .low_rank import low_rank_residual
from .quantized_weight import Floats, QuantizedWeight
from .weights import relative_error

Doubles = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """What the layers of a group share.

    Attributes:
        algorithm: that chose the integers.
        statistics: of the input; None if there was no need of any.
        compensate_rank: of the residual; 0 for none.
    """

    algorithm: Algorithm
    statistics: LayerStatistics | None
    compensate_rank: int


@dataclasses.dataclass(frozen=True, eq=False)
class Rounded:
    """One layer.

    Attributes:
        weight: dense, [K, N].
        quantized: the same, quantised.
        activations: grid of the input.
    """

    weight: Floats
    quantized: QuantizedWeight
    activations: Activations | None


def layer_outcome(setting: Setting, layer: Rounded) -> LayerResult:
    """The layer with its residual and errors."""
    weight, statistics, rank = layer.weight, setting.statistics, setting.compensate_rank
    dequantized = layer.quantized.dequantized()
    low_rank: LowRank | None = None
    if statistics is not None and rank:
        # GPTAQ's weight approximates another one on purpose: undoing that is not the residual's work.
        algorithm = setting.algorithm
        aim = algorithm.aim(weight, statistics) if isinstance(algorithm, GPTQ) else weight
        low_rank = low_rank_residual(aim, dequantized, statistics.covariance, rank)
        dequantized = dequantized + low_rank[0] @ low_rank[1]
    errors = LayerErrors(
        relative_error(weight, dequantized),
        None if statistics is None else output_error(weight, dequantized, statistics.covariance),
    )
    return LayerResult(layer.quantized, low_rank, errors, layer.activations)


def output_error(weight: Floats, dequantized: Floats, covariance: Doubles) -> float:
    """‖X(W − Ŵ)‖ / ‖XW‖ for inputs of this covariance; 0 where the output is zero."""
    root = np.sqrt(max(_energy(weight, covariance), 0))
    difference = np.sqrt(max(_energy(weight - dequantized, covariance), 0))
    return float(difference / root) if root else 0.0


def _energy(matrix: Floats, covariance: Doubles) -> float:
    return float(np.einsum("kn,kn->", covariance.astype(np.float32) @ matrix, matrix))
