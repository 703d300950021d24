"""Gathering, scattering and searching against onnxruntime."""

from __future__ import annotations

import math

import numpy as np
import pytest
from op_cases import ANY, INTEGERS, Case, Draw, Generator, agree

MOVED = ("float32", "float64", "int32", "int64", "uint8", "bool")

ONE_HOT_TYPES = (
    ("int64", "int64", "int64"),
    ("int64", "int64", "float32"),
    ("int32", "int32", "float32"),
    ("float32", "float32", "float32"),
    ("float32", "int64", "int64"),
)
"""Indices, depth and values, as onnxruntime has kernels for them."""


def gather(draw: Draw) -> Case:
    shape = draw.shape(1)
    axis = draw.axis(len(shape))
    indices = draw.array(draw.shape(0, 2, empty=True), draw.choice(INTEGERS), -shape[axis], shape[axis] - 1)
    return Case([draw.array(shape, draw.choice(ANY)), indices], {"axis": axis or draw.maybe(0)}, exact=True)


def gather_elements(draw: Draw) -> Case:
    shape = draw.shape(1)
    axis = draw.axis(len(shape))
    wanted = [draw.integer(1, size) for size in shape]
    wanted[axis] = draw.integer(0, 6)
    indices = draw.array(wanted, draw.choice(INTEGERS), -shape[axis], shape[axis] - 1)
    return Case([draw.array(shape, draw.choice(ANY)), indices], {"axis": axis or draw.maybe(0)}, exact=True)


def tuples(draw: Draw, shape: tuple[int, ...], batch_dims: int, depth: int) -> np.ndarray:
    """Places in x, of which no two are the same."""
    sizes = shape[batch_dims : batch_dims + depth]
    count = draw.integer(1, math.prod(sizes))
    batches = [
        np.stack(np.unravel_index(draw.rng.permutation(math.prod(sizes))[:count], sizes), axis=-1)
        for _ in range(math.prod(shape[:batch_dims]))
    ]
    places = np.stack(batches).reshape(*shape[:batch_dims], count, depth)
    return np.where(draw.rng.random(places.shape) < 0.3, places - sizes, places)


def gather_nd(draw: Draw) -> Case:
    shape = draw.shape(1)
    batch_dims = draw.integer(0, len(shape) - 1)
    places = tuples(draw, shape, batch_dims, draw.integer(1, len(shape) - batch_dims))
    attributes = {"batch_dims": batch_dims or draw.maybe(0)}
    return Case([draw.array(shape, draw.choice(MOVED)), places], attributes, exact=True)


def scatter_nd(draw: Draw) -> Case:
    shape, reduction = draw.shape(1), draw.choice((None, "none", "add", "mul", "max", "min"))
    dtype = draw.choice(MOVED if reduction in (None, "none") else ("float32", "int32", "int64"))
    depth = draw.integer(1, len(shape))
    places = tuples(draw, shape, 0, depth)
    if reduction not in (None, "none"):
        places = np.concatenate([places, places[:1]])  # a place twice
    updates = draw.array([len(places), *shape[depth:]], dtype)
    return Case([draw.array(shape, dtype), places, updates], {"reduction": reduction})


def scatter_elements(draw: Draw) -> Case:
    shape, reduction = draw.shape(1), draw.choice((None, "none", "add", "mul", "max", "min"))
    dtype = draw.choice(MOVED if reduction in (None, "none") else ("float32", "int32", "int64"))
    axis = draw.axis(len(shape))
    chosen = [draw.integer(1, size) for size in shape]
    # Different places along the axis: the order of random numbers, cut short.
    places = draw.rng.random(shape).argsort(axis)[tuple(slice(size) for size in chosen)]
    if reduction not in (None, "none"):
        places = np.where(draw.rng.random(places.shape) < 0.2, 0, places)  # some twice
    places = np.where(draw.rng.random(places.shape) < 0.3, places - shape[axis], places)
    updates = draw.array(places.shape, dtype)
    attributes = {"axis": axis or draw.maybe(0), "reduction": reduction}
    return Case([draw.array(shape, dtype), places.astype(draw.choice(INTEGERS)), updates], attributes)


def one_hot(draw: Draw) -> Case:
    classes, shape = draw.integer(1, 6), draw.shape(1, 3, empty=True)
    types = draw.choice(ONE_HOT_TYPES)
    indices = draw.array(shape, types[0], -classes - 2, classes + 1)
    depth, values = np.array(classes, types[1]), draw.array([2], types[2])
    axis = draw.integer(-len(shape) - 1, len(shape))
    return Case([np.trunc(indices), depth.reshape(draw.choice(((), (1,)))), values], {"axis": axis})


def nonzero(draw: Draw) -> Case:
    x = draw.array(
        draw.shape(1, empty=True), draw.choice(("float32", "int32", "int64", "uint8", "bool")), 0, 2
    )
    return Case([np.where(draw.rng.random(x.shape) < 0.5, x, np.zeros_like(x))])


def compress(draw: Draw) -> Case:
    shape = draw.shape(1)
    axis = draw.maybe(draw.axis(len(shape)))
    length = draw.integer(1, math.prod(shape) if axis is None else shape[axis])
    return Case(
        [draw.array(shape, draw.choice(MOVED)), draw.array([length], "bool")], {"axis": axis}, exact=True
    )


def reverse_sequence(draw: Draw) -> Case:
    shape, batch_axis = draw.shape(2), draw.integer(0, 1)
    lengths = draw.array([shape[batch_axis]], "int64", 1, shape[1 - batch_axis])
    attributes = {"batch_axis": batch_axis, "time_axis": 1 - batch_axis}
    attributes = {} if batch_axis == 1 and draw.flag() else attributes
    return Case([draw.array(shape, draw.choice(MOVED)), lengths], attributes, exact=True)


def top_k(draw: Draw) -> Case:
    """Often of few different numbers: the first of equals comes first."""
    shape = draw.shape(1)
    axis = draw.axis(len(shape))
    x = draw.array(shape, draw.choice(("float32", "float64", *INTEGERS)))
    x = np.round(x) if draw.flag(0.7) else x
    attributes = {
        "axis": axis if axis not in (-1, len(shape) - 1) else draw.maybe(axis),
        "largest": draw.maybe(draw.integer(0, 1)),
        "sorted": draw.maybe(1),
    }
    return Case([x, draw.vector([draw.integer(0, shape[axis])])], attributes, outputs=2, exact=True)


CASES: dict[str, Generator] = {
    "Compress": compress,
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "NonZero": nonzero,
    "OneHot": one_hot,
    "ReverseSequence": reverse_sequence,
    "ScatterElements": scatter_elements,
    "ScatterND": scatter_nd,
    "TopK": top_k,
}


@pytest.mark.parametrize("op_type", CASES)
def test_op_agrees_with_onnxruntime(op_type: str) -> None:
    agree(op_type, CASES[op_type])
