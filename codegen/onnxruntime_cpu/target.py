"""Target ``onnxruntime-cpu``: for each op, the kernel of this onnxruntime that is fastest on this machine.

The choice depends on the op's shape, on the rows that a deployment runs (batch × sequence), on the threads
and on the machine, and is made by a cached microbenchmark of the very nodes that are bound.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from ...ir import clone, ops
from ...ir.errors import TargetError
from ...ir.graph_builder import CONTRIB, GraphBuilder
from ..cached_attention import KERNEL as CACHED_ATTENTION_KERNEL
from ..cached_attention import CachedAttentionBinder, reason_not_to_bind
from ..hadamard_op import HadamardOp, HadamardSpec, hadamard_op, made_up_hadamard
from ..linear_format import LinearFormat
from ..linear_op import LinearOp, LinearSpec, is_encoded, linear_op, made_up_op
from ..microbenchmark import Microbenchmark
from ..target import Binding, BoundModel, Target
from . import costs
from .encoded_linear import (
    ENCODED_BODY,
    ENCODED_KERNELS,
    UNFOLDED_KERNELS,
    EncodedOp,
    EncodedSpec,
    encoded_op,
)
from .float_weights import CONV_KERNEL, FLOAT_KERNEL, FOLD_AT_LOAD
from .fused_add import ADD_KERNELS, SUM, AddOp, AddSpec, add_spec, fused_kernel, made_up_add
from .gather import GATHER_BODY, GATHER_KERNELS, GatherOp, GatherSpec, gather_op, made_up_gather
from .hadamard import HADAMARD_BODY, HADAMARD_KERNELS
from .kernel import Choice, Chooser, OpT
from .linear_kernels import LINEAR_BODY, LINEAR_KERNELS

_EXACT = 1e-3
"""Integer kernels that saturate err by per cents on evenly spread data; rounding stays far below this."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnnxruntimeCpu(Target):
    """onnxruntime's CPU provider on the machine that compiles.

    Attributes:
        rows: the rows (batch × sequence) that the deployment runs; the geometric mean of their times counts.
        threads: of an op; None for onnxruntime's choice.
        max_error: the largest relative error of a kernel against its op's body. Kernels that quantise
            activations in blocks, which 4-bit ones do when they are fast, have 5e-3 to 7e-3.
    """

    name: ClassVar[str] = "onnxruntime-cpu"

    rows: tuple[int, ...] = (1, 128)
    threads: int | None = None
    max_error: float = 1e-2

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        if not self.rows or any(rows < 1 for rows in self.rows):
            raise TargetError(f"onnxruntime-cpu: rows must be positive, found {self.rows}")

    def bind(self, model: ir.Model) -> BoundModel:
        """Bind each planish op, and each op that onnxruntime would fuse to its harm, to its best kernel.

        Raises:
            TargetError: an op that no kernel of this onnxruntime runs within ``max_error``.
        """
        bound = clone(model)
        binder = _Binder(bound, self._chooser(), may_fold=not _has_quantization_of_its_own(bound))
        for node in list(bound.graph.all_nodes()):
            binder.bind(node)
        ops.inline(bound)
        return BoundModel(
            model=bound, bindings=tuple(binder.bindings), session_options=binder.session_options
        )

    def for_rows(self, rows: int) -> OnnxruntimeCpu:
        """Kernels that are fastest at this one number of rows."""
        return dataclasses.replace(self, rows=(rows,))

    def unsupported_reason(self, linear: LinearFormat) -> str | None:
        """Also refuses bfloat16, which onnxruntime's CPU provider has no matrix product for."""
        if linear.dtype == ir.DataType.BFLOAT16:
            return "onnxruntime's CPU kernels do not run bfloat16: convert the model to float32 first"
        return linear.unsupported_reason()

    def seconds(self, node: ir.Node) -> float | None:
        """The geometric mean over ``rows`` of the bound kernel's time, as measured on this machine."""
        return costs.seconds(node, self._chooser())

    def adds_products_in_16_bits(self) -> bool:
        """Whether the kernel of signed int8 weights saturates on this machine, as measured."""
        spec = LinearSpec("tensor", 64, 64, 8, 0, True, False, False, "FLOAT", 3, pairs_fit=False)
        op, fast = made_up_op(spec), LINEAR_KERNELS[0]
        chooser = Chooser(self._chooser().benchmark, (4,), max_error=_EXACT)
        return chooser.results(op, {fast.name: fast}, LINEAR_BODY)[fast.name].error > _EXACT

    def _chooser(self) -> Chooser:
        return Chooser(Microbenchmark(self.threads), self.rows, self.max_error)


def _has_quantization_of_its_own(model: ir.Model) -> bool:
    """Quantised by someone else: folding DequantizeLinear at load would undo what onnxruntime makes of it."""
    return any(
        node.domain == "" and node.op_type in ("QuantizeLinear", "DequantizeLinear")
        for node in model.graph.all_nodes()
    )


