"""The parts that random networks are made of, each in the spellings that exporters and people use.

A block takes a tensor and gives one of the same meaning: tokens [batch, sequence, features], images
[batch, channels, height, width], or rows [batch, features]. Numbers stay of the order of one. Further blocks
are in `random_layers`, `random_attention` and `random_images`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper
from random_attention import attention
from random_graphs import FUNCTIONS, GraphMaker, Tensor
from random_images import batch_norm
from random_layers import activation, linear, multilayer, norm, scalar

Block = Callable[[GraphMaker, Tensor], Tensor]

# Moving tokens and features around.


def shuffle(m: GraphMaker, x: Tensor) -> Tensor:
    """Moves numbers without changing their meaning much: slices, concatenations, gathers, transposes."""
    return m.pick(_rolled, _permuted, _halves_swapped, _turned_twice, _shifted_tokens, _reversed)(m, x)


def _rolled(m: GraphMaker, x: Tensor) -> Tensor:
    cut = int(m.rng.integers(1, x.size))
    first, second = m.split(x, (cut, x.size - cut))
    return m.op("Concat", second, first, dims=x.dims, axis=m.pick(-1, len(x.dims) - 1))


def _permuted(m: GraphMaker, x: Tensor) -> Tensor:
    order = m.constant(m.rng.permutation(x.size).astype(np.int64), "order")
    return m.op("Gather", x, order, axis=m.pick(-1, len(x.dims) - 1))


def _halves_swapped(m: GraphMaker, x: Tensor) -> Tensor:
    if x.size % 2:
        return _rolled(m, x)
    pairs = m.reshape(x, (*x.dims[:-1], 2, x.size // 2))
    order = list(range(len(x.dims) + 1))
    order[-1], order[-2] = order[-2], order[-1]
    return m.reshape(m.transpose(pairs, *order), x.dims)


def _turned_twice(m: GraphMaker, x: Tensor) -> Tensor:
    order = [0, *range(len(x.dims) - 1, 0, -1)]
    turned = m.transpose(x, *order)
    return m.transpose(m.pick(activation, lambda m, x: x)(m, turned), *order)


def _shifted_tokens(m: GraphMaker, x: Tensor) -> Tensor:
    """Each token gets a part of the one before it."""
    if len(x.dims) != 3 or x.dims[1] != "sequence" or "has_cache" in m.memory:
        return _rolled(m, x)
    pads = m.constant(np.array([0, 1, 0, 0, -1, 0], np.int64), "pads")
    before = m.op("Pad", x, pads)
    return m.op("Add", x, m.op("Mul", before, scalar(m, 0.5), dims=x.dims))


def _reversed(m: GraphMaker, x: Tensor) -> Tensor:
    low = int(np.iinfo(np.int64).min)
    numbers = ([-1], [low + 1], [len(x.dims) - 1], [-1])
    bounds = [m.constant(np.array(number, np.int64), "bound") for number in numbers]
    return m.op("Slice", x, *bounds)


def mixing(m: GraphMaker, x: Tensor) -> Tensor:
    """A convolution over tokens, or their mean."""
    with m.scope("mixing"):
        if m.chance(0.5):
            weight = m.weight(x.size, 1, 3, spread=0.5)
            turned = m.transpose(x, 0, 2, 1)
            mixed = m.op("Conv", turned, weight, pads=[1, 1], kernel_shape=[3], group=x.size)
            return m.transpose(mixed, 0, 2, 1)
        return m.op("Add", *m.either(x, m.reduce("Mean", x, 1)), dims=x.dims)


def no_op(m: GraphMaker, x: Tensor) -> Tensor:
    """Something that does nothing."""
    match m.pick(
        "identity", "dropout", "cast", "times one", "plus zero", "reshape", "concat", "pow", "slice"
    ):
        case "identity":
            return m.op("Identity", x)
        case "dropout":
            return m.op("Dropout", x)
        case "cast":
            return m.cast(x, x.dtype)
        case "times one":
            return m.op("Mul", x, m.constant(np.ones(m.pick((), (1,), (x.size,)), np.float32), "ones"))
        case "plus zero":
            return m.op("Add", x, m.constant(np.zeros(m.pick((), (1,), (x.size,)), np.float32), "zeros"))
        case "reshape":
            return m.reshape(x, x.dims)
        case "concat":
            return m.op("Concat", x, axis=-1)
        case "pow":
            return m.op("Pow", x, scalar(m, 1.0), dims=x.dims)
    return m.slice(x, len(x.dims) - 1, 0, x.size)


def in_half(m: GraphMaker, x: Tensor) -> Tensor:
    """A part that is computed in float16."""
    half = m.cast(x, TensorProto.FLOAT16)
    scale = m.constant(np.float16(0.5), "scale")
    y = m.op("Mul", m.op(m.pick("Tanh", "Relu", "Sigmoid"), half), scale)
    if m.chance(0.5):
        array = (m.rng.standard_normal((x.size, x.size)) / np.sqrt(x.size)).astype(np.float16)
        y = m.op("MatMul", y, m.constant(array, "weight"))
    m.memory["has_half"] = True
    return m.cast(y, TensorProto.FLOAT)


def dead(m: GraphMaker, x: Tensor) -> Tensor:
    """Computes what nobody reads."""
    m.op("Exp", linear(m, x, 8, name="unused"))
    m.weight(3, name="unused")
    return x


def hidden_output(m: GraphMaker, x: Tensor) -> Tensor:
    """What is here is an output of the model, too."""
    m.outputs.append(m.op("Identity", x) if m.chance(0.5) else x)
    return x


# Control flow and functions.


def branches(m: GraphMaker, x: Tensor) -> Tensor:
    """An If whose condition is a constant, or follows from a shape."""
    if m.chance(0.4):
        condition = m.constant(np.array(m.chance(0.5)), "condition")
    else:
        length = m.op("Squeeze", m.dim(x, 0), m.constant(np.array([0], np.int64), "axes"), dims=())
        bound = m.constant(np.array(2, np.int64), "bound")
        condition = m.op(m.pick("Less", "Greater"), length, bound, dtype=TensorProto.BOOL)
    bodies = [_subgraph(m, x, f"branch_{index}") for index in range(2)]
    return m.op("If", condition, dims=x.dims, dtype=x.dtype, then_branch=bodies[0], else_branch=bodies[1])


def _subgraph(m: GraphMaker, x: Tensor, name: str) -> onnx.GraphProto:
    """A graph without inputs that reads ``x`` from outside."""
    with m.scope(name), m.body() as nodes:
        y = m.pick(_simple, activation, no_op)(m, x)
        if y == x:
            y = m.op("Identity", x)
    return helper.make_graph(nodes, m.new_name(name), [], [_typed(y)])


def _simple(m: GraphMaker, x: Tensor) -> Tensor:
    return activation(m, linear(m, x, x.size))


def _typed(tensor: Tensor) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, tensor.dtype, list(tensor.dims))


def loop(m: GraphMaker, x: Tensor) -> Tensor:
    """The same layer two or three times."""
    count = m.constant(np.array(m.pick(1, 2, 3), np.int64), "count")
    go_on = m.constant(np.array(True), "go_on")
    with m.scope("loop"), m.body() as nodes:
        number = Tensor(m.new_name("number"), (), TensorProto.INT64)
        before = Tensor(m.new_name("before"), (), TensorProto.BOOL)
        state = Tensor(m.new_name("state"), x.dims)
        after = m.op("Identity", before)
        result = m.op("Tanh", m.op("Add", linear(m, state, x.size), x, dims=x.dims))
    inputs, outputs = (number, before, state), (after, result)
    body = helper.make_graph(
        nodes, m.new_name("body"), [_typed(t) for t in inputs], [_typed(t) for t in outputs]
    )
    return m.op("Loop", count, go_on, x, dims=x.dims, dtype=x.dtype, body=body)


def function(m: GraphMaker, x: Tensor) -> Tensor:
    """A call of a function of the model: the same layer at one or two places."""
    known: dict[tuple[int, int], str] = m.memory.setdefault("functions", {})
    key = (x.size, len(x.dims))
    if key not in known:
        known[key] = f"Layer_{len(known)}"
        with m.body(of_function=True) as nodes:
            given = Tensor("given", x.dims)
            result = m.pick(_simple, norm, multilayer)(m, given)
        proto = helper.make_function(
            FUNCTIONS, known[key], ["given"], [result.name], nodes, [helper.make_opsetid("", m.opset)]
        )
        m.functions.append(proto)
    return m.op(known[key], x, domain=FUNCTIONS)


# Rows.


def row_block(m: GraphMaker, x: Tensor) -> Tensor:
    """A layer with a norm of its batch or of its features."""
    with m.scope("layer"):
        y = linear(m, x, m.pick(8, 12, 16, 24, 32))
        y = m.pick(batch_norm, norm, activation, lambda m, y: y)(m, y)
        return activation(m, y) if m.chance(0.5) else y


def row_products(m: GraphMaker, x: Tensor) -> Tensor:
    """Features that gate each other, or are weighed by a softmax."""
    with m.scope("gating"):
        if m.chance(0.5):
            weights = m.op("Softmax", linear(m, x, x.size, name="weights"), axis=m.pick(-1, 1))
            return m.op("Mul", *m.either(x, m.op("Mul", weights, scalar(m, float(x.size)), dims=x.dims)))
        parts = [linear(m, x, x.size // 2 + 1, name=f"part_{index}") for index in range(2)]
        return m.op("Concat", *parts, dims=(x.dims[0], 2 * (x.size // 2 + 1)), axis=1)


# Residual blocks.


def residual(m: GraphMaker, x: Tensor) -> Tensor:
    """x + f(norm(x)), or norm(x + f(x))."""
    parts: tuple[Block, ...] = (multilayer, multilayer)
    if len(x.dims) == 3:
        # What is cached are keys and values: nothing else may look at other tokens then.
        parts += (attention, attention, attention, attention if "has_cache" in m.memory else mixing)
    part = m.pick(*parts)
    if m.chance(0.75):
        return m.op("Add", *m.either(x, part(m, norm(m, x))))
    return norm(m, m.op("Add", *m.either(x, part(m, x))))
