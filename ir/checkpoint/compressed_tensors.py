"""Checkpoints of compressed-tensors, as llm-compressor writes them: integers of 2 to 8 bits.

Of a linear of K inputs and N outputs, with G groups, in the formats

- ``pack-quantized``: ``weight_packed`` [N, K · b / 32] int32, b bits from low to high and on into the next
  word, each with 2^(b−1) added; ``weight_shape`` [2]. Zero points are packed in the same way along N:
  ``weight_zero_point`` [N · b / 32, G]. Files of before 2026 begin a new word where a field does not fit any
  more, which differs for 3, 5, 6 and 7 bits and shows in the number of words;
- ``int-quantized`` and ``naive-quantized``: ``weight`` [N, K] int8, ``weight_zero_point`` [N, G] int8.

``weight_scale`` is [N, G], [N, 1] or [1]; ``weight_g_idx`` [K] gives groups that do not ascend, or is -1.

    w[n, k] = (q[n, k] − z[n, g[k]]) · s[n, g[k]]

Integers are signed. Which scheme a layer has, ``config_groups`` say by its name, a pattern, or its class.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..errors import ModelError
from .bit_fields import unpack, unpack_whole
from .stored_linear import Activations, Array, StoredLinear, as_array, grouped
from .tensors import Tensors

_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "dense", "mixed-precision")
_CLASS = "Linear"


@dataclasses.dataclass(frozen=True)
class CompressedTensors:
    """The `Layout` of compressed-tensors.

    Attributes:
        schemes: ``config_groups``: targets, weights, activations.
        leftovers: what the configuration asks for beside them and is not done.
    """

    schemes: tuple[Mapping[str, Any], ...]
    leftovers: tuple[str, ...] = ()

    @classmethod
    def of_config(cls, config: Mapping[str, Any], source: str) -> CompressedTensors:
        """From the checkpoint's configuration.

        Raises:
            ModelError: a format of other numbers, sparse weights, or transforms of activations.
        """
        schemes = tuple(config.get("config_groups", {}).values())
        formats = {config.get("format", _FORMATS[0])}
        formats |= {scheme.get("format") for scheme in schemes if isinstance(scheme, Mapping)} - {None}
        unknown = sorted(formats - set(_FORMATS))
        if unknown:
            raise ModelError(
                f"{source}: expected a compressed-tensors format of {', '.join(_FORMATS)}, "
                f"found {unknown[0]!r}",
                hint="quantise the float model with planish",
            )
        sparse = config.get("sparsity_config") or {}
        if sparse.get("format", "dense") != "dense" or config.get("transform_config"):
            raise ModelError(
                f"{source}: sparse compressed weights and online transforms are not read",
                hint="quantise the float model with planish",
            )
        leftover = config.get("kv_cache_scheme")
        return cls(schemes, () if not leftover else ("the key-value cache is quantised in the checkpoint",))

    def layers(self, tensors: Tensors) -> frozenset[str]:
        """Those with packed weights, and those with scales whose weights are integers."""
        scaled = tensors.owners("weight_scale")
        whole = {owner for owner in scaled if f"{owner}.weight" in tensors}
        integers = {owner for owner in whole if tensors[f"{owner}.weight"].dtype == torch.int8}
        return tensors.owners("weight_packed") | integers

    def remarks(self, layers: frozenset[str]) -> tuple[str, ...]:
        """Quantised caches, and grids of activations that no op has."""
        asked = [layer for layer in layers if self._scheme(layer).get("input_activations")]
        left = [layer for layer in asked if _activations(self._scheme(layer)) is None]
        left += [layer for layer in layers if self._scheme(layer).get("output_activations")]
        found = [f"{words}: it is kept in float" for words in self.leftovers]
        if left:
            found.append(
                f"{len(set(left))} of {len(layers)} linears quantise activations by a grid that no op has "
                f"(the first: {min(left)}): they are kept in float"
            )
        return tuple(found)

    def read(self, tensors: Tensors, layer: str, in_features: int, out_features: int) -> StoredLinear:
        """One linear; see `Layout`."""
        scheme = self._scheme(layer)
        weights = scheme["weights"]
        bits = int(weights["num_bits"])
        if weights.get("type", "int") != "int" or not 2 <= bits <= 8:
            raise ModelError(
                f"{layer}: expected weights of 2 to 8 bits of type int, found {bits} bits of "
                f"{weights.get('type')!r}"
            )
        integers = _integers(tensors, layer, bits, in_features, out_features)
        scales = _per_output(as_array(tensors[f"{layer}.weight_scale"]), out_features)
        zero_points = _zero_points(tensors, layer, bits, scales.shape)
        groups = _groups(tensors, layer, weights, in_features, scales.shape[1])
        if zero_points is None:
            zero_points = np.zeros(scales.shape, np.int8)
        linear = grouped(integers.T, scales.T, zero_points.T, groups, bits)
        return dataclasses.replace(linear, activations=self._grid(tensors, layer, scheme, linear.block_size))

    def _grid(
        self, tensors: Tensors, layer: str, scheme: Mapping[str, Any], block_size: int
    ) -> Activations | None:
        """The grid of the input; a static one with its numbers."""
        activations = _activations(scheme)
        if activations is None or activations.granularity != "static":
            return activations
        if block_size:
            return None
        name = f"{layer}.input_zero_point"
        zero_point = int(tensors[name]) if name in tensors else 0
        return dataclasses.replace(
            activations, scale=float(tensors[f"{layer}.input_scale"]), zero_point=zero_point
        )

    def _scheme(self, layer: str) -> Mapping[str, Any]:
        """The scheme of a layer: by its name before a pattern, by a pattern before its class."""
        matches = [
            (rank, index)
            for index, scheme in enumerate(self.schemes)
            if isinstance(scheme, Mapping)
            for target in scheme.get("targets", ())
            if (rank := _rank(layer, target)) is not None
        ]
        if not matches:
            raise ModelError(
                f"{layer}: it is stored quantised, but no group of the configuration says how",
                hint="check quantization_config.config_groups in config.json",
            )
        return self.schemes[min(matches)[1]]


def _rank(layer: str, target: str) -> int | None:
    if target == layer:
        return 0
    if target.startswith("re:"):
        return 1 if re.match(target.removeprefix("re:"), layer) else None
    return 2 if target == _CLASS else None


def _activations(scheme: Mapping[str, Any]) -> Activations | None:
    """What an op can say of a scheme's activations; None for float ones and all others."""
    asked = scheme.get("input_activations")
    if not asked or asked.get("type", "int") != "int":
        return None
    bits, strategy = int(asked["num_bits"]), asked.get("strategy")
    if asked.get("dynamic") is True and strategy == "token" and asked.get("symmetric", True):
        return Activations("token", bits)
    per_tensor = strategy in (None, "tensor") and bits == 8 and not asked.get("dynamic")
    grouped_weights = (scheme["weights"].get("group_size") or -1) > 0
    return Activations("static") if per_tensor and not grouped_weights else None


