"""Arithmetic, comparisons, activations and casts against onnxruntime."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from op_cases import ANY, FLOATS, INTEGERS, Case, Draw, Generator, agree, model_of
from planish.codegen.torch_fx import lower, run
from planish.ir.errors import TargetError

SINGLE = ("float32", "float16")
"""Where onnxruntime has no kernel for float64, and onnx.reference computes or broadcasts in another way."""
NUMBERS = (*FLOATS, *INTEGERS)
ELEMENTS = {"float32": "FLOAT", "float64": "DOUBLE"}
INTEGERS_OF_ANY_WIDTH = ("int8", "int16", "int32", "int64", "uint8")


def unary(draw: Draw, dtypes: Sequence[str], low: float, high: float) -> Case:
    return Case([draw.special(draw.array(draw.shape(empty=True), draw.choice(dtypes), low, high))])


def binary(draw: Draw, dtypes: Sequence[str], low: float = -4, high: float = 4) -> Case:
    whole, dtype = draw.shape(empty=True), draw.choice(dtypes)
    shapes = [draw.broadcastable(whole) for _ in range(2)]
    return Case([draw.special(draw.array(shape, dtype, low, high)) for shape in shapes])


def sign(draw: Draw) -> Case:
    """Without NaN, of which the op says nothing."""
    return Case([draw.array(draw.shape(empty=True), draw.choice((*NUMBERS, "int8", "uint8")), -2, 2)])


def variadic(draw: Draw, dtypes: Sequence[str]) -> Case:
    whole, dtype = draw.shape(empty=True), draw.choice(dtypes)
    shapes = [draw.broadcastable(whole) for _ in range(draw.integer(1, 4))]
    return Case([draw.special(draw.array(shape, dtype)) for shape in shapes], terms=len(shapes))


def activation(draw: Draw, dtypes: Sequence[str] = FLOATS, **limits: tuple[float, float]) -> Case:
    """With attributes, some left out, between the limits given for each."""
    x = draw.array(draw.shape(empty=True), draw.choice(dtypes), -8, 8)
    return Case([x], {name: draw.maybe(draw.number(*pair)) for name, pair in limits.items()})


def divisor_is_not_zero(case: Case) -> Case:
    divisor = case.inputs[1]
    assert isinstance(divisor, np.ndarray)
    if divisor.dtype.kind in "iu":
        divisor[divisor == 0] = 3
    return case


def div(draw: Draw) -> Case:
    return divisor_is_not_zero(binary(draw, (*NUMBERS, "int8", "uint8"), -9, 9))


def mod(draw: Draw) -> Case:
    fmod = draw.integer(0, 1)
    dtypes = (*NUMBERS, "int8", "uint8") if fmod else (*INTEGERS, "int8", "uint8")
    case = divisor_is_not_zero(binary(draw, dtypes, -9, 9))
    case.attributes = {"fmod": fmod or draw.maybe(0)}
    return case


def power(draw: Draw) -> Case:
    whole = draw.shape(empty=True)
    base, exponent = (
        draw.choice(("float32", "float64", *INTEGERS)),
        draw.choice(("float32", "float64", *INTEGERS)),
    )
    # Roots of negative numbers are NaN; an integer's would have to be converted from one.
    low = -4 if exponent in INTEGERS else 0
    x = draw.array(draw.broadcastable(whole), base, low, 4)
    y = draw.array(draw.broadcastable(whole), exponent, -3 if base.startswith("float") else 0, 3)
    if base in INTEGERS and exponent not in INTEGERS:
        y = np.round(y)  # a power that is nearly an integer is cut to one of two
    return Case([x, y], terms=4)


def prelu(draw: Draw) -> Case:
    shape, dtype = draw.shape(1, empty=True), draw.choice(("float32", "float64", "float16"))
    return Case([draw.array(shape, dtype), draw.array(draw.broadcastable(shape), dtype)])


def clip(draw: Draw) -> Case:
    dtype = draw.choice((*NUMBERS, "int8", "uint8"))
    low, high = (draw.maybe(draw.array((), dtype, 0, 4)) for _ in range(2))
    return Case([draw.array(draw.shape(empty=True), dtype, -5, 5), low, high], exact=True)


def bit_shift(draw: Draw) -> Case:
    case = binary(draw, ("uint8",), 0, 200)
    x, bits = case.inputs
    assert isinstance(bits, np.ndarray)
    return Case([x, bits % 8], {"direction": draw.choice(("LEFT", "RIGHT"))})


def where(draw: Draw) -> Case:
    whole, dtype = draw.shape(empty=True), draw.choice(("float32", "float64", *INTEGERS, "uint8"))
    condition = draw.array(draw.broadcastable(whole), "bool")
    return Case([condition, *(draw.array(draw.broadcastable(whole), dtype) for _ in range(2))], exact=True)


def is_infinite(draw: Draw) -> Case:
    x = draw.special(draw.array(draw.shape(empty=True), draw.choice(("float32", "float64"))))
    names = ("detect_negative", "detect_positive")
    return Case([x], {name: draw.maybe(draw.integer(0, 1)) for name in names})


def dropout(draw: Draw) -> Case:
    x = draw.array(draw.shape(), draw.choice(FLOATS))
    ratio = draw.maybe(np.array(draw.number(0, 0.9), "float32"))
    return Case([x, ratio, draw.maybe(np.array(False))], {"seed": draw.maybe(3)}, exact=True)


def cast(draw: Draw) -> Case:
    source, target = draw.choice(ANY), draw.choice((*ANY, "int16", "bfloat16"))
    x = draw.array(draw.shape(empty=True), source, 0 if target == "uint8" else -100, 100)
    if target.startswith(("float", "bool")):
        x = draw.special(x)
    element = getattr(onnx.TensorProto, ELEMENTS.get(target, target.upper()))
    return Case([x], {"to": element}, exact=True, widened=target == "bfloat16")


def cast_like(draw: Draw) -> Case:
    case = cast(draw)
    like = draw.array((2,), draw.choice(("float32", "float64", "int32", "bool", "float16")))
    x = case.inputs[0]
    assert isinstance(x, np.ndarray)
    return Case([np.nan_to_num(x, posinf=100, neginf=-100), like], exact=True)


def gelu(draw: Draw) -> Case:
    x = draw.array(draw.shape(empty=True), "float32", -6, 6)
    return Case([x], {"approximate": draw.maybe(draw.choice(("none", "tanh")))})


def shrink(draw: Draw) -> Case:
    x = draw.array(draw.shape(empty=True), draw.choice((*SINGLE, *INTEGERS, "int8", "uint8")))
    return Case([x], {name: draw.maybe(draw.number(-1, 2)) for name in ("lambd", "bias")})


def swish(draw: Draw) -> Case:
    """From opset 24 on."""
    return dataclasses.replace(activation(draw, alpha=(0.2, 2)), opset=24)


UNARY: dict[str, tuple[Sequence[str], float, float]] = {
    "Abs": ((*NUMBERS, "int8", "uint8"), -9, 9),
    "Acos": (FLOATS, -1, 1),
    "Acosh": (FLOATS, 1, 9),
    "Asin": (FLOATS, -1, 1),
    "Asinh": (FLOATS, -9, 9),
    "Atan": (FLOATS, -9, 9),
    "Atanh": (FLOATS, -0.95, 0.95),
    "BitwiseNot": (INTEGERS_OF_ANY_WIDTH, -99, 99),
    "Ceil": (FLOATS, -9, 9),
    "Cos": (FLOATS, -9, 9),
    "Cosh": (FLOATS, -4, 4),
    "Erf": (SINGLE, -4, 4),
    "Exp": (FLOATS, -9, 9),
    "Floor": (FLOATS, -9, 9),
    "HardSwish": (SINGLE, -5, 5),
    "IsNaN": (FLOATS, -5, 5),
    "Log": (FLOATS, 0.1, 9),
    "Mish": (FLOATS, -9, 9),
    "Neg": ((*NUMBERS, "int8"), -9, 9),
    "Not": (("bool",), 0, 1),
    "Reciprocal": (FLOATS, 0.2, 9),
    "Relu": (("float32", "float64", "float16", "int32", "int8"), -9, 9),
    "Round": (FLOATS, -9, 9),
    "Sigmoid": (FLOATS, -9, 9),
    "Sin": (FLOATS, -9, 9),
    "Sinh": (FLOATS, -4, 4),
    "Softplus": (FLOATS, -30, 30),
    "Softsign": (SINGLE, -9, 9),
    "Sqrt": (FLOATS, 0, 9),
    "Tan": (FLOATS, -1.4, 1.4),
    "Tanh": (FLOATS, -9, 9),
}
"""Element types and the range of the operand."""
BINARY: dict[str, Sequence[str]] = {
    "Add": (*NUMBERS, "int8", "uint8"),
    "And": ("bool",),
    "BitwiseAnd": INTEGERS_OF_ANY_WIDTH,
    "BitwiseOr": INTEGERS_OF_ANY_WIDTH,
    "BitwiseXor": INTEGERS_OF_ANY_WIDTH,
    "Equal": ANY,
    "Greater": (*NUMBERS, "int8", "uint8"),
    "GreaterOrEqual": (*NUMBERS, "int8", "uint8"),
    "Less": (*NUMBERS, "int8", "uint8"),
    "LessOrEqual": (*NUMBERS, "int8", "uint8"),
    "Mul": (*NUMBERS, "int8", "uint8"),
    "Or": ("bool",),
    "Sub": (*NUMBERS, "int8", "uint8"),
    "Xor": ("bool",),
}
VARIADIC: dict[str, Sequence[str]] = {
    "Max": (*NUMBERS, "int8", "uint8"),
    "Mean": SINGLE,
    "Min": (*NUMBERS, "int8", "uint8"),
    "Sum": FLOATS,
}

CASES: dict[str, Generator] = {
    **{
        name: functools.partial(unary, dtypes=t, low=low, high=high) for name, (t, low, high) in UNARY.items()
    },
    **{name: functools.partial(binary, dtypes=dtypes) for name, dtypes in BINARY.items()},
    **{name: functools.partial(variadic, dtypes=dtypes) for name, dtypes in VARIADIC.items()},
    "BitShift": bit_shift,
    "Cast": cast,
    "CastLike": cast_like,
    "Celu": functools.partial(activation, dtypes=["float32"], alpha=(0.2, 2)),
    "Clip": clip,
    "Div": div,
    "Dropout": dropout,
    "Elu": functools.partial(activation, alpha=(0.2, 2)),
    "Gelu": gelu,
    "HardSigmoid": functools.partial(activation, dtypes=SINGLE, alpha=(0.1, 1), beta=(0, 1)),
    "IsInf": is_infinite,
    "LeakyRelu": functools.partial(activation, dtypes=SINGLE, alpha=(-0.5, 1.5)),
    "Mod": mod,
    "PRelu": prelu,
    "Pow": power,
    "Selu": functools.partial(activation, alpha=(0.2, 2), gamma=(0.2, 2)),
    "Shrink": shrink,
    "Sign": sign,
    "Swish": swish,
    "ThresholdedRelu": functools.partial(activation, alpha=(-1, 2)),
    "Where": where,
}


@pytest.mark.parametrize("op_type", CASES)
def test_op_agrees_with_onnxruntime(op_type: str) -> None:
    agree(op_type, CASES[op_type])


def test_dropout_in_training_is_refused() -> None:
    x = np.ones(2, "float32")
    case = Case([x, None, np.array(True)], constants=(2,), variable=(0,))
    module = lower(ir.from_proto(model_of("Dropout", case, Draw(0))))
    with pytest.raises(TargetError, match="Dropout in training mode"):
        run(module, {"x0": x})
