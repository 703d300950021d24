"""Target ``torch``: the graph as a `torch.fx` module, on any device, in any precision, with gradients.

The module holds the graph's weights under their own names. It can be trained, printed, given to
`torch.compile`, and captured in a CUDA graph; ``CompiledModel.module`` is it. Planish ops run through their
bodies. What `save` writes keeps them as functions, so that any other target can bind the file.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, get_args

import onnx_ir as ir
import torch
from torch import fx

from ...ir import clone, ops
from ...ir.errors import TargetError
from ..target import Binding, BoundModel, Target
from .lower import check_lowered, lower
from .registry import Registry

Precision = Literal["as is", "float64", "float32", "bfloat16", "float16"]
_DTYPES = {name: getattr(torch, name) for name in get_args(Precision)[1:]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Torch(Target):
    """torch.

    Attributes:
        device: where weights live and the model runs: cpu, cuda, cuda:1, ….
        precision: floating-point type of weights, activations and caches.
        trainable: floating-point weights are parameters, with memory of their own.
    """

    name: ClassVar[str] = "torch"

    device: str = "cpu"
    precision: Precision = "as is"
    trainable: bool = False

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise TargetError(
                f"{self.name}: precision: expected one of {get_args(Precision)}, found {self.precision!r}"
            )
        try:
            kind = torch.device(self.device).type
        except RuntimeError as error:
            raise TargetError(f"{self.name}: torch knows no device {self.device!r}") from error
        if kind == "cuda" and not torch.cuda.is_available():
            raise TargetError(
                f"{self.name}: the device {self.device!r} was asked for, and torch finds no CUDA device",
                hint="install a CUDA build of torch on a machine with a GPU, or take the target torch on cpu",
            )

    def bind(self, model: ir.Model) -> BoundModel:
        """The same graph; planish ops stay whole.

        Raises:
            TargetError: an op that is not lowered.
        """
        bound = clone(model)
        check_lowered(bound)
        return BoundModel(model=bound, bindings=self.bindings(bound))

    def bindings(self, model: ir.Model) -> tuple[Binding, ...]:
        """What runs each op that had a choice."""
        return tuple(
            Binding(node.name or "", f"{node.domain}::{node.op_type}", "body", "torch functions")
            for node in model.graph.all_nodes()
            if node.domain == ops.DOMAIN
        )

    def module(self, bound: BoundModel) -> fx.GraphModule:
        """The module that computes a bound model.

        Raises:
            TargetError: an attribute or element type that is not lowered.
        """
        return self.lowered(bound.model)

    def lowered(self, model: ir.Model, ops: Registry | None = None) -> fx.GraphModule:
        """A graph as a module on the device, in the precision; ``ops`` as `lower` takes them.

        Raises:
            TargetError: an attribute or element type that is not lowered.
        """
        weights = model.graph.initializers if self.trainable else {}
        return lower(
            model,
            dtype=self.dtype,
            device=self.device,
            trainable=[name for name, value in weights.items() if _is_floating(value)],
            ops=ops,
        )

    def decode_step(self, bound: BoundModel, module: fx.GraphModule) -> fx.GraphModule | None:
        """What runs one token of a decoder on buffers that stay, for a CUDA graph to capture.

        Args:
            bound: the decoder.
            module: its own.

        Returns:
            See `planish.codegen.cuda.decode_step`; None where there is no such thing.
        """
        return None

    @property
    def dtype(self) -> torch.dtype | None:
        """That all floating-point tensors take; None if they keep their own."""
        return _DTYPES.get(self.precision)

    def providers(self) -> list[Any]:
        """None: onnxruntime has no part in it."""
        return []


def _is_floating(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()
