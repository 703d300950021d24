"""AWQ: scale the channels of weights by how much flows through them, as far as the output gains.

    s_j = max(mean|x_j|^r, 1e-4),   s ← s / √(max s · min s),   r ∈ {0, 1/n, …, (n − 1)/n}

Of the n candidates that one is taken whose scaled weights, quantised and scaled back, change the outputs
least: with Δ = W − diag(1/s) Q(diag(s) W) and C = E[xᵀx] the mean squared change is

    E‖x Δ‖² = tr(Δᵀ C Δ),

over all linears that read x together. Q is round-to-nearest on the grid of the scheme. r = 0 scales nothing
and is a candidate, so no group gets worse. Lin et al., "AWQ: Activation-aware Weight Quantization for LLM
Compression and Acceleration", MLSys 2024; there the error is measured on the outputs of the block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...ir.views import Linear
from ...runtime.calibration import Covariance
from ...runtime.calibration.ranges import ChannelMeans
from ...runtime.workers import Workers
from ..quantize.algorithms.rtn import round_to_nearest
from ..quantize.grid import Format
from ..quantize.quantized_weight import Floats
from .fold import Doubles, read_weight
from .method import Choice

_SMALLEST_SCALE = 1e-4


@dataclasses.dataclass(frozen=True)
class AWQ:
    """The method.

    Attributes:
        grid_of: the grid that weights will be quantised to, by the type that its scales are stored in.
        group_size: rows that share a scale of that grid; −1 for all.
        candidates: how many exponents are tried.
    """

    grid_of: Callable[[ir.DataType], Format]
    group_size: int
    candidates: int

    def reason_to_skip(self, linears: Sequence[Linear]) -> str | None:
        """Groups that do not divide the input will not be quantised, so there is no error to lower."""
        if self.group_size > 0 and linears[0].in_features % self.group_size:
            return f"in_features % {self.group_size}"
        return None

    def watch(self, name: str, linears: Sequence[Linear]) -> AWQWatcher:
        """Begin with one group."""
        return AWQWatcher(name, linears, self)


class AWQWatcher:
    """Collects the mean magnitude of every channel and the second moment of all."""

    def __init__(self, name: str, linears: Sequence[Linear], method: AWQ) -> None:
        self._linears, self._method = linears, method
        self._means = ChannelMeans(linears[0].in_features, name)
        self._covariance = Covariance(linears[0].in_features)

    def update(self, rows: npt.NDArray[np.float32]) -> None:
        """Take note of rows [tokens, channels]."""
        self._means.update(rows)
        self._covariance.update(rows)

    def choose(self, workers: Workers) -> Choice:
        """The scale with the least output error."""
        weight = _side_by_side(self._linears)
        covariance = self._covariance.mean.astype(np.float32)
        grid = self._method.grid_of(_scale_dtype(self._linears[0].weight))
        exponents = np.arange(self._method.candidates) / self._method.candidates
        scales = [awq_scale(self._means.means, exponent) for exponent in exponents]
        errors = list(workers.map(_error_of, (weight, covariance, grid), scales))
        best = int(np.argmin(errors))
        if not errors[best] < errors[0]:
            return Choice(None, "r = 0: no scale lowers the output error, left as it is")
        energy = _energy(weight, covariance)
        before, after = (np.sqrt(error / energy) for error in (errors[0], errors[best]))
        return Choice(
            scales[best], f"r = {exponents[best]:.2f}: relative output error {before:.3g} → {after:.3g}"
        )


def awq_scale(means: Doubles, exponent: float) -> Doubles:
    """s [channels] from mean|x| [channels]."""
    scale = np.maximum(means**exponent, _SMALLEST_SCALE)
    scale /= np.sqrt(scale.max() * scale.min())
    return scale


def _error_of(shared: tuple[Floats, Floats, Format], scale: Doubles) -> float:
    """`output_error` as a function for workers."""
    weight, covariance, grid = shared
    return output_error(weight, scale, covariance, grid)


def output_error(weight: Floats, scale: Doubles, covariance: Floats, grid: Format) -> float:
    """E‖x Δ‖² of ``weight`` [K, N], scaled by ``scale`` [K], quantised to ``grid`` and scaled back."""
    factor = scale.astype(np.float32)[:, None]
    scaled = weight * factor
    quantized = round_to_nearest(scaled, grid).dequantized()
    return _energy(weight - quantized / factor, covariance)


def _energy(weight: Floats, covariance: Floats) -> float:
    """tr(Wᵀ C W); the products in float32, which tells candidates apart, their sum in float64."""
    return float(np.einsum("kn,kn->n", weight, covariance @ weight).sum(dtype=np.float64))


def _scale_dtype(weight: ir.Value) -> ir.DataType:
    """The type that a grid's scales will be stored in; of float64, which no kernel takes, the next one."""
    return ir.DataType.FLOAT if weight.dtype in (None, ir.DataType.DOUBLE) else weight.dtype


def _side_by_side(linears: Sequence[Linear]) -> Floats:
    """The weights [K, N] of linears that read the same input as one: the grid does not join columns."""
    weights = (read_weight(linear.weight).astype(np.float32) for linear in linears)
    return np.concatenate(
        [weight.T if linear.transposed else weight for linear, weight in zip(linears, weights, strict=True)],
        axis=1,
    )
