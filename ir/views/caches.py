"""The key-value cache of a decoder: its layers, as inputs and outputs of the graph."""

from __future__ import annotations

import dataclasses
import re

import onnx_ir as ir

from ..errors import ModelError
from .values import input_at, static_dim

LENGTHS = "cache_lengths"
"""A graph input of decoders whose layers have caches of different lengths: [layers] int64, see `evict`."""
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")


@dataclasses.dataclass(frozen=True)
class CachedLayer:
    """One layer of the cache.

    Attributes:
        index: as in the names of its inputs.
        past_key, past_value: graph inputs, [batch, heads, past, size].
        present_key, present_value: graph outputs, [batch, heads, past + sequence, size].
        attention: the node that reads the past and writes the present.
        heads: of keys and values.
        key_size, value_size: stored numbers of a head.
    """

    index: int
    past_key: ir.Value
    past_value: ir.Value
    present_key: ir.Value
    present_value: ir.Value
    attention: ir.Node
    heads: int
    key_size: int
    value_size: int

    @property
    def head_size(self) -> int:
        """Numbers of a key, however many of them a stored one holds.

        Raises:
            ModelError: the graph does not tell.
        """
        key = input_at(self.attention, 1)
        width = static_dim(key, -1)
        if key is None or key.shape is None or width is None:
            raise ModelError(f"past_key_values.{self.index}: the size of its keys is not known")
        return width // self.heads if len(key.shape) == 3 else width


def cached_layers(model: ir.Model) -> list[CachedLayer]:
    """The layers of the cache that one node reads and writes each, by rising index."""
    found: dict[int, dict[str, ir.Value]] = {}
    for value in model.graph.inputs:
        named = _PAST.fullmatch(str(value.name))
        if named is not None:
            found.setdefault(int(named[1]), {})[named[2]] = value
    outputs = {str(value.name): value for value in model.graph.outputs}
    layers = [_layer(index, found[index], outputs) for index in sorted(found)]
    return [layer for layer in layers if layer is not None]


def _layer(index: int, past: dict[str, ir.Value], outputs: dict[str, ir.Value]) -> CachedLayer | None:
    key, value = past.get("key"), past.get("value")
    present = [outputs.get(f"present.{index}.{part}") for part in ("key", "value")]
    present_key, present_value = present
    if key is None or value is None or present_key is None or present_value is None:
        return None
    node = present_key.producer()
    heads, key_size, value_size = static_dim(key, 1), static_dim(key, 3), static_dim(value, 3)
    if node is None or present_value.producer() is not node or heads is None:
        return None
    if key_size is None or value_size is None or key not in node.inputs or value not in node.inputs:
        return None
    return CachedLayer(index, key, value, present_key, present_value, node, heads, key_size, value_size)
