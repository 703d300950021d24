"""Constants as rows of vectors: read, changed and written back in float64, a part at a time.

A weight that acts on the channels of an activation is a stack of vectors along one of its axes: the rows of
an embedding table, the columns of a linear that reads them, the rows of a linear that writes them. Folding,
centring and rotating are each one function of such vectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...ir import release
from ...ir.errors import PassError
from ...ir.spill import kept

Vectors = npt.NDArray[np.float64]
VectorFunction = Callable[[Vectors], Vectors]
"""Takes vectors [count, size] and returns as many of the same size."""

_CHUNK = 1 << 22
"""Elements that are in float64 at a time."""


@dataclasses.dataclass(frozen=True)
class Vector:
    """Where a node holds vectors: operand ``index`` of ``node``, along ``axis`` of it (0 or -1)."""

    node: ir.Node
    index: int
    axis: int

    @property
    def value(self) -> ir.Value:
        """The constant as it is now."""
        value = self.node.inputs[self.index]
        if value is None:
            raise PassError(f"node {self.node.name!r} has no input {self.index}")
        return value

    @property
    def name(self) -> str:
        """What to call it in remarks: the constant's name."""
        return str(self.value.name)


def reason_not_to_change(vectors: Collection[Vector]) -> str | None:
    """Why the constants cannot all be changed in place; None if they can.

    A constant may have several readers if all of them are among ``vectors``, and so want the same change.
    """
    reasons = (_reason_not_to_change(vector, vectors) for vector in vectors)
    return next((reason for reason in reasons if reason is not None), None)


def _reason_not_to_change(vector: Vector, alike: Collection[Vector]) -> str | None:
    value = vector.value
    tensor = value.const_value
    if not value.is_initializer() or value.is_graph_input() or tensor is None:
        return f"{vector.name} is not constant"
    if value.is_graph_output():
        return f"the graph returns {vector.name}"
    if not tensor.dtype.is_floating_point() or tensor.dtype.bitwidth < 16:
        return f"{vector.name} is {tensor.dtype.name}"
    if any(Vector(use.node, use.idx, vector.axis) not in alike for use in value.uses()):
        return f"{vector.name} is shared with another part of the model"
    return None


def read_array(value: ir.Value) -> npt.NDArray[np.float64]:
    """A float64 copy of a small constant.

    Raises:
        PassError: it is not constant, or holds NaN or an infinity.
    """
    tensor = value.const_value
    if tensor is None:
        raise PassError(f"{value.name!r} is not constant")
    array = np.array(tensor.numpy(), dtype=np.float64)
    release(tensor)
    _check_finite(array, tensor)
    return array


def projections(vector: Vector, direction: Vectors) -> Vectors:
    """The scalar product of every vector with ``direction`` [size]: [count] float64."""
    tensor = vector.value.const_value
    if tensor is None:
        raise PassError(f"{vector.name!r} is not constant")
    vectors = _as_vectors(tensor.numpy(), vector.axis)
    result = np.empty(len(vectors))
    for part in _parts(*vectors.shape):
        result[part] = vectors[part].astype(np.float64) @ direction
    release(tensor)
    return result


def changed(tensor: ir.TensorProtocol, axis: int, function: VectorFunction) -> ir.TensorProtocol:
    """The tensor with ``function`` applied to its vectors in float64, rounded to its own dtype.

    Raises:
        PassError: it holds NaN or an infinity, or would.
    """
    source = tensor.numpy()
    result = np.empty(source.shape, source.dtype)
    before, after = (_as_vectors(array, axis) for array in (source, result))
    for part in _parts(*before.shape):
        wide = before[part].astype(np.float64)
        _check_finite(wide, tensor)
        with np.errstate(over="ignore"):
            after[part] = function(wide).astype(source.dtype)
        _check_finite(after[part].astype(np.float64), tensor)
    release(tensor)
    return ir.Tensor(kept(result), dtype=tensor.dtype, name=tensor.name)


def change(vectors: Iterable[Vector], function: VectorFunction) -> None:
    """Apply ``function`` to the vectors of constants, each once, in place."""
    for vector in {(vector.value, vector.axis): vector for vector in vectors}.values():
        tensor = vector.value.const_value
        assert tensor is not None
        vector.value.const_value = changed(tensor, vector.axis, function)


def _as_vectors(array: npt.NDArray[np.generic], axis: int) -> npt.NDArray[np.generic]:
    """A view [count, size]."""
    if axis in (-1, array.ndim - 1):
        return array.reshape(-1, array.shape[-1])
    return array.reshape(array.shape[0], -1).T


def _parts(count: int, size: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, size))
    for start in range(0, count, step):
        yield slice(start, start + step)


def _check_finite(array: npt.NDArray[np.float64], tensor: ir.TensorProtocol) -> None:
    if not np.isfinite(array).all():
        raise PassError(
            f"weight {tensor.name!r} holds NaN or infinity, or overflows {tensor.dtype.name}",
            hint="export the model again, in a wider float type if the checkpoint is sound",
        )
