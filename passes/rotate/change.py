"""One rotation that can be made or left: which constants turn, which transforms are put into the graph."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator

import numpy as np
import onnx_ir as ir

from ...ir import ops
from ...ir.printer import SCOPES_KEY
from .hadamard import KroneckerHadamard
from .vectors import Vector, VectorFunction, changed, reason_not_to_change


@dataclasses.dataclass(frozen=True)
class Edit:
    """The same function for the vectors of some constants.

    Attributes:
        vectors: the constants.
        function: x ↦ x · Q for vectors x. What linears read changes in the same way as their weights' vectors
            along the input: x · W = (x Q) · (Qᵀ W).
        reads: the vectors are the weights of linears along their inputs.
    """

    vectors: tuple[Vector, ...]
    function: VectorFunction
    reads: bool


@dataclasses.dataclass(frozen=True)
class Online:
    """A HadamardTransform to put before operand ``index`` of ``node``; ``trailing`` as for the op."""

    node: ir.Node
    index: int
    transform: KroneckerHadamard
    trailing: int = 1

    @property
    def input(self) -> ir.Value:
        """What is transformed, as it is now."""
        value = self.node.inputs[self.index]
        assert value is not None
        return value


@dataclasses.dataclass(frozen=True)
class Change:
    """One rotation.

    Attributes:
        rotation: R1, R2, R3 or R4.
        name: the layer or stream that it is for.
        edits: of constants.
        online: transforms that run with the model.
        beside: the linears whose time theirs is compared with.
        cache: the graph's output that returns these keys or values, rotated from now on.
        remarks: what to say about it if it is made.
    """

    rotation: str
    name: str
    edits: tuple[Edit, ...] = ()
    online: tuple[Online, ...] = ()
    beside: tuple[ir.Node, ...] = ()
    cache: ir.Value | None = None
    remarks: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """``R4 model.layers.0.mlp.down_proj``."""
        return f"{self.rotation} {self.name}"

    def reason_not_to_make(self) -> str | None:
        """Why the constants cannot be changed; None if they can."""
        return next(filter(None, (reason_not_to_change(set(edit.vectors)) for edit in self.edits)), None)

    def tensors(self) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
        """Every constant with what it becomes, one at a time; nothing is written."""
        steps: dict[ir.Value, dict[tuple[int, int], tuple[int, VectorFunction]]] = {}
        for position, edit in enumerate(self.edits):
            for vector in edit.vectors:
                # A constant that several nodes share turns once.
                steps.setdefault(vector.value, {})[position, vector.axis] = (vector.axis, edit.function)
        for value, functions in steps.items():
            tensor = value.const_value
            assert tensor is not None
            for axis, function in functions.values():
                tensor = changed(tensor, axis, function)
            yield value, tensor

    def make(
        self, model: ir.Model, tensors: Iterable[tuple[ir.Value, ir.TensorProtocol]] | None = None
    ) -> None:
        """Change the constants and the graph, in place; ``tensors`` stands for `tensors` if it is watched."""
        for value, tensor in self.tensors() if tensors is None else tensors:
            value.const_value = tensor
        for online in self.online:
            _insert(model, online)


def _insert(model: ir.Model, online: Online) -> None:
    node, x = online.node, online.input
    assert x.dtype is not None
    transformed, definition = ops.hadamard_transform(
        x, _factors(model, online.transform, x.dtype), trailing=online.trailing, name=f"{x.name}.hadamard"
    )
    transformed.outputs[0].name = f"{x.name}.rotated"
    if SCOPES_KEY in node.metadata_props:
        transformed.metadata_props[SCOPES_KEY] = node.metadata_props[SCOPES_KEY]
    ops.define(model, definition)
    model.graph.insert_before(node, transformed)
    node.replace_input_with(online.index, transformed.outputs[0])


def _factors(model: ir.Model, transform: KroneckerHadamard, dtype: ir.DataType) -> list[ir.Value]:
    """The transform's factors as constants of the graph; transforms of the same order share them."""
    orders = "x".join(str(len(factor)) for factor in transform.factors)
    name = f"planish.hadamard.{orders}.{dtype.name.lower()}"
    values = ops.factor_values(transform.factors, name, dtype)
    existing = model.graph.initializers
    for value in values:
        if value.name not in existing:
            model.graph.register_initializer(value)
    return [existing[str(value.name)] for value in values]


def gain(transform: KroneckerHadamard, dtype: ir.DataType) -> float:
    """How much longer vectors become by the transform when 1/√n is rounded to a narrow ``dtype``."""
    entries = (1 / math.sqrt(len(factor)) for factor in transform.factors)
    stored = (float(np.asarray(entry, dtype.numpy())) / entry for entry in entries)
    return math.prod(stored)
