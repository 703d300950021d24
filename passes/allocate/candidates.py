"""What a linear may become, and what each possibility takes: bytes in a file, bits, seconds."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from ...codegen.target import Target
from ...ir import ops
from ...ir.errors import PipelineError
from ...ir.views import Linear
from ...ir.views.linears import as_linear
from ..quantize.algorithms.rtn import round_to_nearest
from ..quantize.layer_plan import LayerPlan
from ..quantize.linear_layers import replace_linear
from ..quantize.scheme import Scheme, parse_scheme
from ..quantize.selection import DENSE

_OPSET, _IR_VERSION = 23, 11


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A scheme, or none: the layer stays dense. ``text`` is what `quantize` reads from a node's metadata."""

    text: str
    scheme: Scheme | None


@dataclasses.dataclass(frozen=True)
class Cost:
    """What layers take.

    Attributes:
        stored: bytes of weights, scales, zero points and code books in a file, where 2 to 4 bits take 4 and
            5 to 8 take 8.
        bits: of the same, with integers as wide as the scheme says.
        seconds: on the target; None where it does not measure.
    """

    stored: float
    bits: float
    seconds: float | None


def parse_candidate(text: str, group_size: int | None) -> Candidate:
    """``dense``, or a scheme with float activations: ``W3A16``, ``W4A16_ASYM group_size=32``, ``NF4``.

    Args:
        text: with a group size of its own or without.
        group_size: for schemes without one of their own; None for the scheme's default.

    Raises:
        PipelineError: the text is no such scheme.
    """
    name, *options = text.split() or [""]
    if name == DENSE and not options:
        return Candidate(DENSE, None)
    settings = dict(option.partition("=")[::2] for option in options)
    own = settings.pop("group_size", None)
    if settings or (own is not None and not own.removeprefix("-").isdigit()):
        raise PipelineError(
            f"allocate: candidate {text!r} cannot be read", hint="write W3A16, 'W3A16 group_size=32' or dense"
        )
    scheme = parse_scheme(name, group_size if own is None else int(own))
    if scheme.activation_bits is not None:
        raise PipelineError(
            f"allocate: candidate {text!r} quantises activations, and only weights are weighed here",
            hint="use schemes such as W4A16",
        )
    return Candidate(f"{scheme.name} group_size={scheme.group_size}", scheme)


def dense_cost(linear: Linear, target: Target, *, timed: bool) -> Cost:
    """What the layer takes as it is; seconds only if ``timed``."""
    bits = linear.in_features * linear.out_features * (linear.weight.dtype or ir.DataType.FLOAT).bitwidth
    return Cost(bits / 8, float(bits), target.seconds(linear.node) if timed else None)


def quantized_cost(linear: Linear, plan: LayerPlan, target: Target, *, timed: bool) -> Cost:
    """What a layer of this size takes by a plan: measured on one that `quantize` makes of zeros."""
    weight = np.zeros((linear.in_features, linear.out_features), np.float32)
    quantized = round_to_nearest(weight, plan.grid)
    model, twin = _blank_twin(linear)
    replace_linear(model, dataclasses.replace(plan, linear=twin), quantized, error=0.0)
    (node,) = (node for node in model.graph if node.domain == ops.DOMAIN)
    stored = sum(
        value.const_value.nbytes
        for value in node.inputs
        if value is not None and value.const_value is not None and value is not twin.bias
    )
    bits = quantized.bits_per_weight() * weight.size
    return Cost(float(stored), bits, target.seconds(node) if timed else None)


def _blank_twin(linear: Linear) -> tuple[ir.Model, Linear]:
    """A model of one layer like ``linear``, [in, out], that holds no weights yet."""
    dtype = linear.weight.dtype or ir.DataType.FLOAT
    leading = 2 if linear.input.shape is None else len(linear.input.shape) - 1
    shape = [f"dim_{axis}" for axis in range(leading)]
    x = ir.val("x", shape=[*shape, linear.in_features], dtype=dtype)

    def constant(name: str, *dims: int) -> ir.Value:
        tensor = ir.LazyTensor(
            lambda: ir.tensor(np.zeros(dims, dtype.numpy())), dtype=dtype, shape=ir.Shape(dims), name=name
        )
        return ir.val(name, shape=dims, dtype=dtype, const_value=tensor)

    constants = [constant("layer.weight", linear.in_features, linear.out_features)]
    nodes = [ir.node("MatMul", [x, constants[0]], name="layer")]
    if linear.bias is not None:
        constants.append(constant("layer.bias", linear.out_features))
        nodes.append(ir.node("Add", [nodes[0].outputs[0], constants[1]], name="layer.bias"))
    graph = ir.Graph(
        [x], nodes[-1].outputs, nodes=nodes, initializers=constants, opset_imports={"": _OPSET}, name="layer"
    )
    twin = as_linear(nodes[0])
    assert twin is not None, "a product with a constant matrix is a linear"
    return ir.Model(graph, ir_version=_IR_VERSION), twin
