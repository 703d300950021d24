"""How many tokens each layer keeps, so that all together keep the share that was asked for.

    uniform:  shareₗ = keep
    pyramid:  shareₗ falls in equal steps from 2·keep − least to least = keep / β over the layers, β = 20

    prefix:   shareₗ is the smallest one whose tokens have the mass m of a layer's attention; m is the same
              for all layers, and such that the mean of the shares is keep

    heads:    as prefix, with the curves of single heads of keys and values, at least 0.2 · keep each
    cokv:     share_h = least + λ · max(c_h − c₍ₖ₎, 0), at least 0.2 · keep each; c_h is the contribution of a
              head (see `contributions`), c₍ₖ₎ the largest of the lowest quarter, λ makes the mean keep

By heads and cokv, the heads of a layer form two groups with caches of their own (see `split_heads`), which
keep the mean of their shares.

A share cannot exceed 1; what the first layers cannot take, the last ones get (least = 2·keep − 1). The mass
of a token is what it gets of the attention of all heads and all later tokens, on calibration data; tokens are
sorted by it, and mass is cumulated.

Sources: Cai et al., 2024, "PyramidKV: dynamic KV cache compression based on pyramidal information funneling"
(https://arxiv.org/abs/2406.02069); Wang et al., 2024, "PrefixKV: adaptive prefix KV cache is what vision
instruction-following models need for efficient generation" (https://arxiv.org/abs/2412.03409); for heads,
after the idea of Feng et al., 2024, "Ada-KV: optimizing KV cache eviction by adaptive budget allocation"
(https://arxiv.org/abs/2407.11550), here before any text is seen; Sun et al., 2025, "CoKV: optimizing KV cache
allocation via cooperative game" (https://arxiv.org/abs/2502.17501).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import softmax

Budget = Literal["uniform", "pyramid", "prefix", "heads", "cokv"]
Curve = npt.NDArray[np.float64]
"""Mass of the tokens with the most of it, at the shares `SHARES` of all tokens; rises from 0 to 1."""
SHARES = np.linspace(0, 1, 201)
_STEEPNESS = 20
_FLOOR = 0.2


def layer_shares(budget: Literal["uniform", "pyramid"], keep: float, layers: int) -> list[float]:
    """The share of tokens that each layer keeps; their mean is ``keep``."""
    if budget == "uniform" or layers == 1:
        return [keep] * layers
    least = max(keep / _STEEPNESS, 2 * keep - 1)
    return [float(share) for share in np.linspace(2 * keep - least, least, layers)]


def prefix_shares(curves: Sequence[Curve], keep: float) -> list[float]:
    """The share of tokens that each layer keeps, by the curves of their mass."""

    def shares(mass: float) -> list[float]:
        return [float(np.interp(mass, curve, SHARES)) for curve in curves]

    if keep >= 1:
        return [1.0] * len(curves)
    mass = brentq(lambda mass: np.mean(shares(mass)) - keep, 0.0, 1.0)
    return shares(mass)


def mass_curve(queries: npt.NDArray[Any], keys: npt.NDArray[Any], scale: float) -> Curve:
    """Of one text in one layer.

    Args:
        queries: [.., tokens, size], rotated; the mean is over all axes before.
        keys: alike, or with axes of length 1.
        scale: of their products.
    """
    products = queries.astype(np.float64) @ keys.astype(np.float64).swapaxes(-1, -2) * scale
    length = products.shape[-1]
    hidden = np.triu(np.ones((length, length), bool), 1)
    received = softmax(np.where(hidden, -np.inf, products), axis=-1).reshape(-1, length).mean(axis=0)
    mass = np.sort(received)[::-1]
    cumulated = np.concatenate([[0.0], mass.cumsum()])
    curve: Curve = np.interp(SHARES, np.arange(length + 1) / length, cumulated / cumulated[-1])
    return curve


@dataclasses.dataclass(frozen=True)
class HeadGroups:
    """The heads of one layer, in groups.

    Attributes:
        heads: of keys and values, by group.
        shares: of tokens that each group keeps.
    """

    heads: tuple[tuple[int, ...], ...]
    shares: tuple[float, ...]


def mass_shares(curves: Sequence[Sequence[Curve]], keep: float) -> list[list[float]]:
    """The share of tokens that each head of each layer keeps, by curves of mass; their mean is ``keep``."""
    least = _FLOOR * keep
    flat = [curve for layer in curves for curve in layer]
    by_mass = iter(prefix_shares(flat, (keep - least) / (1 - least)) if keep < 1 else [1.0] * len(flat))
    return [[least + (1 - least) * next(by_mass) for _ in layer] for layer in curves]


def contribution_shares(contributions: Sequence[npt.NDArray[np.float64]], keep: float) -> list[list[float]]:
    """The share of tokens that each head of each layer keeps, by contributions; their mean is ``keep``."""
    flat = np.concatenate(contributions)
    useless = np.sort(flat)[max(len(flat) // 4, 1) - 1]
    above = np.maximum(flat - useless, 0.0)
    # Without a difference between heads, all keep alike.
    above = above if above.any() else np.ones_like(flat)
    least = _FLOOR * keep

    def shares(factor: float) -> npt.NDArray[np.float64]:
        return np.minimum(least + factor * above, 1.0)

    most = (1 - least) / above[above > 0].min()
    if shares(most).mean() <= keep:
        # Heads that contribute keep everything, and the others what is left for them.
        rest = above == 0
        found = np.where(rest, keep, 1.0)
        if rest.any():
            found[rest] = (keep * len(flat) - (~rest).sum()) / rest.sum()
    else:
        found = shares(brentq(lambda factor: shares(factor).mean() - keep, 0.0, most))
    ends = np.cumsum([len(layer) for layer in contributions])[:-1]
    return [[float(share) for share in layer] for layer in np.split(found, ends)]


def grouped(shares: Sequence[float]) -> HeadGroups:
    """The heads of one layer in two groups (one where it has one head), from what each is to keep.

    Split where the shares, sorted, are nearest to the means of two groups: least squares.
    """
    order = np.argsort(shares, kind="stable")
    ordered = np.asarray(shares)[order]
    cuts = range(1, len(ordered))
    best = min(
        cuts,
        key=lambda cut: ordered[:cut].var() * cut + ordered[cut:].var() * (len(ordered) - cut),
        default=0,
    )
    parts = [part for part in (slice(0, best), slice(best, None)) if len(ordered[part])]
    return HeadGroups(
        heads=tuple(tuple(sorted(int(head) for head in order[part])) for part in parts),
        shares=tuple(float(ordered[part].mean()) for part in parts),
    )
