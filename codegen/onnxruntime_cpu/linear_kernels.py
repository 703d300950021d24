"""The kernels that onnxruntime's CPU provider has for a linear of integers on a uniform grid.

Each is a function of the op that says whether it applies, and one that emits its nodes. All compute the op's
body exactly, up to floating-point rounding, unless said otherwise here:

- ``MatMulNBits accuracy 4`` quantises activations to int8 in blocks (relative error about 5e-3);
- a kernel of float activations leaves out the quantisation per token or tensor that a dynamic op asks for
  (about 1e-2 at 8 bits); one that clips is not offered such kernels, because clipping is no rounding error;
- signed int8 kernels saturate on CPUs that add products in 16 bits. Stored as unsigned integers around 128,
  the same weights are the same function, and do not. Weights of up to 7 bits never saturate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import onnx_ir as ir

from ...ir.graph_builder import GraphBuilder
from ..linear_op import LinearOp
from . import integer_kernels as integer
from .float_weights import FLOAT_KERNEL, FOLD_AT_LOAD, emit_dequantized, emit_product
from .kernel import Kernel
from .nbits_kernel import emit_nbits, nbits_block_size
from .token_grid import emit_integers

_WIDEST_SMALL = 4
"""Bits of weights for which a 4-bit kernel may take the place of an int8 one."""


def _emit_float(build: GraphBuilder, op: LinearOp) -> ir.Value:
    weight = emit_dequantized(build, op.weight, op.scale, op.zero_point, op.spec.block_size)
    return emit_product(build, op.x, weight, op.bias)


def _on_grid(
    emit: Callable[[GraphBuilder, LinearOp], ir.Value],
) -> Callable[[GraphBuilder, LinearOp], ir.Value]:
    """``emit`` of activations that were put on their grid first, in float."""

    def emit_on_grid(build: GraphBuilder, op: LinearOp) -> ir.Value:
        if op.spec.activations == "static":
            grid = op.static_grid()
            x = build.op("DequantizeLinear", build.op("QuantizeLinear", op.x, *grid), *grid)
        else:
            x = build.op("Mul", *emit_integers(build, op))
        return emit(build, dataclasses.replace(op, x=x))

    return emit_on_grid


def _emit_body(build: GraphBuilder, op: LinearOp) -> ir.Value:
    node, definition = op.as_node(build.layer)
    return build.planish(node, definition)


def _per_channel(activations: str, *, signed: bool | None = None) -> Callable[[LinearOp], bool]:
    """Takes ops with such activations and one scale per channel; with ``signed``, only of 8-bit weights."""

    def applies(op: LinearOp) -> bool:
        spec = op.spec
        if spec.activations != activations or spec.block_size:
            return False
        return signed is None or (spec.signed == signed and spec.bits > _WIDEST_SMALL)

    return applies


def _by_rows(applies: Callable[[LinearOp], bool]) -> Callable[[LinearOp], bool]:
    return lambda op: applies(op) and integer.quantizes_by_rows(op)


def _takes_nbits(op: LinearOp) -> bool:
    small = op.spec.bits <= _WIDEST_SMALL or op.spec.block_size > 0
    allowed = op.spec.activations == "float" or (small and _leaves_out_rounding(op))
    return allowed and nbits_block_size(op) is not None


def _leaves_out_rounding(op: LinearOp) -> bool:
    """Whether float activations differ from the op's own by rounding to 8 bits only."""
    spec = op.spec
    return spec.activations in ("tensor", "token") and spec.activation_bits == 8 and spec.activation_clip == 1


def _takes_float(op: LinearOp) -> bool:
    return op.spec.activations == "float" or _leaves_out_rounding(op)


def _has_grid_in_float(op: LinearOp) -> bool:
    return op.spec.activations in ("token", "static")


def _takes_nbits_on_grid(op: LinearOp) -> bool:
    return op.spec.activations == "token" and op.spec.block_size > 0 and nbits_block_size(op) is not None


LINEAR_BODY: Kernel[LinearOp] = Kernel("body", lambda op: True, _emit_body)
LINEAR_KERNELS: tuple[Kernel[LinearOp], ...] = (
    Kernel("DynamicQuantizeMatMul", _per_channel("tensor"), integer.emit_dynamic),
    Kernel(
        "DynamicQuantizeMatMul of unsigned weights",
        _per_channel("tensor", signed=True),
        integer.emit_dynamic_unsigned,
    ),
    Kernel(
        "DynamicQuantizeLinear + MatMulIntegerToFloat", _per_channel("tensor"), integer.emit_integer_to_float
    ),
    Kernel("MatMulIntegerToFloat by token", _per_channel("token"), integer.emit_token),
    Kernel(
        "MatMulIntegerToFloat by token of unsigned weights",
        _per_channel("token", signed=True),
        integer.emit_token_unsigned,
    ),
    Kernel(
        "QuantizeLinear by token + MatMulIntegerToFloat",
        _by_rows(_per_channel("token")),
        integer.emit_token_by_rows,
    ),
    Kernel(
        "QuantizeLinear by token + MatMulIntegerToFloat of unsigned weights",
        _by_rows(_per_channel("token", signed=True)),
        integer.emit_token_by_rows_unsigned,
    ),
    Kernel("QuantizeLinear + MatMulIntegerToFloat", _per_channel("static"), integer.emit_static),
    Kernel(
        "QuantizeLinear + MatMulIntegerToFloat of unsigned weights",
        _per_channel("static", signed=True),
        integer.emit_static_unsigned,
    ),
    Kernel("MatMulNBits accuracy 4", _takes_nbits, emit_nbits(4)),
    Kernel("MatMulNBits accuracy 0", _takes_nbits, emit_nbits(0)),
    Kernel(
        "activations on their grid + MatMulNBits accuracy 4", _takes_nbits_on_grid, _on_grid(emit_nbits(4))
    ),
    Kernel(
        "activations on their grid + MatMulNBits accuracy 0", _takes_nbits_on_grid, _on_grid(emit_nbits(0))
    ),
    Kernel(
        f"activations on their grid + {FLOAT_KERNEL}", _has_grid_in_float, _on_grid(_emit_float), FOLD_AT_LOAD
    ),
    Kernel(FLOAT_KERNEL, _takes_float, _emit_float, FOLD_AT_LOAD),
)
