"""A model in outline: its blocks along the residual stream and the layers in each, as small plain data.

A compiled file carries the outlines of the model before and after the passes, because a graph that is bound
to kernels no longer shows them.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx_ir as ir

from .errors import ModelError
from .external import release
from .ops import DOMAIN, integer_values, operand, zeros_of
from .views import blocks
from .views.convolutions import as_convolution
from .views.linears import as_linear, stored_weight_owner
from .views.values import input_at, integer, is_constant, static_shape

LayerKind: TypeAlias = Literal["linear", "convolution", "embedding"]
BlockKind: TypeAlias = Literal["attention", "feed-forward", "convolution", "embedding", "other"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerOutline:
    """One layer with a weight.

    Attributes:
        name: the module's path.
        node: name of the node that computes it.
        kind: what it is.
        shape: of the weight: [in, out] of a linear, [rows, columns] of an embedding table.
        form: how the weight is stored, such as ``float32`` or ``int4, groups of 128``.
        bits: of one element of the weight, scales apart.
        activation_bits: of what it multiplies; None where that stays as it is.
        stored_bytes: of the weight, scales and the like included.
        zeros: the share of the weights that are zero; None where that was not counted.
    """

    name: str
    node: str
    kind: LayerKind
    shape: tuple[int, ...]
    form: str
    bits: int
    activation_bits: int | None
    stored_bytes: int
    zeros: float | None

    @property
    def weights(self) -> int:
        """How many there are."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockOutline:
    """A stretch of the graph up to a residual Add, or what comes before the first or after the last.

    Attributes:
        name: the path that the names of its layers begin with; empty where they have none in common.
        kind: what it does, by its ops.
        ops: how many nodes of each op it has.
        layers: in the graph's order.
    """

    name: str
    kind: BlockKind
    ops: Mapping[str, int]
    layers: tuple[LayerOutline, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOutline:
    """A model: its blocks in the graph's order, and the size of all weights."""

    blocks: tuple[BlockOutline, ...]
    weight_bytes: int

    @property
    def layers(self) -> tuple[LayerOutline, ...]:
        """Of all blocks."""
        return tuple(layer for block in self.blocks for layer in block.layers)

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelOutline:
        """What `as_dict` gave, or JSON made of it.

        Raises:
            ModelError: it is something else.
        """
        try:
            return cls(
                blocks=tuple(
                    BlockOutline(
                        **{
                            **block,
                            "layers": tuple(
                                LayerOutline(**{**layer, "shape": tuple(layer["shape"])})
                                for layer in block["layers"]
                            ),
                        }
                    )
                    for block in data["blocks"]
                ),
                weight_bytes=data["weight_bytes"],
            )
        except (KeyError, TypeError) as error:
            raise ModelError(f"this is no outline of a model: {error}") from error


def outline(model: ir.Model, *, count_zeros: bool = False) -> ModelOutline:
    """Outline the main graph of a model, which is not changed.

    Args:
        model: best in canonical form, in which layers carry the names of their modules.
        count_zeros: read all weights, one at a time, and count those that are zero.
    """
    return ModelOutline(
        blocks=tuple(_block(nodes, count_zeros) for nodes in _stretches(model)),
        weight_bytes=sum(
            value.const_value.nbytes
            for graph in model.graphs()
            for value in graph.initializers.values()
            if value.const_value is not None
        ),
    )


def _stretches(model: ir.Model) -> list[list[ir.Node]]:
    """The nodes of the graph, cut behind every residual Add and where the first block begins.

    What would hold no layer belongs to the stretch behind it, or to the last one.
    """
    residual = blocks(model)
    ends = {block.add for block in residual}
    if residual and (start := residual[0].input.producer()) is not None:
        ends.add(start)
    stretches: list[list[ir.Node]] = [[]]
    has_layer = False
    for node in model.graph:
        stretches[-1].append(node)
        has_layer = has_layer or _as_layer(node) is not None
        if node in ends and has_layer:
            stretches.append([])
            has_layer = False
    if not has_layer and len(stretches) > 1:
        rest = stretches.pop()
        stretches[-1] += rest
    return stretches


def _block(nodes: Sequence[ir.Node], count_zeros: bool) -> BlockOutline:
    ops = collections.Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in nodes
    )
    layers = tuple(_layer(found, count_zeros) for node in nodes if (found := _as_layer(node)) is not None)
    return BlockOutline(
        name=_common_path([layer.name for layer in layers]),
        kind=_block_kind(ops, layers),
        ops=dict(ops.most_common()),
        layers=layers,
    )


