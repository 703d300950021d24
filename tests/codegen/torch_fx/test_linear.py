"""Products and determinants of matrices against onnxruntime."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from op_cases import Case, Draw, Generator, agree

EQUATIONS = (
    "ij,jk->ik",
    "ij,jk",
    "bij,bjk->bik",
    "bhqd,bhkd->bhqk",
    "i,j->ij",
    "ii->i",
    "ij->ji",
    "ij->",
    "ij,ij->i",
    "...ij,...jk->...ik",
    "i...->...i",
    "bi,oij,bj->bo",
    "bqhd , bkhd -> bhqk",
    "Ab,bA->A",
)


def matmul(draw: Draw) -> Case:
    inner, dtype = draw.integer(1, 6), draw.choice(("float32", "float64", "float16", "int32", "int64"))
    batch = draw.shape(0, 2)
    left = [inner] if draw.flag(0.2) else [*draw.broadcastable(batch), draw.integer(1, 5), inner]
    right = [inner] if draw.flag(0.2) else [*draw.broadcastable(batch), inner, draw.integer(1, 5)]
    return Case([draw.array(left, dtype), draw.array(right, dtype)], terms=math.sqrt(inner))


def gemm(draw: Draw) -> Case:
    m, k, n = draw.integers(3, 1, 6)
    trans_a, trans_b = draw.integers(2, 0, 1)
    dtype = draw.choice(("float32", "float64", "float16"))
    a = draw.array([k, m] if trans_a else [m, k], dtype)
    b = draw.array([n, k] if trans_b else [k, n], dtype)
    c = draw.maybe(draw.array(draw.broadcastable([m, n]), dtype))
    attributes: dict[str, Any] = {"transA": trans_a or draw.maybe(0), "transB": trans_b or draw.maybe(0)}
    attributes |= {"alpha": draw.maybe(draw.number(-2, 2)), "beta": draw.maybe(draw.number(-2, 2))}
    return Case([a, b, c], attributes, terms=2 * math.sqrt(k))


def einsum(draw: Draw) -> Case:
    """Sizes by letter; an ellipsis stands for two dimensions, of which one is broadcast."""
    equation = draw.choice(EQUATIONS)
    sizes = {letter: draw.integer(1, 4) for letter in equation if letter.isalpha()}
    dtype, batch = draw.choice(("float32", "float64", "int32", "int64")), draw.shape(2, 2)
    operands = []
    for term in equation.partition("->")[0].replace(" ", "").split(","):
        shape = [sizes[letter] for letter in term if letter.isalpha()]
        if "..." in term:
            place = term.index("...")
            shape[place:place] = [1 if draw.flag(0.3) else size for size in batch]
        operands.append(draw.array(shape, dtype))
    return Case(operands, {"equation": equation}, terms=4)


def determinant(draw: Draw) -> Case:
    size = draw.integer(1, 4)
    x = draw.array([*draw.shape(0, 2), size, size], draw.choice(("float32", "float64")), -1, 1)
    return Case([x + np.eye(size, dtype=x.dtype)], terms=16)


CASES: dict[str, Generator] = {"Det": determinant, "Einsum": einsum, "Gemm": gemm, "MatMul": matmul}


@pytest.mark.parametrize("op_type", CASES)
def test_op_agrees_with_onnxruntime(op_type: str) -> None:
    agree(op_type, CASES[op_type])
