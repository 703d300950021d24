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
from ...runtime.calibration import ActivationStream

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
    distances = _nearest_distances(rows, neighbours)
    count, features = rows.shape
    ball = 0.5 * features * np.log(np.pi) - gammaln(0.5 * features + 1)
    with np.errstate(divide="ignore"):
        logarithms = np.log(distances)
    return float(digamma(count) - digamma(neighbours) + ball + features * logarithms.mean())


def entropy_gain(before: Array, after: Array, neighbours: int) -> float:
    """H(after) − H(before) in nats, features standardised.

    Tokens with many copies in either are left out of both: under a causal mask the first token is the same in
    every sample, and before the first attention a frequent word is; their entropy is minus infinity. Where
    hardly any token is left, so is the whole entropy, and a block that tells copies apart gains infinity.

    Args:
        before, after: the same tokens in the same order, [tokens, features].
        neighbours: k.

    Raises:
        InputError: there are no more tokens than ``neighbours``.
    """
    masks = [_distinct(rows, neighbours) for rows in (before, after)]
    distinct = masks[0] & masks[1]
    if distinct.sum() > neighbours:
        first, second = (
            differential_entropy(_standardised(rows[distinct]), neighbours) for rows in (before, after)
        )
        return second - first
    can_tell = [bool(mask.sum() > neighbours) for mask in masks]
    if can_tell[0] == can_tell[1]:
        return 0.0
    return math.inf if can_tell[1] else -math.inf


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
    for span in spans:
        taken: tuple[list[Array], list[Array]] = ([], [])
        for tap in stream.advance(span):
            for name, rows in zip(span, taken, strict=True):
                rows.append(_spread(tap.rows(name), quota))
        before, after = (np.concatenate(rows) for rows in taken)
        for name, values in zip(span, (before, after), strict=True):
            if not np.isfinite(values).all():
                raise InputError(f"{name!r} holds NaN or infinity on the calibration data")
        yield entropy_gain(before, after, neighbours)


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


def _distinct(rows: Array, neighbours: int) -> npt.NDArray[np.bool_]:
    """Which rows do not have ``neighbours`` copies of themselves."""
    nearest = _nearest_distances(_standardised(rows), neighbours)
    return np.asarray(nearest > _COPY * math.sqrt(rows.shape[1]))


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