def _integers(tensors: Tensors, layer: str, bits: int, in_features: int, out_features: int) -> Array:
    """[N, K] int8."""
    name = f"{layer}.weight_packed"
    if name not in tensors:
        weight = as_array(tensors[f"{layer}.weight"])
        _check_shape(f"{layer}.weight", weight.shape, (out_features, in_features))
        return weight
    words = as_array(tensors[name])
    if words.dtype != np.int32:
        raise ModelError(f"{name}: expected int32, found {words.dtype}", hint="only integers are read")
    _check_shape(
        f"{layer}.weight_shape", tuple(tensors[f"{layer}.weight_shape"].tolist()), (out_features, in_features)
    )
    return _signed(words, bits, in_features, name)


def _signed(words: Array, bits: int, count: int, name: str) -> Array:
    """Packed rows [R, W] as int8 [R, count]."""
    if words.shape[1] == -(-count * bits // 32):
        fields = unpack(words, bits, count)
    elif words.shape[1] == -(-count // (32 // bits)):
        fields = unpack_whole(words, bits, count)
    else:
        raise ModelError(f"{name}: {words.shape[1]} words do not hold {count} integers of {bits} bits")
    return (fields - np.uint8(1 << (bits - 1))).view(np.int8)


def _per_output(values: Array, out_features: int) -> Array:
    """[N, G] of what may be one number for all, or one for each output."""
    if values.size == 1:
        return np.broadcast_to(values.reshape(1, 1), (out_features, 1))
    return values.reshape(out_features, -1)


def _zero_points(tensors: Tensors, layer: str, bits: int, shape: tuple[int, ...]) -> Array | None:
    """[N, G] int8, None where there are none."""
    name = f"{layer}.weight_zero_point"
    if name not in tensors:
        return None
    stored = as_array(tensors[name])
    if stored.dtype == np.int32:
        stored = _signed(stored.T, bits, shape[0], name).T
    found = _per_output(stored.astype(np.int8), shape[0])
    _check_shape(name, found.shape, shape)
    return found


def _groups(tensors: Tensors, layer: str, weights: Mapping[str, Any], in_features: int, count: int) -> Array:
    """The group [K] of each input."""
    name = f"{layer}.weight_g_idx"
    if name in tensors:
        stored = as_array(tensors[name])
        if (stored >= 0).all():
            return stored
    size = int(weights.get("group_size") or -1)
    size = size if size > 0 and count > 1 else -(-in_features // count)
    if -(-in_features // size) != count:
        raise ModelError(
            f"{layer}.weight_scale: {count} groups of {size} do not make {in_features} inputs",
            hint="groups of inputs and outputs together (blocks) are not read",
        )
    return np.arange(in_features) // size


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(found) != tuple(expected):
        raise ModelError(f"{name}: expected {list(expected)}, found {list(found)}")
