"""AWQ checkpoints in the layout ``gemm`` of AutoAWQ.

Of a linear of K inputs and N outputs in 4 bits, with groups of K / G inputs:

- ``qweight`` [K, N / 8] int32: eight outputs to a word, unsigned, from low bits to high in the order
  0, 2, 4, 6, 1, 3, 5, 7;
- ``qzeros`` [G, N / 8] int32: zero points, packed in the same way;
- ``scales`` [G, N] float16.

    w[k, n] = (q[k, n] − z[g, n]) · s[g, n],   g = k // (K / G)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import ModelError
from .bit_fields import unpack
from .stored_linear import Array, StoredLinear, as_array, grouped
from .tensors import Tensors

_BITS = 4
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word each of eight outputs is."""


@dataclasses.dataclass(frozen=True)
class Awq:
    """The `Layout` of AWQ."""

    @classmethod
    def of_config(cls, config: Mapping[str, Any], source: str) -> Awq:
        """From the checkpoint's configuration.

        Raises:
            ModelError: another layout than ``gemm``, or other than 4 bits.
        """
        names = ("version", "checkpoint_format", "format")
        found = next((str(config[name]).lower() for name in names if config.get(name)), "gemm")
        bits = config.get("bits", config.get("w_bit", _BITS))
        if found != "gemm" or bits != _BITS:
            raise ModelError(
                f"{source}: expected AWQ in the layout gemm with 4 bits, found {found} with {bits}",
                hint="save the checkpoint again with version='gemm'",
            )
        return cls()

    def layers(self, tensors: Tensors) -> frozenset[str]:
        """Those with a ``qweight``."""
        return tensors.owners("qweight")

    def remarks(self, layers: frozenset[str]) -> tuple[str, ...]:
        """None: all is read."""
        del layers
        return ()

    def read(self, tensors: Tensors, layer: str, in_features: int, out_features: int) -> StoredLinear:
        """One linear; see `Layout`."""
        integers = _outputs(tensors, f"{layer}.qweight", out_features)
        zero_points = _outputs(tensors, f"{layer}.qzeros", out_features)
        scales = as_array(tensors[f"{layer}.scales"])
        count = len(scales)
        if len(integers) != in_features or scales.shape != zero_points.shape or in_features % count:
            raise ModelError(
                f"{layer}: expected qweight of {in_features} inputs, scales and zero points of groups that "
                f"divide them, found {len(integers)}, {list(scales.shape)} and {list(zero_points.shape)}"
            )
        groups = np.arange(in_features) // (in_features // count)
        return grouped(integers, scales, zero_points, groups, _BITS)


def _outputs(tensors: Tensors, name: str, out_features: int) -> Array:
    """Words [R, N / 8] as integers [R, N]."""
    words = as_array(tensors[name])
    if words.ndim != 2 or words.shape[1] * 8 != out_features or words.dtype != np.int32:
        raise ModelError(
            f"{name}: expected int32 [., {out_features} / 8], found {words.dtype} {list(words.shape)}"
        )
    fields = unpack(words, _BITS, out_features).reshape(len(words), -1, 8)
    return fields[:, :, _PLACES].reshape(len(words), out_features)
