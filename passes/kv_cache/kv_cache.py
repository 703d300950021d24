"""Keep the key-value cache of a decoder in 8 or 4 bits.

    k̂ = s_k · clip(round(k / s_k)),   v̂ = s_v · clip(round(v / s_v)),   Y = softmax(scale · Q k̂ᵀ) · v̂

Keys are stored after their rotation. Scales are constants, one per channel of each head or one per layer,
from calibration data (see `scales`). What is new is quantised before it is attended to, as in the kernel.

Hadamard rotations of values (R2) and of queries and keys (R3) spread outliers and go before this pass:
``rotate{rotations=[R2,R3]},kv-cache{bits=4}``.

Preconditions: the fused form; calibration data; a float cache. The caches that the model takes and gives have
another type afterwards: int8, or uint8 with two numbers of 4 bits in a byte.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...ir import ops
from ...ir.errors import PassError
from ...ir.ops.cached_attention import BITS, cached_attention
from ...ir.views.caches import CachedLayer
from ...ir.views.values import integer, number
from ...runtime.calibration import ActivationStream
from ..infrastructure.base import Contract, Coverage, Fact, Pass, PassContext, PassResult
from .raise_cache import raised_layers
from .scales import Granularity, Rows, magnitudes, scales

_MOST_ROWS = 4096
"""Tokens of a layer that grids are chosen on."""
_STORED = {8: ir.DataType.INT8, 4: ir.DataType.UINT8}


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache(Pass):
    """Store keys and values in fewer bits.

    Attributes:
        bits: of a stored number.
        granularity: whether each channel of each head has a scale, or all keys (values) of a layer one.
    """

    name: ClassVar[str] = "kv-cache"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL, Fact.FUSED})

    bits: Literal[8, 4] = 8
    granularity: Granularity = "per-channel"

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        """Rewrite ``model`` in place."""
        layers = raised_layers(model, self.name)
        done = next((layer for layer in layers if BITS[layer.attention.overload] != 32), None)
        if done is not None:
            raise PassError(f"kv-cache: past_key_values.{done.index} is quantised already")
        stream = ctx.activation_stream(model)
        grids = [self._grids(layer, stream) for layer in ctx.progress(layers, "observe keys and values")]
        caches = [value for layer in layers for value in (layer.present_key, layer.present_value)]
        names = frozenset(str(value.name) for value in caches)  # which go over to the new nodes
        for layer, pair in zip(layers, grids, strict=True):
            self._replace(model, layer, pair)
        return PassResult(
            modified=True,
            coverage=Coverage(unit="layers of the cache", covered=len(layers)),
            redefined_outputs=names,
        )

    def _grids(self, layer: CachedLayer, stream: ActivationStream) -> list[npt.NDArray[np.float32]]:
        """The scales of keys and of values."""
        key, value = layer.attention.inputs[1:3]
        assert key is not None
        assert value is not None
        taps = [(tap.rows(key), tap.rows(value)) for tap in stream.advance([key, value])]
        return [
            self._scales(layer, [pair[part] for pair in taps], pairs)
            for part, pairs in ((0, _rotated_pairs(key, layer)), (1, None))
        ]

    def _scales(
        self, layer: CachedLayer, samples: Sequence[Rows], pairs: npt.NDArray[np.int64] | None
    ) -> npt.NDArray[np.float32]:
        """[1], or [1, heads, 1, size]."""
        largest = np.max([magnitudes(rows, pairs) for rows in samples], axis=0)
        if not np.isfinite(largest).all():
            raise PassError(
                f"kv-cache: keys or values of past_key_values.{layer.index} are not finite on the data",
                hint="look at the calibration data and at the model's weights",
            )
        rows = np.concatenate(samples)
        rows = rows[:: max(1, len(rows) // _MOST_ROWS)]
        found = scales(rows, largest, bits=self.bits, granularity=self.granularity)
        return found if self.granularity == "per-tensor" else found.reshape(1, layer.heads, 1, -1)

    def _replace(self, model: ir.Model, layer: CachedLayer, grids: Sequence[npt.NDArray[np.float32]]) -> None:
        node = layer.attention
        for cache in (layer.past_key, layer.past_value, layer.present_key, layer.present_value):
            _retype(cache, self.bits)
        constants = [
            _initializer(model, f"model.layers.{layer.index}.attn.{name}_scale", grid)
            for name, grid in zip("kv", grids, strict=True)
        ]
        query, key, value, mask = node.inputs[:4]
        assert query is not None
        assert key is not None
        assert value is not None
        assert mask is not None
        new, definition = cached_attention(
            query,
            key,
            value,
            mask,
            (layer.past_key, layer.past_value),
            q_num_heads=integer(node, "q_num_heads") or 0,
            kv_num_heads=integer(node, "kv_num_heads") or 0,
            scale=number(node, "scale", 0.0),
            softcap=number(node, "softcap", 0.0),
            window=integer(node, "window") or 0,
            scales=(constants[0], constants[1]),
            bits=self.bits,
            name=node.name,
        )
        ops.define(model, definition)
        ops.replace(node, new)


def _retype(value: ir.Value, bits: Literal[8, 4]) -> None:
    """[batch, heads, length, size] as integers; two to a byte if they have 4 bits."""
    value.type = ir.TensorType(_STORED[bits])
    if bits == 4 and value.shape is not None:
        *others, size = value.shape
        assert isinstance(size, int)
        value.shape = ir.Shape([*others, size // 2])


def _initializer(model: ir.Model, name: str, array: npt.NDArray[np.float32]) -> ir.Value:
    value = ir.val(name, dtype=ir.DataType.FLOAT, shape=array.shape, const_value=ir.tensor(array, name=name))
    model.graph.register_initializer(value)
    return value


def _rotated_pairs(key: ir.Value, layer: CachedLayer) -> npt.NDArray[np.int64] | None:
    """[pairs, 2], channels of all heads side by side that RotaryEmbedding turns together."""
    node = key.producer()
    if node is None or node.op_type != "RotaryEmbedding":
        return None
    size = layer.key_size
    rotated = integer(node, "rotary_embedding_dim") or size
    if integer(node, "interleaved"):
        first = np.arange(0, rotated, 2)
        pairs = np.stack([first, first + 1], axis=1)
    else:
        first = np.arange(rotated // 2)
        pairs = np.stack([first, first + rotated // 2], axis=1)
    heads = np.arange(layer.heads)[:, None, None] * size
    found: npt.NDArray[np.int64] = (heads + pairs).reshape(-1, 2)
    return found