def _block_kind(ops: Mapping[str, int], layers: Sequence[LayerOutline]) -> BlockKind:
    if any("Attention" in op for op in ops):
        return "attention"
    kinds = collections.Counter(layer.kind for layer in layers)
    if kinds["convolution"]:
        return "convolution"
    if kinds["linear"] > 1:
        return "feed-forward"
    return "embedding" if kinds["embedding"] else "other"


def _common_path(names: Sequence[str]) -> str:
    """The parts that all names begin with: ``model.layers.0.mlp``."""
    paths = [name.split(".") for name in names]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A node that multiplies a constant weight, or takes rows of it."""

    node: ir.Node
    kind: LayerKind
    name: str
    tensor: ir.TensorProtocol
    shape: tuple[int, ...]


def _as_layer(node: ir.Node) -> _Layer | None:
    kind: LayerKind
    if (linear := as_linear(node)) is not None:
        kind, name, weight = "linear", linear.name, linear.weight
    elif (convolution := as_convolution(node)) is not None:
        kind, name, weight = "convolution", convolution.name, convolution.weight
    elif (table := _table(node)) is not None:
        kind, name, weight = "embedding", stored_weight_owner(table), table
    else:
        return None
    shape = static_shape(weight)
    if weight.const_value is None or shape is None:
        return None
    if linear is not None and linear.transposed:
        shape = shape[::-1]
    return _Layer(node, kind, name, weight.const_value, shape)


def _table(node: ir.Node) -> ir.Value | None:
    """The constant table of floats that a node takes rows of, quantised or not."""
    if node.domain == DOMAIN:
        return operand(node, "table")
    if node.op_type != "Gather" or node.domain != "" or integer(node, "axis"):
        return None
    table = input_at(node, 0)
    if table is None or not is_constant(table) or table.dtype is None or not table.dtype.is_floating_point():
        return None
    shape = static_shape(table)
    return table if shape is not None and len(shape) == 2 else None


def _layer(found: _Layer, count_zeros: bool) -> LayerOutline:
    node, tensor = found.node, found.tensor
    bits = integer(node, "bits") or tensor.dtype.bitwidth
    return LayerOutline(
        name=found.name,
        node=node.name or "",
        kind=found.kind,
        shape=found.shape,
        form=_form(node, tensor.dtype, bits),
        bits=bits,
        activation_bits=_activation_bits(node),
        stored_bytes=_stored_bytes(node) if node.domain == DOMAIN else tensor.nbytes,
        zeros=_share_of_zeros(node, tensor) if count_zeros else None,
    )


def _stored_bytes(node: ir.Node) -> int:
    """Of a quantised weight with its scales and whatever else its integers need; not of the bias."""
    bias = operand(node, "bias")
    tensors = [value.const_value for value in node.inputs if value is not None and value is not bias]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _form(node: ir.Node, dtype: ir.DataType, bits: int) -> str:
    if "codebook" in node.overload:
        text = f"{bits}-bit code book"
    elif node.domain == DOMAIN and not dtype.is_floating_point():
        text = f"{'int' if dtype.is_signed() else 'uint'}{bits}"
    else:
        text = "float32" if dtype == ir.DataType.FLOAT else dtype.name.lower()
    block = integer(node, "block_size") if node.domain == DOMAIN else None
    return f"{text}, groups of {block}" if block else text


def _activation_bits(node: ir.Node) -> int | None:
    if node.domain != DOMAIN or node.op_type not in ("DynamicQuantizedLinear", "StaticQuantizedLinear"):
        return None
    return integer(node, "activation_bits") or 8


def _share_of_zeros(node: ir.Node, tensor: ir.TensorProtocol) -> float | None:
    """The share of the weights that are zero; None where the integers do not say so by themselves."""
    if "codebook" in node.overload or "bilevel" in node.overload or not tensor.size:
        return None
    zero_point = operand(node, "zero_point")
    if zero_point is None or zero_point.const_value is None:
        zeros = zeros_of(tensor)
    elif len(tensor.shape) == 2:
        middles = integer_values(zero_point.const_value)
        groups = middles.shape[0] if middles.ndim == 2 else 1
        integers = integer_values(tensor)
        grouped = integers.reshape(groups, -1, integers.shape[1])
        zeros = int(np.count_nonzero(grouped == middles.reshape(groups, 1, -1)))
    else:
        return None
    release(tensor)
    return zeros / tensor.size
