"""What calibration data say of a layer's attention: its queries, and how it is spread over tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ....ir.errors import PassError
from ....ir.views.caches import CachedLayer
from ....ir.views.values import integer, number
from ....runtime.calibration import ActivationStream
from ....runtime.calibration.stream import Tap
from .budgets import Curve, mass_curve
from .companion import QueryStatistics

Mass = Literal["", "layer", "heads"]

_SINKS = 4
"""First tokens of a text that do not count: their queries are unlike all others."""


@dataclasses.dataclass(frozen=True)
class Observed:
    """What calibration data say of a layer, as far as it was asked for."""

    queries: QueryStatistics | None = None
    mass: tuple[Curve, ...] = ()

    def of_heads(self, heads: Sequence[int], kv_heads: int) -> QueryStatistics | None:
        """The statistics of queries that go with some of all heads of keys."""
        if self.queries is None:
            return None
        shared = len(self.queries.mean) // kv_heads
        chosen = [head * shared + query for head in heads for query in range(shared)]
        return dataclasses.replace(
            self.queries, mean=self.queries.mean[chosen], covariance=self.queries.covariance[chosen]
        )


def observe(layer: CachedLayer, stream: ActivationStream, *, queries: bool, mass: Mass) -> Observed:
    """Run the stream on to the attention of a layer and describe what it reads.

    Args:
        layer: the next one.
        stream: before it.
        queries: describe queries before their rotation.
        mass: describe how attention is spread over tokens: of the whole layer, or of each head of keys.

    Raises:
        PassError: queries or keys are not finite, or all texts are too short.
    """
    rotated, keys = layer.attention.inputs[:2]
    assert rotated is not None
    assert keys is not None
    node = rotated.producer()
    rotary = node if node is not None and node.op_type == "RotaryEmbedding" else None
    plain = rotated if rotary is None else rotary.inputs[0]
    assert plain is not None
    heads = integer(layer.attention, "q_num_heads") or 1
    taps = list(stream.advance([plain, rotated, keys] if mass else [plain]))
    found, curves = None, ()
    if queries:
        mean, covariance = moments([tap.rows(plain, skip=_SINKS) for tap in taps], heads)
        _require_finite(layer, mean, covariance)
        found = QueryStatistics(mean, covariance, rotary)
    if mass:
        groups = [slice(None)] if mass == "layer" else [slice(head, head + 1) for head in range(layer.heads)]
        texts = [text for tap in taps for text in _texts(tap, rotated, keys, layer, heads)]
        scale = number(layer.attention, "scale", 1.0)
        curves = tuple(np.mean([mass_curve(q[g], k[g], scale) for q, k in texts], axis=0) for g in groups)
        _require_finite(layer, *curves)
    return Observed(found, curves)


def _require_finite(layer: CachedLayer, *arrays: npt.NDArray[Any]) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise PassError(
            f"evict: queries of layer {layer.index} are not finite, or no text has more than {_SINKS} tokens",
            hint="look at the calibration data and at the model's weights",
        )


def _texts(
    tap: Tap, queries: ir.Value, keys: ir.Value, layer: CachedLayer, heads: int
) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Of each text: queries [kv_heads, shared, tokens, size] and keys [kv_heads, 1, tokens, size]."""
    for text in range(len(tap.array(keys))):
        real = slice(None) if tap.mask is None else tap.mask[text]
        q, k = (tap.array(value)[text][real] for value in (queries, keys))
        yield (
            q.reshape(len(q), layer.heads, heads // layer.heads, -1).transpose(1, 2, 0, 3),
            k.reshape(len(k), layer.heads, 1, -1).transpose(1, 2, 0, 3),
        )


def moments(
    samples: Iterable[npt.NDArray[np.float32]], heads: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Mean [heads, size] and covariance [heads, size, size] of rows [tokens, heads · size]; NaN for none."""
    count, first, second = 0, np.zeros(()), np.zeros(())
    for rows in samples:
        split = rows.reshape(len(rows), heads, rows.shape[1] // heads).transpose(1, 0, 2).astype(np.float64)
        count += len(rows)
        first = first + split.sum(axis=1)
        second = second + split.transpose(0, 2, 1) @ split
    with np.errstate(invalid="ignore"):
        mean = first / count if count else first * np.nan
        covariance = second / max(count, 1) - mean[..., :, None] * mean[..., None, :]
    return mean.astype(np.float32), covariance.astype(np.float32)
