"""Ops of the domain ``planish``, which run on torch by their bodies, against onnxruntime: every overload."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from op_cases import Array, Case, Draw, agree
from planish.ir import ops
from planish.ir.ops.cached_attention import BITS, cached_attention

COUNT = 12
"""How many random nodes each overload is tested with."""
FLOATS = ("float32", "float16")
FLOATS8 = (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
NATIVE = frozenset({"float16", "float32", "float64", "int8", "uint8", "int32", "int64", "bool"})
MODULES = [
    importlib.import_module(f"{ops.__name__}.{found.name}") for found in pkgutil.iter_modules(ops.__path__)
]
DEFINITIONS = {
    definition.identifier: definition
    for module in MODULES
    for definition in getattr(module, "DEFINITIONS", {}).values()
}
"""All that `planish.ir.ops` has, also those that its registry of quantised ops does not list."""


def value(array: Array | None) -> ir.Value | None:
    """An operand that holds its numbers."""
    if array is None:
        return None
    return ir.val("x", shape=array.shape, const_value=ir.tensor(array), dtype=ir.tensor(array).dtype)


def case_of(made: tuple[ir.Node, ops.OpDefinition], terms: float, *, variable: Sequence[int] = (0,)) -> Case:
    """What a node computes of its operands. Numbers that torch does not have are constants."""
    node, definition = made
    inputs = [None if given is None else given.const_value.numpy() for given in node.inputs]
    return Case(
        inputs,
        {name: attribute.value for name, attribute in node.attributes.items()},
        outputs=len(node.outputs),
        constants=[i for i, x in enumerate(inputs) if x is not None and x.dtype.name not in NATIVE],
        variable=variable,
        terms=terms,
        definition=definition,
    )


def integers(draw: Draw, bits: int, shape: Sequence[int], *, signed: bool) -> Array:
    """Integers of so many bits, in the container that holds them."""
    low = -(1 << (bits - 1)) if signed else 0
    found = draw.rng.integers(low, low + (1 << bits), tuple(shape))
    return found.astype(ops.container(bits, signed=signed).numpy())


def scales(draw: Draw, k: int, n: int, block_size: int, dtype: str = "float32") -> Array:
    return draw.array([k // block_size, n] if block_size else [n], dtype, 0.5, 2)


def bias(draw: Draw, overload: str, n: int, dtype: str = "float32") -> ir.Value | None:
    return value(draw.array([n], dtype)) if overload.endswith("bias") else None


def plain_weight(draw: Draw, k: int, n: int, block_size: int, dtype: str) -> dict[str, Any]:
    """Integers with or without zero points, or floats of 8 bits."""
    scale, bits, signed = scales(draw, k, n, block_size, dtype), draw.integer(2, 8), draw.flag()
    if draw.flag(0.2):
        return {"weight": draw.array([k, n]).astype(draw.choice(FLOATS8)), "scale": scale, "bits": 8}
    zero_point = None if draw.flag(0.3) else integers(draw, bits, scale.shape, signed=signed)
    weight = integers(draw, bits, [k, n], signed=signed)
    return {"weight": weight, "scale": scale, "zero_point": zero_point, "bits": bits}


def codebook_weight(draw: Draw, k: int, n: int, block_size: int, dtype: str) -> dict[str, Any]:
    bits = draw.integer(2, 8)
    return {
        "weight": integers(draw, bits, [k, n], signed=False),
        "scale": scales(draw, k, n, block_size).astype(draw.choice((*FLOATS, ml_dtypes.float8_e4m3fn))),
        "codebook": np.sort(draw.array([1 << bits])),
        "bits": bits,
    }


def exponent_weight(draw: Draw, k: int, n: int, block_size: int, dtype: str) -> dict[str, Any]:
    found = codebook_weight(draw, k, n, block_size, dtype)
    return found | {"scale": draw.array(found["scale"].shape, "uint8", 120, 130)}


def bilevel_weight(draw: Draw, k: int, n: int, block_size: int, dtype: str) -> dict[str, Any]:
    bits, columns, groups = draw.integer(2, 8), draw.integer(1, n), k // block_size if block_size else 1
    scale, zero_point = (integers(draw, draw.choice((3, 6)), [groups, n], signed=False) for _ in range(2))
    grids = (draw.array([groups, -(-n // columns)], draw.choice(FLOATS), 0.2, 1.5) for _ in range(4))
    return {
        "weight": integers(draw, bits, [k, n], signed=False),
        "scale": scale,
        "zero_point": zero_point,
        "second_level": ops.SecondLevel(*map(value, grids), columns),
        "bits": bits,
    }


WEIGHTS = {
    "": plain_weight,
    "codebook": codebook_weight,
    "codebook_exponent": exponent_weight,
    "bilevel": bilevel_weight,
}


def quantized_linear(draw: Draw, overload: str) -> Case:
    encoding = overload.removesuffix("bias").removesuffix("_").removesuffix("outliers").removesuffix("_")
    k, n, block_size = 16 * draw.integer(1, 3), draw.integer(1, 6), draw.choice((0, 8, 16))
    dtype = draw.choice(FLOATS)
    operands = WEIGHTS[encoding](draw, k, n, block_size, dtype)
    if "outliers" in overload:
        places = np.sort(draw.rng.choice(k * n, draw.integer(1, 5), replace=False))
        kept = draw.array(places.shape, draw.choice(FLOATS), -20, 20)
        operands["outliers"] = ops.Outliers(value(ops.outlier_gaps(places)), value(kept))
    operands = {
        name: value(given) if isinstance(given, np.ndarray) else given for name, given in operands.items()
    }
    x = value(draw.array([*draw.shape(0, 3), k], dtype))
    made = ops.quantized_linear(x, **operands, bias=bias(draw, overload, n, dtype), block_size=block_size)
    return case_of(made, k)


def dynamic_quantized_linear(draw: Draw, overload: str) -> Case:
    """Weights have at most 7 bits: onnxruntime's kernels for 8 saturate on some CPUs."""
    form, k, n = overload.removesuffix("_bias"), 16 * draw.integer(1, 3), draw.integer(1, 6)
    narrow, block_size = form in ("token_narrow", "token_block"), 16 if form == "token_block" else 0
    bits, signed = draw.integer(2 if narrow else 5, 7), draw.flag()
    weight, scale = integers(draw, bits, [k, n], signed=signed), scales(draw, k, n, block_size)
    zero_point = None if draw.flag(0.3) else integers(draw, bits, scale.shape, signed=signed)
    if zero_point is not None and bits <= 4 and not block_size:
        zero_point = zero_point.astype(np.int8)
    x = draw.array([*draw.shape(1, 3), k])
    x[0] *= draw.choice((0, 1, 50))
    made = ops.dynamic_quantized_linear(
        value(x),
        value(weight),
        value(scale),
        value(zero_point),
        bias(draw, overload, n),
        bits=bits,
        granularity="tensor" if form == "tensor" else "token",
        activation_bits=draw.integer(2, 8) if narrow else 8,
        activation_clip=draw.number(0.5, 0.99) if narrow else 1.0,
        block_size=block_size,
    )
    return case_of(made, k)


