"""The grids of a quantised cache, from the keys and values of calibration data.

    int8: s = a / 127      int4: s = argmin over shares r of Σ (x − s·clip(round(x / s)))², s = r · a / 7

a is the largest magnitude of a channel, or of the whole tensor. Keys are rotated by their position: a channel
pair (k_i, k_j) keeps its norm √(k_i² + k_j²) and turns, so at another position either channel may be as large
as the norm. a is therefore the norm's maximum for both.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

Granularity = Literal["per-channel", "per-tensor"]
Rows = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

LEVELS = {8: 127, 4: 7}
"""The largest integer of a symmetric grid, by bits."""
_SHARES = np.linspace(1.0, 0.4, 13)
"""Of the largest magnitude, what a grid of 4 bits may end at."""
_TINY = 1e-8


def magnitudes(rows: Rows, pairs: npt.NDArray[np.int64] | None) -> Doubles:
    """[channels], the largest magnitude that each has, or may have at another position.

    Args:
        rows: [tokens, channels].
        pairs: [pairs, 2], channels that are rotated together; None if there are none.
    """
    found: Doubles = np.abs(rows).max(axis=0).astype(np.float64)
    if pairs is not None and len(pairs):
        norms = np.hypot(rows[:, pairs[:, 0]], rows[:, pairs[:, 1]]).max(axis=0)
        found[pairs[:, 0]] = found[pairs[:, 1]] = norms
    return found


def scales(rows: Rows, largest: Doubles, *, bits: int, granularity: Granularity) -> npt.NDArray[np.float32]:
    """[channels], or [1] for one grid of the whole tensor.

    Args:
        rows: [tokens, channels], what a clipped grid is chosen on.
        largest: [channels], see `magnitudes`.
        bits: 8 or 4.
        granularity: what shares a grid.
    """
    if granularity == "per-tensor":
        largest = np.array([largest.max()])
    largest = np.maximum(largest, _TINY)
    whole = largest / LEVELS[bits]
    if bits == 8:
        return whole.astype(np.float32)
    errors = np.stack([_error(rows, share * whole, bits, granularity) for share in _SHARES])
    best: npt.NDArray[np.float32] = (whole * _SHARES[errors.argmin(axis=0)]).astype(np.float32)
    return best


def _error(rows: Rows, scale: Doubles, bits: int, granularity: Granularity) -> Doubles:
    levels = LEVELS[bits]
    rounded = np.clip(np.round(rows / scale), -levels - 1, levels) * scale
    squared = np.square(rounded - rows, dtype=np.float64)
    summed: Doubles = squared.sum(axis=0)
    return summed if granularity == "per-channel" else summed.sum(keepdims=True)
