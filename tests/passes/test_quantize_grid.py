"""Grids: the definitions in numbers, and properties that hold for every weight."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from planish.passes.quantize.algorithms.rtn import round_to_nearest
from planish.passes.quantize.grid import PAIR_LIMIT, Grid


def grid_of(bits=4, symmetric=True, block_size=0, dtype=np.float32, **options):
    return Grid(bits=bits, symmetric=symmetric, block_size=block_size, scale_dtype=np.dtype(dtype), **options)


def column(*values):
    return np.array(values, np.float32)[:, None]


def test_the_symmetric_grid_is_max_over_7():
    result = round_to_nearest(column(-14, 7, 1.1, 0), grid_of())
    assert result.scale.tolist() == [2]
    assert result.integers.ravel().tolist() == [-7, 4, 1, 0]
    assert result.zero_point is None


def test_the_asymmetric_grid_covers_lowest_to_highest():
    result = round_to_nearest(column(-5, 10, 0, 3), grid_of(symmetric=False))
    assert result.scale.tolist() == [1]
    assert result.zero_point.tolist() == [5]
    assert result.integers.ravel().tolist() == [0, 15, 5, 8]


def test_blocks_have_their_own_scales():
    weight = np.concatenate([np.ones((16, 2)), 7 * np.ones((16, 2))]).astype(np.float32)
    result = round_to_nearest(weight, grid_of(block_size=16))
    np.testing.assert_allclose(result.scale, [[1 / 7, 1 / 7], [1, 1]], rtol=1e-6)
    np.testing.assert_allclose(result.dequantized(), weight, rtol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zeros(symmetric):
    result = round_to_nearest(np.zeros((16, 3), np.float32), grid_of(symmetric=symmetric))
    assert (result.dequantized() == 0).all()
    assert (result.scale == 1).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_integers_are_rounded_to_the_stored_scale(dtype):
    weight = np.random.default_rng(0).standard_normal((64, 5)).astype(np.float32)
    result = round_to_nearest(weight, grid_of(bits=8, dtype=dtype))
    expected = np.clip(np.rint(weight / result.scale.astype(np.float32)), -128, 127)
    np.testing.assert_array_equal(result.integers, expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_tiny_weights_get_a_scale_that_is_not_zero(dtype):
    result = round_to_nearest(np.full((16, 1), 1e-30, np.float32), grid_of(bits=8, dtype=dtype))
    assert (result.scale > 0).all()
    assert np.isfinite(result.dequantized()).all()


weights = arrays(
    np.float32,
    st.tuples(st.sampled_from([16, 32]), st.integers(1, 4)),
    elements=st.floats(-100, 100, width=32),
)


@settings(max_examples=60, deadline=None)
@given(weights, st.integers(2, 8), st.booleans(), st.sampled_from([0, 16]))
def test_every_weight_is_within_half_a_step(weight, bits, symmetric, block_size):
    grid = grid_of(bits=bits, symmetric=symmetric, block_size=block_size)
    result = round_to_nearest(weight, grid)
    assert result.integers.min() >= grid.lowest
    assert result.integers.max() <= grid.highest
    steps = np.repeat(
        np.atleast_2d(result.scale), weight.shape[0] // np.atleast_2d(result.scale).shape[0], axis=0
    )
    # Asymmetric: rounding the zero point may move an end of the range by half a step more.
    reach = 0.5 if symmetric else 1.0
    assert (np.abs(result.dequantized() - weight) <= steps * reach + 1e-5 * np.abs(weight).max()).all()


@settings(max_examples=40, deadline=None)
@given(weights, st.integers(2, 8), st.booleans())
def test_clipping_never_makes_a_block_worse(weight, bits, symmetric):
    def error(clip):
        result = round_to_nearest(weight, grid_of(bits=bits, symmetric=symmetric, block_size=16, clip=clip))
        return (
            ((result.dequantized() - weight).astype(np.float64) ** 2).reshape(-1, 16, weight.shape[1]).sum(1)
        )

    # Sums of squares in float32 decide; they carry 16 roundings.
    assert (error(True) <= error(False) * (1 + 1e-5) + 1e-9).all()


def test_clipping_helps_where_one_weight_sticks_out():
    weight = np.random.default_rng(1).standard_normal((128, 8)).astype(np.float32)
    weight[0] = 8

    def error(clip):
        result = round_to_nearest(weight, grid_of(bits=3, block_size=128, clip=clip))
        return np.linalg.norm(result.dequantized() - weight)

    assert error(True) < 0.9 * error(False)


odd_or_even = arrays(
    np.float32, st.tuples(st.integers(1, 33), st.integers(1, 4)), elements=st.floats(-100, 100, width=32)
)


@settings(max_examples=60, deadline=None)
@given(odd_or_even)
def test_pairs_never_leave_16_bits(weight):
    integers = round_to_nearest(weight, grid_of(bits=8, limit_pairs=True)).integers.astype(int)
    if len(integers) % 2:
        integers = np.concatenate([integers, np.zeros_like(integers[:1])])
    even, odd = integers[0::2], integers[1::2]
    # The largest and the smallest sum of two products with activations in [0, 255].
    assert (255 * (np.maximum(even, 0) + np.maximum(odd, 0))).max() <= 2**15 - 1
    assert (255 * (np.minimum(even, 0) + np.minimum(odd, 0))).min() >= -(2**15)


def test_pairs_cost_less_than_seven_bits():
    weight = np.random.default_rng(2).standard_normal((384, 64)).astype(np.float32)

    def error(grid):
        return np.linalg.norm(round_to_nearest(weight, grid).dequantized() - weight)

    full, limited, seven = (
        error(grid) for grid in (grid_of(bits=8), grid_of(bits=8, limit_pairs=True), grid_of(bits=7))
    )
    assert full < limited < 0.75 * seven


def test_pairs_of_opposite_sign_are_not_limited():
    weight = np.tile(column(1, -1), (8, 1))
    result = round_to_nearest(weight, grid_of(bits=8, limit_pairs=True))
    assert set(result.integers.ravel().tolist()) == {127, -127}
    same = round_to_nearest(np.abs(weight), grid_of(bits=8, limit_pairs=True))
    assert set(same.integers.ravel().tolist()) == {PAIR_LIMIT // 2}
    np.testing.assert_allclose(same.dequantized(), np.abs(weight), rtol=1e-6)
