"""The layers that read a group's structures: their weights as matrices, and the moments of their inputs.

A weight is looked at as W [out, in] with y = W x: a linear's, and a convolution's with the patches of its
image as x (a channel is then as many columns as the kernel has positions).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...ir.errors import PassError
from ...ir.external import release
from ...ir.structure import ChannelGroup, Member
from ...ir.views import Convolution, Linear, convolutions, linears
from ...runtime.calibration import Covariance, Tap, can_unfold, patches
from .obs import Consumer, Doubles, Integers

Array = npt.NDArray[Any]
Layer = Linear | Convolution

_MOST_PATCHES = 1 << 16
"""Of all samples together; beyond, some are drawn: neighbouring patches of an image say nearly the same."""
_BROKEN = "export the model again"


@dataclasses.dataclass(frozen=True, eq=False)
class ConsumerLayer:
    """A consumer weight of a group, and the layers that read it (several where it is shared).

    Attributes:
        member: the weight's name, and the axis and indices of the structures.
        layers: alike in kind and in how they store the weight.
        bias: name of the bias that is refitted with the weight: one that is this layer's alone, where all of
            the layer's inputs belong to the group; else None.
    """

    member: Member
    layers: tuple[Layer, ...]
    bias: str | None

    @property
    def name(self) -> str:
        """The weight's name."""
        return self.member.tensor

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the values that the layers read."""
        return tuple(str(layer.input.name) for layer in self.layers)

    @property
    def source(self) -> tuple[object, ...]:
        """Equal for consumers whose matrices are multiplied with the same rows."""
        geometry = [
            (layer.weight.shape, layer.strides, layer.dilations, layer.pads)
            for layer in self.layers
            if isinstance(layer, Convolution)
        ]
        return self.inputs, *((tuple(shape or ())[1:], *rest) for shape, *rest in geometry)

    @property
    def columns(self) -> Integers:
        """[structures, width], the columns of the matrix that each structure has."""
        indices, kernel = self.member.indices, _kernel_positions(self.layers[0])
        columns = indices[:, :, None] * kernel + np.arange(kernel)
        return columns.reshape(len(indices), -1).astype(np.int64)

    def matrix(self, weight: Array) -> Array:
        """[out, in], a view of the weight."""
        layer = self.layers[0]
        if isinstance(layer, Convolution):
            return weight.reshape(len(weight), -1)
        return weight if layer.transposed else weight.T

    def tensor(self, matrix: Array, shape: tuple[int, ...]) -> Array:
        """The inverse of `matrix`."""
        layer = self.layers[0]
        as_stored = matrix if isinstance(layer, Convolution) or layer.transposed else matrix.T
        return np.ascontiguousarray(as_stored.reshape(shape))


def find_consumers(model: ir.Model, group: ChannelGroup) -> tuple[list[ConsumerLayer], list[str]]:
    """The group's consumers, and remarks about those whose inputs cannot be observed."""
    found: list[ConsumerLayer] = []
    remarks: list[str] = []
    layers: list[Layer] = [*linears(model), *convolutions(model)]
    for member in group.consumers:
        readers = tuple(layer for layer in layers if layer.weight.name == member.tensor)
        reason = _why_not(model.graph.initializers[member.tensor], readers, member)
        if reason is None:
            found.append(ConsumerLayer(member, readers, _own_bias(readers, member)))
        else:
            remarks.append(f"{member.tensor} is not looked at: {reason}")
    return found, remarks


def _why_not(weight: ir.Value, readers: tuple[Layer, ...], member: Member) -> str | None:
    if not readers or len(readers) < len({use.node for use in weight.uses()}):
        return "it is read by something else than a linear or a convolution"
    first = readers[0]
    if any(type(layer) is not type(first) for layer in readers):
        return "it is read in different ways"
    if isinstance(first, Convolution):
        if any(layer.groups != 1 for layer in readers if isinstance(layer, Convolution)):
            return "its convolution is grouped"
        if not all(can_unfold(layer) and layer.pads for layer in readers if isinstance(layer, Convolution)):
            return "patches are taken of signals and images with known padding only"
        return None
    axes = {int(layer.transposed) for layer in readers if isinstance(layer, Linear)}
    return None if axes == {member.axis} else "it is read in different ways"


def _own_bias(readers: tuple[Layer, ...], member: Member) -> str | None:
    bias, size = readers[0].bias, (readers[0].weight.shape or ())[member.axis]
    if len(readers) > 1 or bias is None or len(bias.uses()) > 1 or not bias.is_initializer():
        return None
    return str(bias.name) if member.indices.size == size else None


def _kernel_positions(layer: Layer) -> int:
    shape = [dim for dim in layer.weight.shape or () if isinstance(dim, int)]
    return math.prod(shape[2:])


def dense_array(tensor: ir.TensorProtocol, name: str) -> Array:
    """A copy of a weight.

    Raises:
        PassError: it holds NaN or infinity; names it.
    """
    array = np.array(tensor.numpy())
    release(tensor)
    if not np.isfinite(array).all():
        where = np.argwhere(~np.isfinite(array))[0].tolist()
        raise PassError(f"prune: weight {name!r} holds {array[tuple(where)]} at index {where}", hint=_BROKEN)
    return array