class _Binder:
    """Replaces nodes and remembers what it chose; ops of equal size are chosen for once."""

    def __init__(self, model: ir.Model, chooser: Chooser, *, may_fold: bool) -> None:
        self.model = model
        self.chooser = chooser
        self.may_fold = may_fold
        self.linear_kernels = tuple(
            kernel for kernel in LINEAR_KERNELS if may_fold or kernel.session_options != FOLD_AT_LOAD
        )
        self.encoded_kernels = ENCODED_KERNELS if may_fold else UNFOLDED_KERNELS
        self.bindings: list[Binding] = []
        self.session_options: dict[str, str] = {}
        self._layer_names: set[str] = set()
        self._cached_attentions = CachedAttentionBinder(model)
        self._linear_choices: dict[LinearSpec, Choice[LinearOp]] = {}
        self._hadamard_choices: dict[HadamardSpec, Choice[HadamardOp]] = {}
        self._encoded_choices: dict[EncodedSpec, Choice[EncodedOp]] = {}
        self._gather_choices: dict[GatherSpec, Choice[GatherOp]] = {}
        self._add_choices: dict[AddSpec, Choice[AddOp]] = {}

    def bind(self, node: ir.Node) -> None:
        """Bind ``node`` if it is an op with a choice."""
        if node.domain == ops.DOMAIN and is_encoded(node):
            self._bind_encoded(node)
        elif node.domain == ops.DOMAIN and node.op_type in ops.LINEAR_OPS:
            self._bind_linear(node)
        elif node.domain == ops.DOMAIN and node.op_type == "QuantizedConv":
            self._bind_conv(node)
        elif node.domain == ops.DOMAIN and node.op_type == "QuantizedGather":
            self._bind_gather(node)
        elif node.domain == ops.DOMAIN and node.op_type == "HadamardTransform":
            self._bind_hadamard(node)
        elif node.domain == ops.DOMAIN and node.op_type == "CachedAttention":
            self._bind_cached_attention(node)
        elif (spec := add_spec(node)) is not None:
            self._bind_add(node, spec)

    def _bind_linear(self, node: ir.Node) -> None:
        op = linear_op(node)
        spec = op.spec.timed()
        choice = self._linear_choices.get(spec)
        if choice is None:
            choice = self.chooser.choose(made_up_op(spec), self.linear_kernels, LINEAR_BODY, FLOAT_KERNEL)
            self._linear_choices[spec] = choice
        self._replace(node, op, choice)

    def _bind_encoded(self, node: ir.Node) -> None:
        op = encoded_op(node)
        choice = self._encoded_choices.get(op.spec)
        if choice is None:
            choice = self.chooser.choose(op.timed(), self.encoded_kernels, ENCODED_BODY, FLOAT_KERNEL)
            self._encoded_choices[op.spec] = choice
        self._replace(node, op, choice)

    def _bind_conv(self, node: ir.Node) -> None:
        """Leave the body to be inlined: integer convolutions would need quantised activations."""
        if self.may_fold:
            self.session_options |= FOLD_AT_LOAD
            self._record(node, CONV_KERNEL, "the only kernel of float activations")
        else:
            self._record(node, "body", "folding at load would undo the model's own QDQ nodes")

    def _bind_gather(self, node: ir.Node) -> None:
        op = gather_op(node)
        choice = self._gather_choices.get(op.spec)
        if choice is None:
            choice = self.chooser.choose(
                made_up_gather(op.spec), GATHER_KERNELS, GATHER_BODY, GATHER_BODY.name
            )
            self._gather_choices[op.spec] = choice
        self._replace(node, op, choice)

    def _bind_hadamard(self, node: ir.Node) -> None:
        op = hadamard_op(node)
        choice = self._hadamard_choices.get(op.spec)
        if choice is None:
            choice = self.chooser.choose(
                made_up_hadamard(op.spec), HADAMARD_KERNELS, HADAMARD_BODY, HADAMARD_BODY.name
            )
            self._hadamard_choices[op.spec] = choice
        self._replace(node, op, choice)

    def _bind_cached_attention(self, node: ir.Node) -> None:
        reason = reason_not_to_bind(self.model, node)
        if reason is None:
            self._record(node, CACHED_ATTENTION_KERNEL, "appends to the cache in place")
            self._cached_attentions.bind(node)
        else:
            self._record(node, "body", reason)

    def _bind_add(self, node: ir.Node, spec: AddSpec) -> None:
        choice = self._add_choices.get(spec)
        if choice is None:
            choice = self.chooser.choose(made_up_add(spec), ADD_KERNELS, ADD_KERNELS[0], fused_kernel(spec))
            self._add_choices[spec] = choice
        self._record(node, choice.kernel.name, choice.reason)
        if choice.kernel.name == SUM:
            ops.replace(node, ir.node("Sum", node.inputs, name=node.name))

    def _replace(self, node: ir.Node, op: OpT, choice: Choice[OpT]) -> None:
        build = GraphBuilder(self._layer_name(node))
        choice.kernel.emit(build, op)
        self.session_options |= choice.kernel.session_options
        self._record(node, choice.kernel.name, choice.reason)
        self._insert(node, build)

    def _insert(self, node: ir.Node, build: GraphBuilder) -> None:
        for value in build.initializers:
            self.model.graph.register_initializer(value)
        for definition in build.definitions:
            ops.define(self.model, definition)
        if any(made.domain == CONTRIB for made in build.nodes):
            self.model.opset_imports.setdefault(CONTRIB, 1)
        ops.replace(node, build.nodes)

    def _layer_name(self, node: ir.Node) -> str:
        """A name that is this node's alone: its output's, where node names are missing or repeat."""
        name = node.name
        if not name or name in self._layer_names:
            name = f"{node.op_type}.{node.outputs[0].name}"
        self._layer_names.add(name)
        return name

    def _record(self, node: ir.Node, kernel: str, reason: str) -> None:
        op = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        self.bindings.append(Binding(node.name or "", op, kernel, reason))
