"""Sequences against onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from op_cases import Array, Case, Draw, Generator, agree

MOVED = ("float32", "float64", "int32", "int64", "bool")


def sequence(draw: Draw, *, alike: bool = False) -> list[Array]:
    rank, dtype = draw.integer(1, 3), draw.choice(MOVED)
    shape = draw.shape(rank, rank)
    return [draw.array(shape if alike else draw.shape(rank, rank), dtype) for _ in range(draw.integer(1, 4))]


def position(draw: Draw, low: int, high: int) -> Array:
    return np.array(draw.integer(low, high), draw.choice(("int32", "int64")))


def split_to_sequence(draw: Draw) -> Case:
    shape = draw.shape(1)
    axis = draw.axis(len(shape))
    length, kind = shape[axis], draw.choice(("none", "one", "many"))
    sizes: Array | None = None
    attributes = {"axis": axis or draw.maybe(0)}
    if kind == "none":
        attributes["keepdims"] = draw.maybe(draw.integer(0, 1))
    elif kind == "one":
        sizes = position(draw, 1, length)
    else:
        cuts = sorted(draw.integers(draw.integer(0, 3), 0, length))
        sizes = draw.vector(np.diff([0, *cuts, length]).tolist(), ("int32", "int64"))
    return Case([draw.array(shape, draw.choice(MOVED)), sizes], attributes, exact=True)


def sequence_at(draw: Draw) -> Case:
    items = sequence(draw)
    return Case([items, position(draw, -len(items), len(items) - 1)], exact=True)


def sequence_construct(draw: Draw) -> Case:
    return Case(sequence(draw), exact=True)


def sequence_empty(draw: Draw) -> Case:
    return Case([], {"dtype": draw.maybe(draw.choice((onnx.TensorProto.FLOAT, onnx.TensorProto.INT64)))})


def sequence_insert(draw: Draw) -> Case:
    items = sequence(draw)
    new = draw.array(draw.shape(1, 3), items[0].dtype.name)
    return Case([items, new, draw.maybe(position(draw, -len(items), len(items)))], exact=True)


def sequence_erase(draw: Draw) -> Case:
    items = [*sequence(draw), np.zeros(1)][: draw.integer(1, 4)]
    items = [item.astype(items[0].dtype) for item in items]
    return Case([items, draw.maybe(position(draw, -len(items), len(items) - 1))], exact=True)


def sequence_length(draw: Draw) -> Case:
    return Case([sequence(draw)])


def concat_from_sequence(draw: Draw) -> Case:
    items = sequence(draw, alike=True)
    new = draw.integer(0, 1)
    attributes = {"axis": draw.axis(items[0].ndim + new), "new_axis": new or draw.maybe(0)}
    return Case([items], attributes, exact=True)


CASES: dict[str, Generator] = {
    "ConcatFromSequence": concat_from_sequence,
    "SequenceAt": sequence_at,
    "SequenceConstruct": sequence_construct,
    "SequenceEmpty": sequence_empty,
    "SequenceErase": sequence_erase,
    "SequenceInsert": sequence_insert,
    "SequenceLength": sequence_length,
    "SplitToSequence": split_to_sequence,
}


@pytest.mark.parametrize("op_type", CASES)
def test_op_agrees_with_onnxruntime(op_type: str) -> None:
    agree(op_type, CASES[op_type])
