"""Attention and rotary position embedding against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from op_cases import Array, Case, Draw, Generator, agree
from planish.codegen.torch_fx import OPS


def attention(draw: Draw) -> Case:
    """In either layout, with groups of heads, a mask, a cache and each of the four second results."""
    kv_heads, batch, queries, keys = draw.integers(4, 1, 3)
    heads, size, value_size = kv_heads * draw.integer(1, 3), draw.integer(1, 4) * 2, draw.integer(1, 5)
    packed, cached, causal = draw.flag(), draw.flag(0.4), draw.flag(0.4)
    keys, past = (queries, draw.integer(1, 3)) if cached or causal else (keys, 0)
    past = past if cached else 0
    shapes = [(heads, queries, size), (kv_heads, keys, size), (kv_heads, keys, value_size)]
    operands: list[Array | None] = [draw.array([batch, *shape]) for shape in shapes]
    attributes: dict[str, Any] = {
        "is_causal": 1 if causal else draw.maybe(0),
        "scale": draw.maybe(draw.number(0.1, 1)),
        "softcap": draw.maybe(draw.number(0.5, 5)),
        "softmax_precision": draw.maybe(1),
        "qk_matmul_output_mode": draw.maybe(draw.integer(0, 3)),
    }
    if packed:
        operands = [
            np.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(batch, x.shape[2], -1) for x in operands
        ]
        attributes |= {"q_num_heads": heads, "kv_num_heads": kv_heads}
    operands.append(mask(draw, (batch, heads, queries, past + keys), causal=causal))
    if cached:
        operands += [draw.array([batch, kv_heads, past, width]) for width in (size, value_size)]
    # Onnxruntime adds the least float32 where the op adds −∞, which its last result shows.
    reference = attributes["qk_matmul_output_mode"] == 2
    return Case(operands, attributes, outputs=4, terms=8, reference=reference)


def mask(draw: Draw, shape: tuple[int, ...], *, causal: bool) -> Array | None:
    """Added or boolean, for all heads or one by one; every query sees the first key."""
    if draw.flag(0.4):
        return None
    kept = draw.integer(2, 4)
    shape = tuple(1 if draw.flag(0.3) and axis < 2 else size for axis, size in enumerate(shape))[4 - kept :]
    if draw.flag():
        return draw.array(shape)
    seen = draw.array(shape, "bool")
    seen[..., 0] = True
    return seen


def rotary_embedding(draw: Draw) -> Case:
    batch, heads, length, half = draw.integers(4, 1, 4)
    size = 2 * half + 2 * draw.integer(0, 2)
    positions = draw.array([batch, length], "int64", 0, 6) if draw.flag() else None
    angles = draw.array([7, half] if positions is not None else [batch, length, half])
    attributes: dict[str, Any] = {
        "interleaved": draw.maybe(draw.integer(0, 1)),
        "rotary_embedding_dim": 2 * half if 2 * half < size else draw.maybe(0),
    }
    if draw.flag():
        shape = [batch, heads, length, size]
    else:
        shape, attributes["num_heads"] = [batch, length, heads * size], heads
    return Case([draw.array(shape), np.cos(angles), np.sin(angles), positions], attributes, terms=2)


CASES: dict[str, Generator] = {"Attention": attention, "RotaryEmbedding": rotary_embedding}


@pytest.mark.parametrize("op_type", CASES)
def test_op_agrees_with_onnxruntime(op_type: str) -> None:
    agree(op_type, CASES[op_type], count=60)


def fully_hidden(draw: Draw) -> Case:
    """A query that sees nothing, which gives zeros."""
    case = attention(draw)
    operands = list(case.inputs)
    x = operands[0]
    assert isinstance(x, np.ndarray)
    queries = x.shape[1] if x.ndim == 3 else x.shape[2]
    past, keys = operands[4] if len(operands) > 4 else None, operands[1]
    assert isinstance(keys, np.ndarray)
    count = (keys.shape[1] if keys.ndim == 3 else keys.shape[2]) + (0 if past is None else past.shape[2])
    hidden = np.ones((queries, count), bool)
    hidden[draw.integer(0, queries - 1)] = False
    operands[3] = hidden
    return Case(operands, case.attributes, outputs=4, terms=8, reference=case.reference)


def test_queries_that_see_nothing_give_zeros() -> None:
    agree("Attention", fully_hidden)


def test_the_gradient_of_a_query_that_sees_nothing_is_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, 4, 3, 4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)
    )
    seen = torch.ones(3, 3, dtype=torch.bool).tril()
    seen[1] = False

    def result(*operands: torch.Tensor) -> torch.Tensor:
        return OPS["", "Attention"].function(*operands, seen, softcap=1.5)[0]

    assert torch.autograd.gradcheck(result, (query, key, value))
    result(query, key, value).sum().backward()
    assert query.grad is not None
    assert not query.grad[:, :, 1].any()