class Moments:
    """E[x] and E[xxᵀ] of what a consumer's layers read, from one run over the data.

    Rows are taken relative to the mean of the first ones, so that the covariance about the mean does not
    come out of the difference of two large numbers.

    Args:
        consumer: whose inputs are observed.
        samples: how many there will be; they share the patches that may be taken in all.
        seed: of the choice of patches.
    """

    def __init__(self, consumer: ConsumerLayer, samples: int, seed: int) -> None:
        self._consumer = consumer
        self._most_rows = max(_MOST_PATCHES // max(samples, 1), 1)
        self._rng = np.random.default_rng(seed)
        self._shift: Array | None = None
        self._covariance: Covariance | None = None
        self._sum: Doubles | None = None

    def update(self, tap: Tap, value: str) -> None:
        """Add what one sample has at ``value``."""
        for layer in self._consumer.layers:
            if layer.input.name == value:
                self._add(self._rows(layer, tap, value))

    def _rows(self, layer: Layer, tap: Tap, value: str) -> Array:
        if isinstance(layer, Linear):
            return tap.rows(value)
        rows = next(patches(layer, tap.array(value)))
        if len(rows) <= self._most_rows:
            return rows
        return rows[self._rng.choice(len(rows), self._most_rows, replace=False, shuffle=False)]

    def _add(self, rows: Array) -> None:
        if not len(rows):
            return
        if self._shift is None or self._covariance is None or self._sum is None:
            self._shift = rows.mean(axis=0)
            self._covariance = Covariance(rows.shape[1])
            self._sum = np.zeros(rows.shape[1])
        shifted = rows - self._shift
        self._covariance.update(shifted)
        self._sum += shifted.sum(axis=0, dtype=np.float64)

    def finished(self) -> tuple[Doubles, Doubles]:
        """The mean [in] and the covariance about it [in, in].

        Raises:
            PassError: they are not finite, or there was no row.
        """
        names = ", ".join(self._consumer.inputs)
        if self._shift is None or self._covariance is None or self._sum is None:
            raise PassError(
                f"prune: no row of {names!r}, the input of {self._consumer.name!r}, was seen",
                hint="give calibration data whose samples are not all padding",
            )
        offset = self._sum / self._covariance.tokens
        covariance = self._covariance.mean - np.outer(offset, offset)
        if not np.isfinite(covariance).all():
            raise PassError(
                f"prune: tensor {names!r}, the input of {self._consumer.name!r}, is not finite on the "
                "calibration data, or its squares are not",
                hint="look at the data and at the model's weights, or leave the layer out with ignore=",
            )
        return self._shift + offset, covariance


@dataclasses.dataclass(frozen=True, eq=False)
class ObservedConsumer:
    """A consumer with everything that pruning asks about it, in arrays: workers are sent it.

    Attributes:
        name: of its weight.
        bias_name: of the bias that is refitted, if one is.
        columns: [structures, width], the columns of the weight that each structure has.
        stored_type: of refitted weights: their own if files have it, else float32, which holds all shorter
            ones.
        weight: [out, in] float64.
        bias: [out] float64, the bias that is refitted, or None.
        mean: [in], of its inputs.
        covariance: [in, in], of its inputs about the mean.
        energy: E‖y‖², the bias included; 1 if the output is zero.
    """

    name: str
    bias_name: str | None
    columns: Integers
    stored_type: np.dtype[Any]
    weight: Doubles
    bias: Doubles | None
    mean: Doubles
    covariance: Doubles
    energy: float

    def refitted(self) -> Consumer:
        """For refits: with a bias to refit, its mean output need not be kept by the weight."""
        if self.bias is not None:
            return Consumer(self.weight, self.covariance, self.columns, self.energy)
        return self.as_is()

    def as_is(self) -> Consumer:
        """For removals that leave everything else as it is."""
        second_moment = self.covariance + np.outer(self.mean, self.mean)
        return Consumer(self.weight, second_moment, self.columns, self.energy)


def observed(model: ir.Model, layer: ConsumerLayer, moments: tuple[Doubles, Doubles]) -> ObservedConsumer:
    """The consumer's dense weights with the mean and covariance of its inputs."""
    mean, covariance = moments
    weight = layer.matrix(_constant(model, layer.name)).astype(np.float64)
    shared_bias = layer.layers[0].bias
    bias = None if shared_bias is None else _bias(shared_bias)
    mean_output = weight @ mean + (0.0 if bias is None else bias)
    energy = float(np.vdot(weight @ covariance, weight) + np.vdot(mean_output, mean_output))
    return ObservedConsumer(
        layer.name,
        layer.bias,
        layer.columns,
        _stored_type(layer),
        weight,
        bias if layer.bias is not None else None,
        mean,
        covariance,
        energy or 1.0,
    )


def _stored_type(layer: ConsumerLayer) -> np.dtype[Any]:
    dtype = layer.layers[0].weight.dtype
    in_files = dtype in (ir.DataType.FLOAT16, ir.DataType.DOUBLE)
    return np.dtype(dtype.numpy() if dtype is not None and in_files else np.float32)


def _constant(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return dense_array(tensor, name)


def _bias(value: ir.Value) -> Doubles:
    tensor = ir.convenience.get_const_tensor(value)
    assert tensor is not None
    return dense_array(tensor, str(value.name)).astype(np.float64)
