"""Puts our kernels in the place of planish ops, norms and gates, and says why it leaves the others alone.

A quantised linear with activations per token becomes two nodes: one quantises activations, the other
multiplies integers. Linears that read the same activations share the first; where those come from a norm, a
gate or a Hadamard transform that only they read, it is one kernel with it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ...ir import ops
from ...ir.graph_builder import GraphBuilder
from ...ir.views.values import input_at, integer, number, static_dim
from ..cached_attention import CachedAttentionBinder, reason_not_to_bind
from ..hadamard_op import hadamard_op, parts_of
from ..linear_op import LinearOp, constant_of, is_encoded, linear_op
from ..target import Binding
from ..torch_fx.tensors import from_array
from . import rows, sparse_w4a16, w4a16, w8a8
from .lowering import DOMAIN
from .rows import Quantization

_MIDDLE = 8
"""What is added to signed integers of 4 bits."""
_NARROW = 4
"""Bits of the weights that are stored two to a byte."""
_KINDS = {"RMSNormalization": "rms", "LayerNormalization": "layer"}
_KERNELS = {"Normalize": "normalize", "SwiGLU": "swiglu", "Hadamard": "hadamard"}
_DEFAULT_EPSILON = 1e-5
_HADAMARD_2 = np.array([[1.0, 1.0], [1.0, -1.0]])
_ROUNDING = 1e-3
"""Entries of a Hadamard matrix that was stored in 16 bits are this close to each other."""


@dataclasses.dataclass(frozen=True)
class Fused:
    """What computes the activations that are to be quantised, in one kernel with it.

    Attributes:
        op_type: of the domain, without ``Quantize``.
        inputs: of the node.
        attributes: of the node, without those of the quantisation.
    """

    op_type: Literal["Normalize", "SwiGLU", "Hadamard"]
    inputs: tuple[ir.Value | None, ...]
    attributes: dict[str, Any]


class Binder:
    """Decides for one graph, and rewrites it.

    Args:
        model: changed in place by `rewrite` alone.
        dtype: of activations; None: as the graph has it.
        only_references: no GPU runs it, so element types that the kernels have not are taken, too.
    """

    def __init__(self, model: ir.Model, dtype: torch.dtype | None, *, only_references: bool) -> None:
        self._model, self._dtype, self._only_references = model, dtype, only_references
        self._quantized: dict[tuple[ir.Value, Quantization], tuple[ir.Value, ir.Value]] = {}
        self._layers: set[str] = set()

    def bindings(self) -> Iterator[Binding]:
        """A row for each op that has a choice."""
        for node in self._model.graph:
            if _is_linear(node):
                op = linear_op(node) if not is_encoded(node) else None
                reason = self._reason_against_linear(op)
                kernel = "body" if op is None or reason else _kernel_of(op)
            elif (fused := _fused(node)) is not None:
                reason = fused if isinstance(fused, str) else ""
                kernel = "body" if isinstance(fused, str) else _KERNELS[fused.op_type]
            elif node.domain == ops.DOMAIN and node.op_type != "CachedAttention":
                kernel, reason = "body", "there is no kernel of it"
            else:
                continue
            name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            yield Binding(node.name or "", name, kernel, reason or "our own")

    def rewrite(self) -> None:
        """Put kernels in place: linears first, because they take along what their activations come from."""
        self._model.opset_imports[DOMAIN] = 1
        for node in list(self._model.graph):
            if _is_linear(node) and not is_encoded(node):
                self._rewrite_linear(node, linear_op(node))
        RemoveUnusedNodesPass()(self._model)
        for node in list(self._model.graph):
            fused = _fused(node)
            if isinstance(fused, Fused):
                self._register(fused)
                attributes = fused.attributes
                ops.replace(
                    node, ir.node(fused.op_type, fused.inputs, attributes, domain=DOMAIN, name=node.name)
                )
        RemoveUnusedNodesPass()(self._model)

    def _rewrite_linear(self, node: ir.Node, op: LinearOp) -> None:
        if self._reason_against_linear(op):
            return
        build = GraphBuilder(self._layer_name(node))
        if op.spec.activations == "float":
            _emit_w4a16(build, op)
        else:
            self._emit_w8a8(build, op, node)
        for value in build.initializers:
            self._model.graph.register_initializer(value)
        ops.replace(node, build.nodes)

    def _reason_against_linear(self, op: LinearOp | None) -> str:
        if op is None:
            return "there is no kernel of code books, second levels and outliers"
        if op.spec.activations == "float":
            return self._reason_against_w4a16(op)
        return self._reason_against_w8a8(op)

    def _reason_against_w4a16(self, op: LinearOp) -> str:
        spec, dtype = op.spec, self._dtype_of(op)
        if spec.bits > _NARROW:
            return f"weights of {spec.bits} bits: the kernel of float activations takes up to {_NARROW}"
        if spec.block_size % w4a16.GROUP_SIZES[-1] and spec.block_size not in w4a16.GROUP_SIZES:
            return f"groups of {spec.block_size} rows: the kernel has {w4a16.GROUP_SIZES[1:]}, or one for all"
        if not self._only_references and dtype not in (torch.float16, torch.bfloat16):
            return f"activations are {dtype}: the kernel takes float16 and bfloat16"
        return ""

    def _reason_against_w8a8(self, op: LinearOp) -> str:
        spec, dtype = op.spec, self._dtype_of(op)
        if spec.activations != "token":
            return (
                f"activations per {spec.activations}: the kernel takes one scale per token "
                "(activations=token)"
            )
        if spec.zero_point or not spec.signed:
            return "weights have zero points: the kernel takes signed ones around 0"
        if spec.block_size % w8a8.SLAB_ROWS:
            return f"groups of {spec.block_size} rows: the kernel takes multiples of {w8a8.SLAB_ROWS}"
        if not self._only_references and dtype == torch.float64:
            return "activations are float64"
        return ""

    def _dtype_of(self, op: LinearOp) -> torch.dtype:
        return self._dtype or getattr(torch, ir.DataType[op.spec.dtype].numpy().name)

    def _emit_w8a8(self, build: GraphBuilder, op: LinearOp, node: ir.Node) -> None:
        spec = op.spec
        bits = _NARROW if spec.bits <= _NARROW else 8
        packed = w8a8.pack(
            from_array(op.integers().astype(np.int8)),
            from_array(np.atleast_2d(op.scales()).astype(np.float32)),
            group_size=spec.block_size,
            bits=bits,
        )
        quantization = Quantization((1 << (spec.activation_bits - 1)) - 1, spec.activation_clip)
        build.op(
            "W8A8",
            *self._quantize(op.x, quantization, node),
            build.constant(packed.weights.numpy(), "weights_packed"),
            build.constant(packed.scales.numpy(), "scales_packed"),
            op.bias,
            domain=DOMAIN,
            rows=packed.rows,
            columns=packed.columns,
            group_size=packed.group_size,
            bits=bits,
            dtype=int(ir.DataType[spec.dtype]),
        )

    def _quantize(
        self, x: ir.Value, quantization: Quantization, reader: ir.Node
    ) -> tuple[ir.Value, ir.Value]:
        """Integers and scales of activations, computed before ``reader`` if they are not yet."""
        key = (x, quantization)
        if key not in self._quantized:
            fused = _fused(x.producer()) if self._only_quantized(x) else None
            if not isinstance(fused, Fused) or fused.attributes.get("block") not in (None, static_dim(x, -1)):
                fused = Fused("Normalize", (x, None, None), {"kind": "none", "epsilon": 0.0})
            build = GraphBuilder(f"{x.name}.quantized")
            attributes = {name: given for name, given in fused.attributes.items() if name != "block"}
            build.op(
                f"{fused.op_type}Quantize",
                *fused.inputs,
                domain=DOMAIN,
                outputs=2,
                levels=quantization.levels,
                clip=quantization.clip,
                **attributes,
            )
            values, scales = build.nodes[0].outputs
            values.name, scales.name = f"{x.name}.integers", f"{x.name}.scales"
            values.dtype, scales.dtype = ir.DataType.INT8, ir.DataType.FLOAT
            values.shape = x.shape
            assert reader.graph is not None
            reader.graph.insert_before(reader, build.nodes)
            self._register(fused)
            self._quantized[key] = values, scales
        return self._quantized[key]

    def _only_quantized(self, x: ir.Value) -> bool:
        """Whether activations are read as integers alone: what made them need not store them, then."""
        readers = x.consumers()
        return not x.is_graph_output() and all(
            node.domain == ops.DOMAIN and node.op_type == "DynamicQuantizedLinear" for node in readers
        )

    def _register(self, fused: Fused) -> None:
        for value in fused.inputs:
            known = self._model.graph.initializers
            if value is not None and value.const_value is not None and str(value.name) not in known:
                self._model.graph.register_initializer(value)

    def _layer_name(self, node: ir.Node) -> str:
        """A name that is this node's alone."""
        name = node.name
        if not name or name in self._layers:
            name = f"{node.op_type}.{node.outputs[0].name}"
        self._layers.add(name)
        return name