def static_quantized_linear(draw: Draw, overload: str) -> Case:
    k, n, bits, signed = 16 * draw.integer(1, 3), draw.integer(1, 6), draw.integer(2, 8), draw.flag()
    zero_point = None if draw.flag(0.3) else integers(draw, bits, [n], signed=signed)
    made = ops.static_quantized_linear(
        value(draw.array([*draw.shape(0, 3), k])),
        value(integers(draw, bits, [k, n], signed=signed)),
        value(scales(draw, k, n, 0)),
        value(draw.array([], low=0.01, high=0.03)),
        value(draw.array([], draw.choice(("int8", "uint8")), 0, 100)),
        value(zero_point),
        bias(draw, overload, n),
        bits=bits,
    )
    return case_of(made, k)


def quantized_gather(draw: Draw, overload: str) -> Case:
    rows, block_size, dtype = draw.integer(1, 9), 16 if overload == "block" else 0, draw.choice(FLOATS)
    columns = 16 * draw.integer(1, 3)
    bits, signed = (draw.integer(2, 8), draw.flag()) if block_size else (8, True)
    scale = draw.array([rows, columns // block_size if block_size else 1], dtype, 0.5, 2)
    zero_point = integers(draw, bits, scale.shape, signed=signed) if block_size and draw.flag() else None
    ids = draw.array(draw.shape(0, 3, empty=True), draw.choice(("int32", "int64")), -rows, rows - 1)
    table = integers(draw, bits, [rows, columns], signed=signed)
    made = ops.quantized_gather(
        value(ids), value(table), value(scale), value(zero_point), bits=bits, block_size=block_size
    )
    return case_of(made, 1)


def quantized_conv(draw: Draw, overload: str) -> Case:
    rank, group, bits, signed = draw.integer(1, 2), draw.integer(1, 2), draw.integer(2, 8), draw.flag()
    channels, kernel = group * draw.integer(1, 3), draw.integers(rank, 1, 3)
    weight = integers(draw, bits, [channels, draw.integer(1, 3), *kernel], signed=signed)
    zero_point = None if draw.flag(0.3) else integers(draw, bits, [channels], signed=signed)
    x = draw.array([draw.integer(1, 2), group * weight.shape[1], *draw.integers(rank, 5, 8)])
    made = ops.quantized_conv(
        value(x),
        value(weight),
        value(draw.array([channels], low=0.5, high=2)),
        value(zero_point),
        value(draw.maybe(draw.array([channels]))),
        bits=bits,
        strides=draw.integers(rank, 1, 2),
        pads=draw.integers(2 * rank, 0, 2),
        dilations=draw.integers(rank, 1, 2),
        group=group,
    )
    return case_of(made, math.prod(weight.shape[1:]))


def hadamard_transform(draw: Draw, overload: str) -> Case:
    count = {"two": 2, "three": 3}.get(overload, 1)
    orders, dtype = draw.integers(count, 2, 4), draw.choice((*FLOATS, "float64"))
    trailing = draw.integer(2, 4) if overload == "leading" else 1
    blocks = 1 if overload == "" else draw.integer(2 if overload == "blocks" else 1, 3)
    x = draw.array([*draw.shape(0, 3), blocks * math.prod(orders) * trailing], dtype)
    factors = [value(draw.array([order, order], dtype, -1, 1)) for order in orders]
    return case_of(ops.hadamard_transform(value(x), factors, trailing=trailing), math.prod(orders))


STORED = {32: ("float32", -3, 3), 8: ("int8", -128, 127), 4: ("uint8", 0, 255)}
"""Type and range of what a cache has, by bits."""


def cached(draw: Draw, overload: str) -> Case:
    """Of new tokens that see a random part of what is cached, the first token always."""
    bits, batch, new, past = BITS[overload], draw.integer(1, 3), draw.integer(1, 3), draw.integer(0, 4)
    kv_heads, size = draw.integer(1, 3), 2 * draw.integer(1, 3)
    heads = kv_heads * draw.integer(1, 3)
    query, key, fresh = (draw.array([batch, new, count * size]) for count in (heads, kv_heads, kv_heads))
    shape, scale_shape = [batch, kv_heads, past, size // 2 if bits == 4 else size], [1, kv_heads, 1, size]
    stored = (value(draw.array(shape, *STORED[bits])) for _ in range(2))
    grids = (value(draw.array(draw.choice(([1], scale_shape)), low=0.01, high=0.5)) for _ in range(2))
    mask = draw.array([draw.choice((1, batch)), draw.choice((1, heads)), new, past + new], "bool")
    mask[..., 0] = True
    if draw.flag(0.3):
        mask = np.where(mask, draw.array(mask.shape), np.float32("-inf")).astype("float32")
    made = cached_attention(
        *map(value, (query, key, fresh, mask)),
        tuple(stored),
        q_num_heads=heads,
        kv_num_heads=kv_heads,
        scale=draw.number(0.1, 1),
        softcap=draw.choice((0.0, draw.number(1, 5))),
        window=draw.integer(0, 3),
        scales=None if bits == 32 else tuple(grids),
        bits=bits,
    )
    return case_of(made, 8, variable=range(6))


GENERATORS: dict[str, Callable[[Draw, str], Case]] = {
    "CachedAttention": cached,
    "DynamicQuantizedLinear": dynamic_quantized_linear,
    "HadamardTransform": hadamard_transform,
    "QuantizedConv": quantized_conv,
    "QuantizedGather": quantized_gather,
    "QuantizedLinear": quantized_linear,
    "StaticQuantizedLinear": static_quantized_linear,
}


def test_every_op_is_tested() -> None:
    assert {definition.op_type for definition in DEFINITIONS.values()} == GENERATORS.keys()


@pytest.mark.parametrize(
    "definition", DEFINITIONS.values(), ids=lambda found: f"{found.op_type} {found.overload}"
)
def test_overload_agrees_with_onnxruntime(definition: ops.OpDefinition) -> None:
    def generate(draw: Draw) -> Case:
        case = GENERATORS[definition.op_type](draw, definition.overload)
        assert case.definition is definition
        return case

    agree(definition.op_type, generate, COUNT, ops.DOMAIN)
