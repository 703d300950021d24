"""SmoothQuant: share the difficulty of quantisation between activations and weights.

    s_j = max|x_j|^α / max|W_j|^(1 − α)          x_j → x_j / s_j,   W_j → s_j · W_j

max|x_j| is over the calibration tokens, max|W_j| over row j of all the linears that read x. With α = ½ both
end with the same maximum in every channel, the geometric mean of what they had. Xiao et al., "SmoothQuant:
Accurate and Efficient Post-Training Quantization for Large Language Models", ICML 2023, eq. 4.

A channel in which the activations or the weights are all zero is left alone: nothing is known of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ...ir.views import Linear
from ...runtime.calibration.ranges import ChannelMaxima
from ...runtime.workers import Workers
from .fold import Doubles, read_weight
from .method import Choice


@dataclasses.dataclass(frozen=True)
class SmoothQuant:
    """The method with its migration strength ``alpha``: 0 leaves the weights' maxima equal, 1 the inputs'."""

    alpha: float

    def reason_to_skip(self, linears: Sequence[Linear]) -> str | None:
        """None: every linear can be smoothed."""
        del linears
        return None

    def watch(self, name: str, linears: Sequence[Linear]) -> SmoothQuantWatcher:
        """Begin with one group."""
        return SmoothQuantWatcher(name, linears, self.alpha)


class SmoothQuantWatcher:
    """Collects the largest magnitude of every channel."""

    def __init__(self, name: str, linears: Sequence[Linear], alpha: float) -> None:
        self._linears, self._alpha = linears, alpha
        self._activations = ChannelMaxima(linears[0].in_features, name)

    def update(self, rows: npt.NDArray[np.float32]) -> None:
        """Take note of rows [tokens, channels]."""
        self._activations.update(rows)

    def choose(self, workers: Workers) -> Choice:
        """The scale, and how much smaller the largest activation becomes."""
        del workers
        maxima = self._activations.maxima.astype(np.float64)
        scale = smoothing_scale(maxima, _row_maxima(self._linears), self._alpha)
        before, after = float(maxima.max()), float((maxima / scale).max())
        return Choice(scale, f"largest |x| {before:.3g} → {after:.3g}")


def smoothing_scale(activations: Doubles, weights: Doubles, alpha: float) -> Doubles:
    """s [channels] from the maxima of activations and weights [channels]."""
    known = (activations > 0) & (weights > 0)
    x, w = np.where(known, activations, 1), np.where(known, weights, 1)
    scale: Doubles = x**alpha / w ** (1 - alpha)
    return scale


def _row_maxima(linears: Sequence[Linear]) -> Doubles:
    """max |W_j| over the rows j of all weights, [channels]."""
    maxima = np.zeros(linears[0].in_features)
    for linear in linears:
        outputs = 0 if linear.transposed else 1
        np.maximum(maxima, np.abs(read_weight(linear.weight)).max(axis=outputs), out=maxima)
    return maxima