def bind_cached_attention(model: ir.Model) -> Iterator[Binding]:
    """Replace attention to caches by the op that writes them in place, where there is one; a row for each."""
    binder = CachedAttentionBinder(model, forgets=False)
    for node in list(model.graph):
        if node.domain == ops.DOMAIN and node.op_type == "CachedAttention":
            reason = reason_not_to_bind(model, node)
            name = f"{node.domain}::{node.op_type}"
            if reason is None:
                yield Binding(
                    node.name or "", name, "decode_attention", "of one new token; torch's of several"
                )
                binder.bind(node)
            else:
                yield Binding(node.name or "", name, "body", reason)


def _is_linear(node: ir.Node) -> bool:
    return node.domain == ops.DOMAIN and node.op_type in ops.LINEAR_OPS


def _kernel_of(op: LinearOp) -> str:
    if op.spec.activations == "float":
        return "sparse_w4a16" if _is_sparse(op) else "w4a16"
    return f"w{_NARROW if op.spec.bits <= _NARROW else 8}a8"


def _fused(node: ir.Node | None) -> Fused | str | None:
    """The kernel that a node is; or why it is none, of an op that has one; else None."""
    if node is None:
        return None
    if node.domain == ops.DOMAIN and node.op_type == "HadamardTransform":
        return _transform(node)
    if node.domain == "" and node.op_type in _KINDS:
        return _norm(node)
    gate_up = _gate_up(node) if node.domain == "" and node.op_type == "Mul" else None
    return None if gate_up is None else Fused("SwiGLU", (gate_up,), {})


