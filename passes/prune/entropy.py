"""How much entropy a block of the residual stream adds: H(x + f(x)) − H(x), estimated from tokens.

The estimate of Kozachenko and Leonenko (1987) from the distance r_i of each of N vectors of d features to its
k-th nearest other one:

    H = ψ(N) − ψ(k) + log V_d + d/N · Σ_i log r_i,      V_d = π^(d/2) / Γ(d/2 + 1)

Each feature is first brought to mean 0 and variance 1, in x and in x + f(x) by itself: a stream that only
grows in size says nothing new, because a norm stands before everything that reads it. A block that adds
nothing gains 0 exactly. Distances come from blocks of the Gram matrix: with hundreds of features, a search
tree would visit nearly every leaf and only add to the cost of comparing all pairs.

After the entropy-based block pruning of Yang et al. (2025, EntroDrop), who use k = 25.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import digamma, gammaln

from ...ir.errors import InputError
from ...runtime.calibration import ActivationStream, Tap

Array = npt.NDArray[Any]

_ROWS_AT_ONCE = 512
_COPY = 1e-3
"""A token whose k-th neighbour is nearer than this share of the root mean square of all tokens' sizes has k
copies: in float32, copies from different batches differ by some 1e-6 of it, other tokens by 1e-1."""


def differential_entropy(rows: Array, neighbours: int) -> float:
    """The estimated entropy in nats of the distribution that ``rows`` [vectors, features] are drawn from.

    Minus infinity if a vector has as many copies as ``neighbours``.

    Raises:
        InputError: there are no more vectors than ``neighbours``.
    """
    return _entropy(_nearest_distances(rows, neighbours), rows.shape[1], neighbours)


class Cloud:
    """The vectors that tokens are at one place of the stream, standardised.

    Args:
        rows: [tokens, features], finite.
        neighbours: k.

    Attributes:
        distinct: [tokens], which do not have k copies of themselves. Under a causal mask the first token is
            the same in every sample, and before the first attention a frequent word is.

    Raises:
        InputError: there are no more tokens than ``neighbours``.
    """

    def __init__(self, rows: Array, neighbours: int) -> None:
        self._rows, self._neighbours = rows, neighbours
        self._distances = _nearest_distances(_standardised(rows), neighbours)
        self.distinct: npt.NDArray[np.bool_] = self._distances > _COPY * math.sqrt(rows.shape[1])

    def is_enough(self, chosen: npt.NDArray[np.bool_]) -> bool:
        """Whether the entropy can be estimated from the chosen tokens alone."""
        return int(chosen.sum()) > self._neighbours

    def entropy(self, chosen: npt.NDArray[np.bool_]) -> float:
        """The entropy of the chosen tokens, as if there were no others."""
        if chosen.all():
            return _entropy(self._distances, self._rows.shape[1], self._neighbours)
        return differential_entropy(_standardised(self._rows[chosen]), self._neighbours)


def entropy_gain(before: Cloud, after: Cloud) -> float:
    """H(after) − H(before) in nats, of the same tokens in the same order.

    Tokens that have many copies in either are left out of both: their entropy is minus infinity. Where hardly
    any token is left, so is the whole entropy, and a block that tells copies apart gains infinity.
    """
    distinct = before.distinct & after.distinct
    if before.is_enough(distinct):
        return after.entropy(distinct) - before.entropy(distinct)
    tells_apart = [cloud.is_enough(cloud.distinct) for cloud in (before, after)]
    if tells_apart[0] == tells_apart[1]:
        return 0.0
    return math.inf if tells_apart[1] else -math.inf


def entropy_gains(
    stream: ActivationStream, spans: Iterable[tuple[str, str]], *, tokens: int, neighbours: int
) -> Iterator[float]:
    """The gain of each span of the residual stream, as the stream moves on.

    Args:
        stream: at the beginning of the model.
        spans: names of the values before and after each block, in the graph's order.
        tokens: how many to take: as many from each batch, at equal distances.
        neighbours: k.

    Raises:
        InputError: a value holds NaN or infinity, or there are too few tokens.
    """
    quota = -(-tokens // len(stream))
    clouds: dict[str, Cloud] = {}
    for span in spans:
        # Where blocks follow one another, one begins where the last one ended.
        clouds = {name: cloud for name, cloud in clouds.items() if name in span}
        new = [name for name in span if name not in clouds]
        taken: dict[str, list[Array]] = {name: [] for name in new}
        for tap in stream.advance(new):
            for name, rows in taken.items():
                rows.append(_spread(_token_rows(tap, name), quota))
        for name, rows in taken.items():
            values = np.concatenate(rows)
            if not np.isfinite(values).all():
                raise InputError(f"{name!r} holds NaN or infinity on the calibration data")
            clouds[name] = Cloud(values, neighbours)
        before, after = span
        yield entropy_gain(clouds[before], clouds[after])


def _token_rows(tap: Tap, name: str) -> Array:
    """[tokens, features]; of images [batch, channels, height, width], pixels are the tokens."""
    array = tap.array(name)
    return tap.rows(name) if array.ndim != 4 else np.moveaxis(array, 1, -1).reshape(-1, array.shape[1])


def _spread(rows: Array, count: int) -> Array:
    """At most ``count`` of the rows, at equal distances."""
    if len(rows) <= count:
        return rows
    return rows[((np.arange(count) + 0.5) * (len(rows) / count)).astype(np.int64)]


def _standardised(rows: Array) -> Array:
    """Each feature with mean 0 and variance 1, in float64; one that is constant becomes 0."""
    centred = rows - rows.mean(0, dtype=np.float64)
    deviation = centred.std(0)
    # What rounding leaves of a constant is no variation.
    varies = deviation > 1e-6 * np.abs(rows).max(0)
    return np.where(varies, centred / np.where(varies, deviation, 1.0), 0.0)


def _entropy(distances: Array, features: int, neighbours: int) -> float:
    """The estimate from the distance of each vector to its k-th neighbour."""
    ball = 0.5 * features * np.log(np.pi) - gammaln(0.5 * features + 1)
    with np.errstate(divide="ignore"):
        logarithms = np.log(distances)
    count = len(distances)
    return float(digamma(count) - digamma(neighbours) + ball + features * logarithms.mean())


def _nearest_distances(rows: Array, neighbours: int) -> Array:
    """The Euclidean distance of each row to its k-th nearest other row, float64 [rows]."""
    if len(rows) <= neighbours:
        raise InputError(
            f"the entropy needs more than {neighbours} tokens, found {len(rows)}",
            hint="give more calibration data, or a smaller neighbours=",
        )
    points = np.asarray(rows, np.float64)
    sizes = np.square(points).sum(1)
    found = np.empty(len(points))
    for start in range(0, len(points), _ROWS_AT_ONCE):
        block = slice(start, start + _ROWS_AT_ONCE)
        squared = sizes[block, None] + sizes - 2.0 * (points[block] @ points.T)
        own = np.arange(len(squared))
        squared[own, start + own] = np.inf
        found[block] = np.partition(squared, neighbours - 1, axis=1)[:, neighbours - 1]
    return np.sqrt(np.maximum(found, 0.0))
