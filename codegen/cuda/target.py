"""Target ``cuda``: a torch module on a GPU, with kernels of our own for what planish passes make.

The same as the target torch but for the ops that `binder` puts our kernels in the place of; those are ops
of torch, too (`torch_ops`), so that the module can be given to `torch.compile` and captured in a CUDA graph.
What `save` writes keeps the planish ops, and kernels are bound again when the file is opened.

With ``device="cpu"`` the references of the kernels run, for tests and to see what a GPU would compute.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir
from torch import fx

from ...ir import clone
from ...ir.errors import TargetError
from ..target import Binding, BoundModel
from ..torch_fx.lower import check_lowered
from ..torch_fx.target import Precision, Torch
from .binder import Binder, bind_cached_attention
from .decode_step import decode_step, lengths_of
from .lowering import OPS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cuda(Torch):
    """Our CUDA kernels, and torch for all else.

    Attributes:
        device: cuda, cuda:1, …; cpu for the references of the kernels.
        precision: of weights, activations and caches. The kernels of 4-bit weights need 16 bits; bfloat16 is
            for models whose activations exceed 65,504.
    """

    name: ClassVar[str] = "cuda"

    device: str = "cuda"
    precision: Precision = "float16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trainable:
            raise TargetError(
                f"{self.name}: trainable: the kernels have no gradients",
                hint="train with the target torch, whose device may be cuda as well",
            )

    def bind(self, model: ir.Model) -> BoundModel:
        """See `Torch.bind`.

        Attention to a cache is bound here, for who generates has to know that its buffers are written in
        place; all else when the module is made.
        """
        bound = clone(model)
        rows = list(bind_cached_attention(bound))
        check_lowered(bound, OPS)
        return BoundModel(model=bound, bindings=(*rows, *self.bindings(bound)))

    def bindings(self, model: ir.Model) -> tuple[Binding, ...]:
        """See `Torch.bindings`."""
        return tuple(self._binder(model).bindings())

    def module(self, bound: BoundModel) -> fx.GraphModule:
        """See `Torch.module`."""
        model = clone(bound.model)
        self._binder(model).rewrite()
        return self.lowered(model, OPS)

    def decode_step(self, bound: BoundModel, module: fx.GraphModule) -> fx.GraphModule | None:
        """See `Torch.decode_step`."""
        lengths = lengths_of(bound.model)
        return None if isinstance(lengths, str) else decode_step(module, lengths)

    def _binder(self, model: ir.Model) -> Binder:
        return Binder(model, self.dtype, only_references=self.device == "cpu")