def _is_sparse(op: LinearOp) -> bool:
    """Whether two of every four weights are 0: the kernel of those has no zero points."""
    return op.spec.signed and not op.spec.zero_point and sparse_w4a16.is_sparse(_from_zero(op))


def _from_zero(op: LinearOp) -> torch.Tensor:
    """The integers [K, N], 0 … 15."""
    return from_array((op.integers() + (_MIDDLE if op.spec.signed else 0)).astype(np.uint8))


def _emit_w4a16(build: GraphBuilder, op: LinearOp) -> None:
    scales, group_size = np.atleast_2d(op.scales()), op.spec.block_size
    # Larger groups are several of the largest that the kernel has.
    repeats = max(1, group_size // w4a16.GROUP_SIZES[-1])
    scales, group_size = scales.repeat(repeats, axis=0), min(group_size, w4a16.GROUP_SIZES[-1])
    if _is_sparse(op):
        sparse = sparse_w4a16.pack(_from_zero(op), from_array(scales), group_size)
        _emit_packed(build, op, "SparseW4A16", sparse, [sparse.weights, sparse.scales])
        return
    zeros = op.zero_points()
    if zeros is None and not op.spec.signed:
        zeros = np.zeros(op.scales().shape, np.int16)
    shifted = None
    if zeros is not None:
        middle = _MIDDLE if op.spec.signed else 0
        shifted = from_array(np.atleast_2d(zeros + middle).repeat(repeats, axis=0))
    packed = w4a16.pack(_from_zero(op), from_array(scales), shifted, group_size)
    _emit_packed(build, op, "W4A16", packed, [packed.weights, packed.scales, packed.shifts])


def _emit_packed(
    build: GraphBuilder,
    op: LinearOp,
    op_type: str,
    packed: w4a16.PackedWeight | sparse_w4a16.PackedWeight,
    tensors: list[torch.Tensor | None],
) -> None:
    operands = [
        None if tensor is None else _constant(build, tensor, f"packed_{index}")
        for index, tensor in enumerate(tensors)
    ]
    build.op(
        op_type,
        op.x,
        *operands,
        op.bias,
        domain=DOMAIN,
        rows=packed.rows,
        columns=packed.columns,
        group_size=packed.group_size,
    )


def _constant(build: GraphBuilder, tensor: torch.Tensor, suffix: str) -> ir.Value:
    """bfloat16 goes through the bits that numpy has a type for."""
    if tensor.dtype == torch.bfloat16:
        array = tensor.view(torch.int16).numpy().view(ir.DataType.BFLOAT16.numpy())
        return build.constant(array, suffix)
    return build.constant(tensor.numpy(), suffix)


def _norm(node: ir.Node) -> Fused | str:
    x = input_at(node, 0)
    axis = integer(node, "axis")
    if x is None or x.shape is None or (-1 if axis is None else axis) not in (-1, len(x.shape) - 1):
        return "the kernel normalises the last axis"
    attributes = {"kind": _KINDS[node.op_type], "epsilon": number(node, "epsilon", _DEFAULT_EPSILON)}
    return Fused("Normalize", (x, input_at(node, 1), input_at(node, 2)), attributes)


def _transform(node: ir.Node) -> Fused | str:
    op = hadamard_op(node)
    if op.spec.trailing > 1:
        return "the kernel transforms neighbouring features"
    parts = [part for factor in op.factors for part in parts_of(constant_of(factor).numpy())]
    scale = 1.0
    while parts and _is_sylvester(parts[-1]):
        scale *= float(parts.pop()[0, 0])
    factor: np.ndarray[Any, Any] = np.ones((1, 1))
    for part in parts:
        factor = np.kron(factor, part)
    size = float(np.abs(factor[0, 0]))
    if np.abs(np.abs(factor) - size).max() > _ROUNDING * size:
        return "the kernel multiplies by signs: a factor is no Hadamard matrix"
    if len(factor) > rows.LARGEST_FACTOR:
        return f"a factor of order {len(factor)}: the kernel multiplies by at most {rows.LARGEST_FACTOR}"
    signs = None
    if len(factor) > 1 or factor[0, 0] < 0:
        packed = rows.packed_signs(torch.from_numpy(factor)).numpy()
        name = "+".join(str(value.name) for value in op.factors) + ".signs"
        signs = ir.val(
            name, shape=packed.shape, dtype=ir.DataType.INT64, const_value=ir.tensor(packed, name=name)
        )
    # The parts' own rounding is left behind: entries are exactly ±1 / √n in float32.
    exact = math.copysign(1 / math.sqrt(op.spec.block), scale)
    return Fused("Hadamard", (op.x, signs), {"block": op.spec.block, "scale": exact})


def _is_sylvester(part: np.ndarray[Any, Any]) -> bool:
    return part.shape == (2, 2) and bool(np.abs(part / part[0, 0] - _HADAMARD_2).max() <= _ROUNDING)


def _gate_up(node: ir.Node) -> ir.Value | None:
    """[g, u] of a product g · sigmoid(g) · u whose g and u are the halves of one value's last axis."""
    for silu, up in ((input_at(node, 0), input_at(node, 1)), (input_at(node, 1), input_at(node, 0))):
        gate = None if silu is None else _gate(silu)
        split = None if gate is None else gate.producer()
        if split is None or up is None or split.op_type != "Split" or up.producer() is not split:
            continue
        source, axis = input_at(split, 0), integer(split, "axis") or 0
        last = None if source is None or source.shape is None else len(source.shape) - 1
        halves = [static_dim(value, -1) for value in split.outputs]
        if len(halves) == 2 and halves[0] == halves[1] and axis in (-1, last) and gate is split.outputs[0]:
            return source
    return None


def _gate(silu: ir.Value) -> ir.Value | None:
    """g of g · sigmoid(g)."""
    node = silu.producer()
    if node is None or node.domain or node.op_type != "Mul":
        return None
    for gate, other in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
        sigmoid = None if other is None else other.producer()
        if sigmoid is not None and sigmoid.op_type == "Sigmoid" and sigmoid.inputs[0] is gate:
            return gate
    return None
