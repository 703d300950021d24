"""Removing structures physically: every tensor, shape and attribute that they touch becomes smaller.

What goes is marked on the axes of the members and spread by the same relations that found the groups, so all
groups are removed at once, a tensor that several of them cut is cut once, and a model may be shrunk again and
again. Axes that are pinned are no concern here: in a piece cut out of a model, they are its ends.

Removing channels whose consumers' weights are zero changes nothing. In the residual stream under
RMSNormalization the channels themselves must be zero: with d channels before and d' after,

    γ·x / sqrt(Σx²/d + ε) = γ·sqrt(d/d') · x / sqrt(Σx²/d' + ε·d/d')

so the scale and ε are corrected by these factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..errors import InputError
from ..external import release
from ..views.values import integer, number
from .corrections import correct
from .dimensions import relate
from .groups import Choice, Indices, new_weights
from .kept import Kept

_AGAIN = "discover the structure of this model, and choose again"


def shrink(model: ir.Model, choices: Sequence[Choice]) -> None:
    """Keep only the chosen structures, in place.

    Members whose tensor is not in the graph are passed over, so that the same choices serve a piece of the
    model. Values of tensors that have new weights are replaced also where nothing of the tensor goes.

    Args:
        model: the model, or a clone or a piece of it.
        choices: at most one per group.

    Raises:
        InputError: a choice keeps nothing or structures that there are not, or does not fit the model.
    """
    for choice in choices:
        _check(choice, model.graph)
    kept = _kept(model, choices)
    weights = new_weights(choices)
    factors = _correct_rms_norms(model.graph, kept)
    for node in list(model.graph):
        correct(node, kept)
    for name in [*model.graph.initializers]:
        value = model.graph.initializers[name]
        if name in weights or name in factors or kept.axes(value):
            _cut(value, kept.axes(value), weights.get(name), factors.get(name, 1.0))
    for value in kept.values():
        _cut_shape(value, kept.axes(value))
    remove_unused_initializers(model.graph)


def _check(choice: Choice, graph: ir.Graph) -> None:
    group, keep = choice.group, choice.keep
    if not len(keep) or np.any(np.diff(keep) <= 0) or keep[0] < 0 or keep[-1] >= group.structures:
        raise InputError(
            f"shrink: group '{group.name}' is to keep {keep.tolist()[:8]}",
            hint=f"give ascending numbers of structures from 0 to {group.structures - 1}, at least one",
        )
    for member in group.members:
        value = graph.initializers.get(member.tensor)
        if value is None:
            continue
        size = None if value.shape is None else value.shape[member.axis]
        if not isinstance(size, int) or member.indices.max() >= size:
            raise InputError(
                f"shrink: group '{group.name}' needs index {member.indices.max()} of axis {member.axis} of "
                f"'{member.tensor}', which has {size}",
                hint=_AGAIN,
            )
    for name, array in choice.weights.items():
        value = graph.initializers.get(name)
        if value is not None and value.shape != array.shape:
            raise InputError(
                f"shrink: new weight '{name}' of group '{group.name}' has shape {list(array.shape)}, "
                f"the model's has {list(value.shape or ())}",
                hint="give new weights in the full shape of the dense ones",
            )


def _kept(model: ir.Model, choices: Sequence[Choice]) -> Kept:
    """Which indices stay, along every axis that loses some."""
    dimensions = relate(model)
    goes = np.zeros(dimensions.labels.max(initial=-1) + 1, np.bool_)
    for choice in choices:
        gone = np.delete(np.arange(choice.group.structures), choice.keep)
        for member in choice.group.members:
            if (member.tensor, member.axis) in dimensions.starts:
                goes[dimensions.labels_of((member.tensor, member.axis))[member.indices[gone]]] = True
    for choice in choices:
        for member in choice.group.members:
            if (member.tensor, member.axis) not in dimensions.starts:
                continue
            stays = dimensions.labels_of((member.tensor, member.axis))[member.indices[choice.keep]]
            if goes[stays].any():
                raise InputError(
                    f"shrink: structures of group '{choice.group.name}' do not go one by one in this model",
                    hint=_AGAIN,
                )
    axes: dict[str, dict[int, Indices]] = {}
    for name, axis in dimensions.starts:
        along = goes[dimensions.labels_of((name, axis))]
        if along.any():
            axes.setdefault(name, {})[axis] = np.flatnonzero(~along)
    return Kept(model.graph, axes)


def _correct_rms_norms(graph: ir.Graph, kept: Kept) -> dict[str, float]:
    """Correct ε of norms whose width shrinks; the factors for their scales, by name."""
    factors: dict[str, float] = {}
    for node in graph:
        if node.op_type != "RMSNormalization" or node.domain != "":
            continue
        source, scale = node.inputs[0], node.inputs[1]
        assert source is not None
        assert source.shape is not None
        assert scale is not None
        axis = integer(node, "axis")
        axis = len(source.shape) - 1 if axis is None else axis % len(source.shape)
        left, before = kept.size(source, axis), source.shape[axis]
        if left is None or not isinstance(before, int):
            continue
        epsilon = number(node, "epsilon", 1e-5)
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon * before / left)
        factors[scale.name or ""] = math.sqrt(before / left)
    return factors


def _cut(
    value: ir.Value, axes: Mapping[int, Indices], new: npt.NDArray[np.generic] | None, factor: float
) -> None:
    """Take what stays of an initializer's old or new data."""
    tensor = value.const_value
    assert tensor is not None
    data = np.asarray(tensor.numpy() if new is None else new)
    for axis, indices in axes.items():
        data = np.take(data, indices, axis=axis)
    if new is not None and not np.isfinite(data).all():
        raise InputError(f"shrink: new weight '{value.name}' holds NaN or infinity")
    if factor != 1.0:
        data = data.astype(np.float64) * factor
    data = np.ascontiguousarray(data, tensor.dtype.numpy())
    value.const_value = ir.Tensor(data, dtype=tensor.dtype, name=value.name)
    value.shape = ir.Shape(data.shape)
    release(tensor)


def _cut_shape(value: ir.Value, axes: Mapping[int, Indices]) -> None:
    if value.is_initializer():
        return
    assert value.shape is not None
    value.shape = ir.Shape([len(axes[i]) if i in axes else dim for i, dim in enumerate(value.shape)])


def remove_unused_initializers(graph: ir.Graph) -> None:
    """Remove the initializers that nothing reads."""
    for name, value in [*graph.initializers.items()]:
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del graph.initializers[name]
