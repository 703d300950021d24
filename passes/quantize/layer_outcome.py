"""What quantising layers comes to: the residual that makes up for an error, and what errors are left."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from ...runtime.workers import SERIAL, Workers
from ..infrastructure.base import LayerErrors
from .activations import Activations
from .algorithms import Algorithm, LayerStatistics
from .algorithms.base import slabs
from .algorithms.gptq import GPTQ
from .kept_results import LayerResult
from .linear_layers import LowRank
from .low_rank import low_rank_residual
from .quantized_weight import Floats, QuantizedWeight
from .weights import relative_error


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


def layer_outcomes(setting: Setting, layers: Sequence[Rounded], workers: Workers) -> Iterator[LayerResult]:
    """The layers with their residuals and errors, in order."""
    statistics = setting.statistics
    covariance = None if statistics is None else statistics.covariance.astype(np.float32)
    for layer, low_rank in zip(layers, _residuals(setting, layers, workers), strict=True):
        weight, dequantized = layer.weight, layer.quantized.dequantized()
        if low_rank is not None:
            dequantized = dequantized + low_rank[0] @ low_rank[1]
        errors = LayerErrors(
            relative_error(weight, dequantized),
            None if covariance is None else output_error(weight, dequantized, covariance, workers),
        )
        yield LayerResult(layer.quantized, low_rank, errors, layer.activations)


def _residuals(
    setting: Setting, layers: Sequence[Rounded], workers: Workers
) -> Iterator[LowRank] | list[None]:
    if setting.statistics is None or not setting.compensate_rank:
        return [None] * len(layers)
    return workers.map(_residual, setting, layers)


def _residual(setting: Setting, layer: Rounded) -> LowRank:
    weight, statistics, algorithm = layer.weight, setting.statistics, setting.algorithm
    if statistics is None:
        raise ValueError("a residual needs the covariance of the layer's inputs")
    # GPTAQ's weight approximates another one on purpose: undoing that is not the residual's work.
    aim = algorithm.aim(weight, statistics) if isinstance(algorithm, GPTQ) else weight
    dequantized = layer.quantized.dequantized()
    return low_rank_residual(aim, dequantized, statistics.covariance, setting.compensate_rank)


def output_error(weight: Floats, dequantized: Floats, covariance: Floats, workers: Workers = SERIAL) -> float:
    """‖X(W − Ŵ)‖ / ‖XW‖ for inputs of this covariance; 0 where the output is zero.

    Args:
        weight: W, [K, N].
        dequantized: Ŵ, [K, N].
        covariance: [K, K].
        workers: share the columns.
    """
    pieces = (
        # Copies, for sums of what lies otherwise in memory are taken in another order.
        (weight[:, columns].copy("C"), (weight[:, columns] - dequantized[:, columns]).copy("C"))
        for columns in slabs(weight.shape[1])
    )
    energies = np.sum(list(workers.map(_energies, covariance, pieces)), axis=0)
    root, difference = np.sqrt(np.maximum(energies, 0))
    return float(difference / root) if root else 0.0


def _energies(covariance: Floats, matrices: tuple[Floats, Floats]) -> list[float]:
    return [float(np.einsum("kn,kn->", covariance @ matrix, matrix)) for matrix in matrices]
