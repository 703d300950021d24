"""A student and its teacher, lowered to torch, with the hidden states that are compared as outputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import fx

from ...codegen.torch_fx import VALUE_KEY, lower, run
from ...ir import clone
from ..calibration.data import Feeds
from .batches import feeds_for
from .losses import Losses
from .objective import Objective, Tensors


class Networks:
    """The loss of a student as a function of its weights, with autograd.

    Args:
        student: not changed; weights that are not trained are shared.
        teacher: not changed; its weights are shared.
        names: the weights to train, float initializers of the student.
        losses: what the student is trained on.
        data: as for `Objective`.

    Attributes:
        parameters: copies of the weights to train, by name: float64 if one of them is, else float32. Those
            that nothing depends on that is compared are not among them.
        objective: what is compared.
    """

    def __init__(
        self,
        student: ir.Model,
        teacher: ir.Model,
        *,
        names: Collection[str],
        losses: Losses,
        data: Sequence[Feeds],
    ) -> None:
        self.objective = Objective(student, teacher, losses, data)
        wanted = (*self.objective.outputs, *self.objective.states)
        dtype = _precision(student, names)
        self._student_graph, self._teacher_graph = student, teacher
        compared = _with_outputs(student, wanted)
        read = [name for name in names if name in compared.graph.initializers]
        self._student = lower(compared, dtype=dtype, trainable=read)
        self._teacher = lower(_with_outputs(teacher, wanted), dtype=dtype) if losses.needs_teacher else None
        self.parameters: Mapping[str, torch.nn.Parameter] = _parameters(self._student, read)

    def losses(self, feeds: Feeds) -> dict[str, torch.Tensor]:
        """The weighted losses of one batch, by name."""
        expected: Tensors = {}
        if self._teacher is not None:
            with torch.no_grad():
                expected = run(self._teacher, feeds_for(self._teacher_graph, feeds))
        return self.objective(run(self._student, feeds_for(self._student_graph, feeds)), expected, feeds)


def _with_outputs(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy that computes these values and nothing else; weights are shared."""
    copy = clone(model)
    values = {output.name: output for node in copy.graph for output in node.outputs}
    values.update({value.name: value for value in copy.graph.inputs})
    copy.graph.outputs[:] = [values[name] for name in names]
    RemoveUnusedNodesPass()(copy)
    return copy


def _precision(model: ir.Model, names: Collection[str]) -> torch.dtype:
    wide = any(model.graph.initializers[name].dtype == ir.DataType.DOUBLE for name in names)
    return torch.float64 if wide else torch.float32


def _parameters(module: fx.GraphModule, names: Collection[str]) -> dict[str, torch.nn.Parameter]:
    paths = {node.meta[VALUE_KEY]: str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    return {name: module.get_parameter(paths[name]) for name in names}
