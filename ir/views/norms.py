"""The normalisations of a model and the linears that read them."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from .linears import Linear, linears
from .values import input_at, is_constant, number, parameter_owner

_EPSILON = 1e-5
"""The default of both ops."""


@dataclasses.dataclass(frozen=True)
class Norm:
    """One LayerNormalization or RMSNormalization with a constant scale.

    Attributes:
        name: the module's path: the scale's name without ``.weight``.
        node: the op.
        input: what is normalised.
        scale: the factor per channel, a constant.
        bias: the constant added per channel, if there is one.
        output: the result.
        epsilon: added to the mean square or variance.
        linears: the linears that read the output.
        feeds_only_linears: nothing else reads the output, so the scale can be moved into their weights.
    """

    name: str
    node: ir.Node
    input: ir.Value
    scale: ir.Value
    bias: ir.Value | None
    output: ir.Value
    epsilon: float
    linears: tuple[Linear, ...]
    feeds_only_linears: bool

    @property
    def is_rms(self) -> bool:
        """Whether the mean is left alone."""
        return self.node.op_type == "RMSNormalization"


def norms(model: ir.Model) -> list[Norm]:
    """The normalisations of the model's graph, in its order."""
    readers: dict[ir.Value, list[Linear]] = {}
    for linear in linears(model):
        readers.setdefault(linear.input, []).append(linear)
    found = (_as_norm(node, readers) for node in model.graph)
    return [norm for norm in found if norm is not None]


def _as_norm(node: ir.Node, readers: dict[ir.Value, list[Linear]]) -> Norm | None:
    if node.domain != "" or node.op_type not in ("LayerNormalization", "RMSNormalization"):
        return None
    value, scale, bias = input_at(node, 0), input_at(node, 1), input_at(node, 2)
    if value is None or scale is None or not is_constant(scale):
        return None
    output = node.outputs[0]
    fed = tuple(readers.get(output, ()))
    reads = {linear.node for linear in fed}
    only_linears = bool(fed) and not output.is_graph_output() and reads.issuperset(output.consumers())
    return Norm(
        name=parameter_owner(scale),
        node=node,
        input=value,
        scale=scale,
        bias=bias,
        output=output,
        epsilon=number(node, "epsilon", _EPSILON),
        linears=fed,
        feeds_only_linears=only_linears,
    )
