"""What a linear may become, and what each possibility takes: bytes in a file, bits, seconds."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from ...codegen.linear_format import LinearFormat
from ...codegen.target import Target
from ...ir import ops
from ...ir.errors import PipelineError, TargetError
from ...ir.views import Linear
from ..quantize.layer_plan import LayerPlan, Planner
from ..quantize.scheme import Scheme, parse_scheme
from ..quantize.selection import DENSE


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A scheme, or none: the layer stays dense. ``text`` is what `quantize` reads from a node's metadata."""

    text: str
    scheme: Scheme | None


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one layer takes by one candidate.

    Attributes:
        stored: bytes of the weight, its scales and zero points in a file, where 2 to 4 bits take 4 and 5 to
            8 take 8.
        bits: of all integers, scales and zero points together, with integers as wide as the scheme says.
        seconds: on the target; None where it does not measure.
    """

    stored: float
    bits: float
    seconds: float | None


def parse_candidate(text: str, group_size: int | None) -> Candidate:
    """``dense``, or a scheme with float activations: ``W3A16``, ``W4A16_ASYM group_size=32``.

    Args:
        text: with options of its own or without.
        group_size: for schemes without one of their own; None for the scheme's default.

    Raises:
        PipelineError: the text is no such scheme.
    """
    name, *options = text.split()
    if name == DENSE and not options:
        return Candidate(DENSE, None)
    settings = dict(option.partition("=")[::2] for option in options)
    own = settings.pop("group_size", None)
    if settings or (own is not None and not own.lstrip("-").isdigit()):
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


def require_supported(candidates: tuple[Candidate, ...], dtype: ir.DataType, target: Target) -> None:
    """Check, before any work, that the target runs every candidate on layers of this float type.

    Raises:
        TargetError: it does not; says which schemes it runs.
    """
    for candidate in candidates:
        if (scheme := candidate.scheme) is None:
            continue
        linear = LinearFormat(bits=scheme.bits, block_size=max(scheme.group_size, 0), dtype=dtype)
        reason = target.unsupported_reason(linear)
        if reason is not None:
            raise TargetError(
                f"allocate: {target.name} does not run candidate {candidate.text!r}: {reason}",
                hint="it runs " + "; ".join(target.formats()),
            )


def plan_of(linear: Linear, candidate: Candidate, planner: Planner) -> LayerPlan | str | None:
    """How `quantize` would store the layer, or why it could not; None for a dense one."""
    return None if candidate.scheme is None else planner.plan(linear, candidate.scheme)


def cost_of(linear: Linear, plan: LayerPlan | None, target: Target, *, timed: bool) -> Cost:
    """What the layer takes by a plan, or dense without one; seconds only if ``timed``."""
    elements = linear.in_features * linear.out_features
    dtype = linear.weight.dtype or ir.DataType.FLOAT
    if plan is None:
        bits = float(elements * dtype.bitwidth)
        return Cost(bits / 8, bits, target.seconds(linear.node) if timed else None)
    grid = plan.grid
    groups = linear.out_features * (linear.in_features // grid.block_size if grid.block_size else 1)
    container = ops.container(grid.bits, signed=grid.symmetric)
    zero_points = 0 if grid.symmetric else groups
    return Cost(
        stored=((elements + zero_points) * container.bitwidth + groups * dtype.bitwidth) / 8,
        bits=float((elements + zero_points) * grid.bits + groups * dtype.bitwidth),
        seconds=target.seconds(_blank_node(linear, plan)) if timed else None,
    )


def _blank_node(linear: Linear, plan: LayerPlan) -> ir.Node:
    """The node that `quantize` would make, with weights of zeros: its time depends on shapes and types."""
    grid, k, n = plan.grid, linear.in_features, linear.out_features
    container = ops.container(grid.bits, signed=grid.symmetric)
    shape = (k // grid.block_size, n) if grid.block_size else (n,)
    dtype = linear.weight.dtype or ir.DataType.FLOAT

    def constant(name: str, tensor: ir.TensorProtocol) -> ir.Value:
        return ir.val(name, shape=tensor.shape.numpy(), dtype=tensor.dtype, const_value=tensor)

    def integers(name: str, shape: tuple[int, ...]) -> ir.Value:
        return constant(name, ops.integer_tensor(np.zeros(shape, np.int8), container, name))

    leading = [
        f"dim_{axis}" for axis in range(2 if linear.input.shape is None else len(linear.input.shape) - 1)
    ]
    node, _ = ops.quantized_linear(
        ir.val("x", shape=[*leading, k], dtype=dtype),
        integers("weight", (k, n)),
        constant("scale", ir.tensor(np.ones(shape, dtype.numpy()), name="scale")),
        None if grid.symmetric else integers("zero_point", shape),
        None if linear.bias is None else constant("bias", ir.tensor(np.zeros(n, dtype.numpy()), name="bias")),
        bits=grid.bits,
        block_size=grid.block_size,
        name=linear.node.name,
    )
    return node
