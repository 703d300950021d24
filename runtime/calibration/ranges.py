"""Ranges of activations, for static quantisation and for scaling channels, from one pass over the data.

A collector is fed rows of one tensor, batch after batch, and keeps a fixed amount of memory. `RangeCollector`
answers with the range [lowest, highest] that a grid should cover; what lies outside will be clipped.

- ``min-max``: all that was seen.
- ``percentile``: p % of the values; half of the rest is cut off at each end.
- ``mse``: the range whose grid has the least mean squared error, rounding and clipping together.
- ``entropy``: the symmetric clip that loses the least information about the distribution of magnitudes,
  measured by the Kullback-Leibler divergence (Migacz, "8-bit inference with TensorRT", GTC 2017).

All but the first read a histogram. Its bins start at multiples of their width, which is a power of two: when
a value falls outside, the width is doubled and pairs of bins are added up, which loses nothing that a
histogram of the wider bins would have had. So its counts do not depend on the order of the data, nor on how
it was cut into batches. It has between ``bins`` and 2 · ``bins`` + 2 of them over the whole range: one value
far out makes all bins wide.

Ranges always hold zero, so that zero is on the grids that `asymmetric_grid` and `symmetric_scale` make.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ...ir.errors import InputError

Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]
Method = Literal["min-max", "percentile", "mse", "entropy"]
Range = tuple[float, float]

METHODS: tuple[Method, ...] = ("min-max", "percentile", "mse", "entropy")
_FRACTIONS = np.arange(1, 101) / 100
"""Of the whole range, for each end: the candidates of ``mse``."""
_ENTROPY_CANDIDATES = 512
"""Clips that ``entropy`` tries: a finer step than 0.2 % of the range does not change what is clipped."""
_SMOOTHING = 1e-4
"""Of the largest probability: what a bin that the grid left empty counts for in a divergence."""


class RangeCollector:
    """The range of one tensor, collected in one pass.

    Args:
        method: which of `METHODS` chooses the range.
        percentile: for ``percentile``: how many per cent of the values the range holds, above 50 up to 100.
        bins: resolution of the histogram; at least the number of points of the grid.
        bits: of the grid that the range is for; ``mse`` and ``entropy`` depend on it.
        symmetric: the grid is symmetric about zero, without zero point.
        name: of the tensor, for errors.

    Raises:
        ValueError: a setting is out of bounds.
    """

    def __init__(
        self,
        method: Method = "min-max",
        percentile: float = 99.99,
        bins: int = 2048,
        *,
        bits: int = 8,
        symmetric: bool = False,
        name: str = "",
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"range method: expected one of {list(METHODS)}, found {method!r}")
        if not 50 < percentile <= 100:
            raise ValueError(f"percentile: expected more than 50 and at most 100, found {percentile}")
        if bins < 1 << bits:
            raise ValueError(f"bins: expected at least the grid's {1 << bits} points, found {bins}")
        self._method, self._percentile = method, percentile
        self._bits, self._symmetric, self._name = bits, symmetric, name
        self._lowest = self._highest = 0.0
        self._histogram = None if method == "min-max" else _Histogram(bins)
        self.count = 0

    def update(self, rows: Array) -> None:
        """Take note of all values of an array of any shape.

        Raises:
            InputError: it holds NaN or an infinity.
        """
        if not rows.size:
            return
        lowest, highest = float(rows.min()), float(rows.max())
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise _not_finite(self._name)
        self._lowest, self._highest = min(self._lowest, lowest), max(self._highest, highest)
        self.count += rows.size
        if self._histogram is not None:
            self._histogram.add(rows.reshape(-1), self._lowest, self._highest)

    def range(self) -> Range:
        """(lowest, highest): lowest ≤ 0 ≤ highest, both within what was seen or zero.

        Raises:
            InputError: no value was seen.
        """
        if not self.count:
            raise InputError(
                f"calibration: no value of {self._name or 'a tensor'} was seen",
                hint="give calibration data whose samples are not all padding",
            )
        lowest, highest = self._chosen()
        return max(lowest, self._lowest), min(highest, self._highest)

    def _chosen(self) -> Range:
        if self._histogram is None or self._lowest == self._highest:
            return self._lowest, self._highest
        if self._method == "percentile":
            return _percentile_range(self._histogram, self._percentile)
        if self._method == "mse":
            return _mse_range(self._histogram, (self._lowest, self._highest), self._bits, self._symmetric)
        return _entropy_range(self._histogram, self._bits, self._symmetric)


def asymmetric_grid(lowest: float, highest: float, bits: int = 8) -> tuple[float, int]:
    """Scale and zero point of x̂ = (q − zero point) · scale, 0 ≤ q < 2^bits, that cover the range and zero."""
    lowest, highest = min(lowest, 0.0), max(highest, 0.0)
    top = (1 << bits) - 1
    scale = _usable((highest - lowest) / top)
    return scale, round(-lowest / scale)


def symmetric_scale(lowest: float, highest: float, bits: int = 8) -> float:
    """Scale of x̂ = q · scale, |q| < 2^(bits−1), over [lowest, highest]."""
    return _usable(max(-lowest, highest) / ((1 << (bits - 1)) - 1))


def _usable(scale: float) -> float:
    """1 for what float32 cannot divide by."""
    return scale if scale >= np.finfo(np.float32).tiny else 1.0


class ChannelMaxima:
    """max |x| of every channel, over all rows. SmoothQuant's statistic of activations.

    Args:
        channels: the length of a row.
        name: of the tensor, for errors.
    """

    def __init__(self, channels: int, name: str = "") -> None:
        self._name = name
        self.maxima: npt.NDArray[np.float32] = np.zeros(channels, np.float32)

    def update(self, rows: Array) -> None:
        """Take note of rows [tokens, channels].

        Raises:
            InputError: they hold NaN or an infinity.
        """
        if not rows.size:
            return
        found = np.maximum(rows.max(axis=0), -rows.min(axis=0))
        if not np.isfinite(found).all():
            raise _not_finite(self._name)
        np.maximum(self.maxima, found, out=self.maxima)


class ChannelMeans:
    """mean |x| of every channel, over all rows. AWQ's statistic of activations.

    Args:
        channels: the length of a row.
        name: of the tensor, for errors.
    """

    def __init__(self, channels: int, name: str = "") -> None:
        self._name = name
        self._sum: Doubles = np.zeros(channels)
        self.tokens = 0

    def update(self, rows: Array) -> None:
        """Take note of rows [tokens, channels].

        Raises:
            InputError: they hold NaN or an infinity.
        """
        found = np.abs(rows).sum(axis=0, dtype=np.float64)
        if not np.isfinite(found).all():
            raise _not_finite(self._name)
        self._sum += found
        self.tokens += len(rows)

    @property
    def means(self) -> Doubles:
        """mean |x| [channels]; zeros where there was no row."""
        return self._sum / max(self.tokens, 1)


class _Histogram:
    """Counts of values in bins [k · width, (k + 1) · width); zeros are counted apart.

    Zero is on every grid, so how many there are (half of what a ReLU gives) must not weigh in the choice.

    Attributes:
        width: of a bin, a power of two; 0 before the first value that is not zero.
        first: k of the first bin.
        counts: of the bins, [bins].
        zeros: how many values are exactly zero.
    """

    def __init__(self, bins: int) -> None:
        self._most_bins = 2 * bins
        self.width = 0.0
        self.first = 0
        self.counts: Doubles = np.zeros(0)
        self.zeros = 0

    def add(self, values: Array, lowest: float, highest: float) -> None:
        """Count ``values`` [n]; [lowest, highest] holds zero, them and all that were counted before."""
        nonzero = values[values != 0].astype(np.float64)
        self.zeros += values.size - nonzero.size
        if not nonzero.size:
            return
        # The smallest power of two that the range fits with.
        mantissa, exponent = math.frexp((highest - lowest) / self._most_bins)
        width = math.ldexp(1.0, exponent - (mantissa == 0.5))
        self._resize(width, math.floor(lowest / width), math.floor(highest / width))
        index = np.floor(nonzero / width).astype(np.int64) - self.first
        self.counts += np.bincount(index, minlength=self.counts.size)

    def _resize(self, width: float, first: int, last: int) -> None:
        """Use bins of ``width``, from ``first`` to ``last``; the counts of narrower ones are added up."""
        counts = np.zeros(last - first + 1)
        if self.width:
            shift = round(math.log2(width / self.width))
            index = ((np.arange(self.counts.size) + self.first) >> shift) - first
            np.add.at(counts, index, self.counts)
        self.width, self.first, self.counts = width, first, counts

    @property
    def centres(self) -> Doubles:
        """The middle of every bin."""
        return (np.arange(self.counts.size, dtype=np.float64) + self.first + 0.5) * self.width

    def quantiles(self, fractions: Doubles) -> Doubles:
        """The values that these fractions of all values lie below, interpolated within a bin."""
        below = -self.first
        steps = np.insert(self.counts, below, self.zeros)
        edges: Doubles = np.insert((np.arange(self.counts.size + 1) + self.first) * self.width, below, 0.0)
        cumulative = np.concatenate([[0.0], np.cumsum(steps)])
        quantiles: Doubles = np.interp(fractions * cumulative[-1], cumulative, edges)
        return quantiles

    def magnitudes(self) -> Doubles:
        """Counts of |x| in bins [k · width, (k + 1) · width), k from 0."""
        negative, positive = self.counts[: -self.first][::-1], self.counts[-self.first :]
        total = np.zeros(max(negative.size, positive.size))
        total[: negative.size] += negative
        total[: positive.size] += positive
        return total


def _percentile_range(histogram: _Histogram, percentile: float) -> Range:
    outside = (1 - percentile / 100) / 2
    lowest, highest = histogram.quantiles(np.array([outside, 1 - outside]))
    return min(float(lowest), 0.0), max(float(highest), 0.0)


def _mse_range(histogram: _Histogram, whole: Range, bits: int, symmetric: bool) -> Range:
    """Fractions of both ends: the best pair of equal ones, then each end in turn while the error falls."""

    def error(low: float, high: float) -> float:
        return _squared_error(histogram, (low * whole[0], high * whole[1]), bits, symmetric)

    low = high = _best(lambda fraction: error(fraction, fraction))
    least = error(low, high)
    # In a symmetric grid both ends are at the same distance from zero.
    while not symmetric:
        low = _best(functools.partial(error, high=high))
        high = _best(functools.partial(error, low))
        found = error(low, high)
        if found >= least:
            break
        least = found
    return low * whole[0], high * whole[1]


def _best(error: Callable[[float], float]) -> float:
    """The candidate fraction with the least error; the largest of equal ones."""
    return float(min(reversed(_FRACTIONS), key=error))


def _squared_error(histogram: _Histogram, clip: Range, bits: int, symmetric: bool) -> float:
    """Σ (x − x̂)² over the histogram for the grid of the range ``clip``."""
    if symmetric:
        scale, zero = symmetric_scale(*clip, bits), 1 << (bits - 1)
    else:
        scale, zero = asymmetric_grid(*clip, bits)
    x = histogram.centres
    codes = np.clip(np.rint(x / scale) + zero, 0, (1 << bits) - 1)
    return float(histogram.counts @ (x - (codes - zero) * scale) ** 2)


def _entropy_range(histogram: _Histogram, bits: int, symmetric: bool) -> Range:
    """±t for the t that leaves the least divergence between the magnitudes and their quantised form."""
    below = -histogram.first
    one_sided = not histogram.counts[:below].any() or not histogram.counts[below:].any()
    levels = 1 << (bits if one_sided and not symmetric else bits - 1)
    magnitudes = histogram.magnitudes()
    step = max(1, magnitudes.size // _ENTROPY_CANDIDATES)
    candidates = range(magnitudes.size, min(levels, magnitudes.size) - 1, -step)
    kept = min(candidates, key=lambda bins: _divergence(magnitudes, bins, levels))
    return -kept * histogram.width, kept * histogram.width


def _divergence(magnitudes: Doubles, kept: int, levels: int) -> float:
    """KL(P‖Q): P has the first ``kept`` bins and what is beyond in the last; Q has them on ``levels`` points.

    A point's count is spread evenly over those of its bins that are not empty.
    """
    inside = magnitudes[:kept]
    p = inside.copy()
    p[-1] += magnitudes[kept:].sum()
    starts = np.arange(levels) * kept // levels
    filled = inside > 0
    sums, used = np.add.reduceat(inside, starts), np.add.reduceat(filled.astype(np.float64), starts)
    q = np.repeat(sums / np.maximum(used, 1), np.diff(starts, append=kept)) * filled
    p, q = p[p > 0], q[p > 0]
    if not q.any():
        return math.inf
    p, q = p / p.sum(), np.maximum(q / q.sum(), _SMOOTHING * float(p.max() / p.sum()))
    return float(p @ np.log(p / q))


def _not_finite(name: str) -> InputError:
    return InputError(
        f"calibration: the activations {name!r} hold NaN or infinity"
        if name
        else "calibration: activations hold NaN or infinity",
        hint="the model itself overflows on this data: look at the samples and the weights",
    )
