"""What a target is: a place where a compiled model runs, and the bindings of ops to its kernels."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import onnx_ir as ir

from .linear_format import FORMATS, LinearFormat


@dataclasses.dataclass(frozen=True)
class Binding:
    """Which kernel one op of the model was bound to, and why."""

    node: str
    op: str
    kernel: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoundModel:
    """A model whose every op the target's runtime can run, and how to run it.

    Attributes:
        model: the bound graph; shares the tensors that were not repacked with the graph it came from.
        bindings: one row per op that had a choice.
        session_options: onnxruntime session configuration entries that the bound kernels rely on.
        disabled_optimizers: names of onnxruntime graph optimisers that would undo a binding.
    """

    model: ir.Model
    bindings: tuple[Binding, ...] = ()
    session_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    disabled_optimizers: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target(abc.ABC):
    """Where a compiled model runs. Frozen: two equal targets bind alike on the same machine."""

    name: ClassVar[str]

    @abc.abstractmethod
    def bind(self, model: ir.Model) -> BoundModel:
        """Replace ops of the ``planish`` domain, and ops with a faster kernel, by what this target runs.

        ``model`` is not changed.
        """

    def for_rows(self, rows: int) -> Target:
        """The same target, choosing kernels for so many rows (batch × sequence) of a linear at a time."""
        del rows
        return self

    def unsupported_reason(self, linear: LinearFormat) -> str | None:
        """Why this target cannot run linears of a scheme, known before any work is done; None if it can.

        A target that runs standard ops runs whatever the ``planish`` ops can say, through their bodies.
        """
        return linear.unsupported_reason()

    def formats(self) -> tuple[str, ...]:
        """The schemes that this target runs, a line each, for the message that refuses another one."""
        return FORMATS

    def seconds(self, node: ir.Node) -> float | None:
        """What ``node`` takes with the kernel that it would be bound to, in seconds, as measured.

        Known are linears, quantised (``planish`` ops) or not (MatMul and Gemm with a constant matrix), and
        ``HadamardTransform``. The node need not belong to the model that will be bound; only its shapes,
        types and attributes count. None for other ops, and from targets that stand for no machine.
        """
        return None

    def adds_products_in_16_bits(self) -> bool:
        """Whether the int8 kernel may add pairs of products in 16 bits, where large weights saturate.

        Then a quantisation pass keeps every channel's adjacent pairs of weights small enough (see
        `planish.passes.quantize.grid`), and the fast kernel is exact.
        """
        return False

    def providers(self) -> list[Any]:
        """onnxruntime execution providers for the bound model."""
        return ["CPUExecutionProvider"]
