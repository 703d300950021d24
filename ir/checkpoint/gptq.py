"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them.

Of a linear of K inputs and N outputs in b = 2, 3, 4 or 8 bits, with G groups:

- ``qweight`` [K · b / 32, N] int32: the integers of a column, unsigned, from low bits to high and on into the
  next word (ten and two thirds of 3 bits to a word);
- ``qzeros`` [G, N · b / 32] int32: the zero points of a group, packed in the same way along the outputs. In
  the format ``gptq`` 1 is subtracted from each before, in ``gptq_v2`` it is not;
- ``scales`` [G, N] float16;
- ``g_idx`` [K] int32: the group of each input, which does not ascend where *act order* was used.

    w[k, n] = (q[k, n] − z[g_idx[k], n]) · s[g_idx[k], n]

Widths and group sizes may differ between layers (GPTQModel's ``dynamic``), so they are taken from the
tensors' shapes. The subtraction of 1 is undone on words: GPTQModel makes it there, where a zero point of 0
borrows from its neighbour; other writers never subtract from 0. Three bits straddle words, and there it is
made and undone on each zero point.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import ModelError
from .bit_fields import add_one_to_each, unpack
from .stored_linear import Array, StoredLinear, as_array, grouped
from .tensors import Tensors

_FORMATS = ("gptq", "gptq_v2")
_WIDTHS = (2, 3, 4, 8)


@dataclasses.dataclass(frozen=True)
class Gptq:
    """The `Layout` of GPTQ.

    Attributes:
        group_size: of layers without ``g_idx``; -1 for one group.
        minus_one: 1 was subtracted from the zero points.
    """

    group_size: int
    minus_one: bool

    @classmethod
    def of_config(cls, config: Mapping[str, Any], source: str) -> Gptq:
        """From the checkpoint's configuration.

        Raises:
            ModelError: another format than the two.
        """
        found = config.get("checkpoint_format") or config.get("format") or "gptq"
        if found not in _FORMATS:
            raise ModelError(
                f"{source}: expected the GPTQ format {' or '.join(_FORMATS)}, found {found!r}",
                hint="save the checkpoint again as gptq with the tool that made it",
            )
        return cls(group_size=int(config.get("group_size", -1)), minus_one=found == "gptq")

    def layers(self, tensors: Tensors) -> frozenset[str]:
        """Those with a ``qweight``."""
        return tensors.owners("qweight")

    def remarks(self, layers: frozenset[str]) -> tuple[str, ...]:
        """None: all is read."""
        del layers
        return ()

    def read(self, tensors: Tensors, layer: str, in_features: int, out_features: int) -> StoredLinear:
        """One linear; see `Layout`."""
        words = as_array(tensors[f"{layer}.qweight"])
        bits = _bits(words, layer, in_features, out_features)
        scales = as_array(tensors[f"{layer}.scales"])
        if scales.ndim != 2 or scales.shape[1] != out_features:
            raise ModelError(f"{layer}.scales: expected [groups, {out_features}], found {list(scales.shape)}")
        integers = unpack(words.T, bits, in_features).T
        zero_points = self._zero_points(as_array(tensors[f"{layer}.qzeros"]), bits, out_features)
        if zero_points.shape != scales.shape:
            raise ModelError(
                f"{layer}.qzeros: expected zero points of {list(scales.shape)}, "
                f"found {list(zero_points.shape)}"
            )
        groups = self._groups(tensors, layer, in_features, len(scales))
        return grouped(integers, scales, zero_points, groups, bits)

    def _zero_points(self, words: Array, bits: int, out_features: int) -> Array:
        if self.minus_one and 8 % bits == 0:
            return unpack(add_one_to_each(words, bits), bits, out_features)
        fields = unpack(words, bits, out_features)
        return (fields + np.uint8(1)) & np.uint8((1 << bits) - 1) if self.minus_one else fields

    def _groups(self, tensors: Tensors, layer: str, in_features: int, count: int) -> Array:
        name = f"{layer}.g_idx"
        size = in_features if self.group_size == -1 else self.group_size
        groups = as_array(tensors[name]) if name in tensors else np.arange(in_features) // size
        if groups.shape != (in_features,) or groups.min() < 0 or groups.max() >= count:
            raise ModelError(
                f"{name}: expected a group from 0 to {count - 1} for each of {in_features} inputs, "
                f"found {list(groups.shape)} from {groups.min()} to {groups.max()}"
            )
        return groups


def _bits(words: Array, layer: str, in_features: int, out_features: int) -> int:
    """The width of the integers, by the number of words that a column takes."""
    width = 8 * words.dtype.itemsize
    for bits in _WIDTHS:
        if words.shape == (-(-in_features * bits // width), out_features):
            return bits
    raise ModelError(
        f"{layer}.qweight: expected [{in_features} · bits / {width}, {out_features}] with bits in {_WIDTHS}, "
        f"found {list(words.shape)}"
    )
