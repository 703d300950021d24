"""Move a scale per channel from the input of linears into their weights.

    x = source(…; c),  y = x W          →          x / s = source(…; c / s),  y = (x / s) (diag(s) W)

c are the source's constants (a norm's scale and bias, a linear's columns and bias). Exact: every product of
x / s with diag(s) W has the same terms, and rounding the scaled constants to their type changes each by half
of the last bit at most. A constant that the type cannot hold that well, because scaling takes it out of the
type's normal range, is a reason not to scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...ir import release
from ...ir.errors import PassError
from ...ir.spill import kept
from .pairs import Channels, ScalingGroup

Doubles = npt.NDArray[np.float64]

_EPSILON = {
    ir.DataType.DOUBLE: 2.0**-52,
    ir.DataType.FLOAT: 2.0**-23,
    ir.DataType.FLOAT16: 2.0**-10,
    ir.DataType.BFLOAT16: 2.0**-7,
}
"""Twice what rounding in the type's normal range costs, relative."""


def read_weight(value: ir.Value) -> Doubles:
    """A float64 copy of a constant; what the tensor itself had loaded is released.

    Raises:
        PassError: it holds NaN or an infinity.
    """
    tensor = value.const_value
    if tensor is None:
        raise PassError(f"scale: weight {value.name!r} is not constant")
    weight = np.array(tensor.numpy(), dtype=np.float64)
    release(tensor)
    if not np.isfinite(weight).all():
        raise PassError(f"scale: weight {value.name!r} holds NaN or infinity", hint="export the model again")
    return weight


def fold(group: ScalingGroup, scale: Doubles) -> str | None:
    """Divide the input of a group by ``scale`` [channels], all above 0, and multiply its weights by it.

    Returns:
        None if it was done; else why it was not, and nothing was changed.
    """
    factors = [(Channels(linear.weight, 1 if linear.transposed else 0), scale) for linear in group.linears]
    factors += [(channels, 1 / scale) for channels in group.source.constants]
    tensors: list[tuple[ir.Value, ir.Tensor[Any]]] = []
    for channels, factor in factors:
        tensor = _scaled(channels, factor)
        if tensor is None:
            return f"{channels.value.dtype} cannot hold the scaled {channels.value.name}"
        tensors.append((channels.value, tensor))
    for value, tensor in tensors:
        value.const_value = tensor
    return None


def _scaled(channels: Channels, factor: Doubles) -> ir.Tensor[Any] | None:
    """The constant with its channels multiplied by ``factor``; None if a channel loses precision."""
    value = channels.value
    weight = read_weight(value)
    assert value.dtype is not None
    of_channel = np.moveaxis(weight, channels.axis, 0)[channels.start : channels.start + factor.size]
    of_channel *= factor.reshape(-1, *[1] * (weight.ndim - 1))
    dtype = value.dtype.numpy()
    with np.errstate(over="ignore"):
        rounded = weight.astype(dtype)
    lost = np.moveaxis(rounded.astype(np.float64) - weight, channels.axis, 0)
    lost = lost[channels.start : channels.start + factor.size]
    if not (_norms(lost) <= _EPSILON[value.dtype] * _norms(of_channel)).all():
        return None
    return ir.Tensor(kept(rounded), dtype=value.dtype, name=value.name)


def _norms(channels: npt.NDArray[Any]) -> Doubles:
    """The Euclidean norm of every channel, [channels]."""
    flat = channels.reshape(len(channels), -1)
    norms: Doubles = np.sqrt(np.einsum("cn,cn->c", flat, flat))
    return norms
