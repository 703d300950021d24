"""Kernels that repack weights hold exactly the integers of the op, taken apart here in another way."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from planish.codegen.linear_op import LinearSpec, made_up_op
from planish.codegen.onnxruntime_cpu.float_weights import FLOAT_KERNEL
from planish.codegen.onnxruntime_cpu.linear_kernels import LINEAR_KERNELS
from planish.ir import ops
from planish.ir.graph_builder import GraphBuilder

K, N = 64, 12


def spec_of(activations, bits, block_size, signed, activations_signed=False):
    return LinearSpec(
        activations,
        K,
        N,
        bits,
        block_size,
        signed,
        not signed,
        True,
        "FLOAT",
        3,
        pairs_fit=True,
        activations_signed=activations_signed,
    )


SPECS = [
    *(
        spec_of("float", bits, block_size, signed)
        for bits in range(2, 9)
        for block_size in (0, 16, 32)
        for signed in (True, False)
    ),
    *(
        spec_of("token", bits, block, signed)
        for bits in (3, 4)
        for block in (0, 32)
        for signed in (True, False)
    ),
    *(spec_of("token", bits, 0, signed) for bits in (6, 8) for signed in (True, False)),
    *(spec_of("static", bits, 0, signed, True) for bits in (4, 8) for signed in (True, False)),
    *(spec_of("tensor", 8, 0, signed) for signed in (True, False)),
]


PACKING_CASES = [
    pytest.param(spec, kernel, id=f"{kernel.name}-{index}")
    for index, spec in enumerate(SPECS)
    for kernel in LINEAR_KERNELS
    if FLOAT_KERNEL not in kernel.name and kernel.applies(made_up_op(spec))
]
# Weight and zero point among the inputs of the nodes that multiply integers.
OPERANDS = {"MatMulIntegerToFloat": (1, 5), "DynamicQuantizeMatMul": (1, 3)}


def values_of(value):
    """What onnxruntime makes of a constant expression, as float64."""
    if value.const_value is not None:
        tensor = value.const_value
        return ops.integer_values(tensor).astype(np.float64)
    graph = ir.Graph(
        [],
        [value],
        nodes=[value.producer()],
        initializers=[operand for operand in value.producer().inputs if operand is not None],
        opset_imports={"": 23},
        name="g",
    )
    value.name = "result"
    serialized = ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString()
    session = onnxruntime.InferenceSession(serialized, providers=["CPUExecutionProvider"])
    return session.run(None, {})[0].astype(np.float64)


def unpack(packed, bits, count):
    """[..., bytes] → [..., count] integers, bit by bit, the lowest first."""
    stream = np.unpackbits(packed, axis=-1, bitorder="little")
    stream = stream[..., : count * bits].reshape(*packed.shape[:-1], count, bits)
    return (stream.astype(np.int64) << np.arange(bits)).sum(-1)


def nbits_integers(node):
    """(W − zero point) [K, N] as MatMulNBits defines it."""
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    bits, size = attributes["bits"], attributes["block_size"]
    assert (attributes["K"], attributes["N"]) == (K, N)
    weight = unpack(node.inputs[1].const_value.numpy(), bits, size)
    zero = np.full((N, K // size), 1 << (bits - 1))
    if node.inputs[3] is not None:
        zero = unpack(node.inputs[3].const_value.numpy(), bits, K // size)
    return (weight - zero[:, :, None]).reshape(N, K).T


def expected_integers(op):
    zero = op.zero_points()
    integers = op.integers().astype(np.int64)
    if zero is None:
        return integers
    return integers - (np.repeat(zero, op.spec.block_size, axis=0) if op.spec.block_size else zero)


@pytest.mark.parametrize(("spec", "kernel"), PACKING_CASES)
def test_kernels_hold_the_same_integers(spec, kernel):
    op = made_up_op(spec)
    build = GraphBuilder("layer")
    kernel.emit(build, op)
    (node,) = (node for node in build.nodes if node.op_type in (*OPERANDS, "MatMulNBits"))
    if node.op_type == "MatMulNBits":
        held = nbits_integers(node)
    else:
        weight, zero = OPERANDS[node.op_type]
        zero_point = node.inputs[zero] if zero < len(node.inputs) else None
        held = values_of(node.inputs[weight])
        held = held - (0 if zero_point is None else values_of(zero_point))
    np.testing.assert_array_equal(held, expected_integers(op))
