"""Code books and 8-bit floats: their points, their scales, and that rounding finds the nearest point."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from planish.passes.quantize.algorithms import ALGORITHMS, LayerStatistics
from planish.passes.quantize.algorithms.rtn import round_to_nearest
from planish.passes.quantize.formats import FORMATS, float4_levels, normal_float_levels, number_format
from planish.passes.quantize.grid import Grid

K, N = 64, 5


def format_of(name, dtype=np.float32, **options):
    return number_format(name, scale_dtype=np.dtype(dtype), **options)


def random_weight(seed=0, rows=K, columns=N):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def no_remark(text):
    raise AssertionError(text)


def test_normal_float_levels_are_the_published_ones():
    # QLoRA, appendix E, to the digits that two roundings of the quantiles agree in.
    published = [-1, -0.69619, -0.52507, -0.39492, -0.28444, -0.18477, -0.09105, 0]
    published += [0.07958, 0.16093, 0.24611, 0.33792, 0.44071, 0.56262, 0.72296, 1]
    np.testing.assert_allclose(normal_float_levels(), published, atol=1e-5)


def test_float4_levels_are_in_the_order_of_their_bits():
    expected = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(float4_levels(), expected)


@pytest.mark.parametrize(
    ("name", "bits", "blocks", "dtype"),
    [
        ("NF4", 4, 1, np.float16),
        ("FP4", 4, 1, np.float16),
        ("MXFP4", 4, 2, ml_dtypes.float8_e8m0fnu),
        ("NVFP4", 4, 4, ml_dtypes.float8_e4m3fn),
        ("FP8", 8, None, np.float16),
    ],
)
def test_what_is_stored(name, bits, blocks, dtype):
    found = round_to_nearest(random_weight(), format_of(name, np.float16))
    assert found.bits == bits
    assert found.scale.shape == ((N,) if blocks is None else (blocks, N))
    assert found.scale.dtype == dtype
    assert found.zero_point is None
    if name == "FP8":
        assert found.integers.dtype == ml_dtypes.float8_e4m3fn
        assert found.codebook is None
        assert found.bits_per_weight() == 8 + 16 / K
    else:
        assert found.integers.dtype == np.uint8
        assert found.integers.max() < 16
        assert found.codebook.shape == (16,)
        scale_bits = 8 * np.dtype(dtype).itemsize
        assert found.bits_per_weight() == 4 + scale_bits * blocks / K + 16 * 32 / (K * N)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("clip", [False, True])
def test_each_weight_goes_to_the_nearest_point_of_its_scale(name, clip):
    weight = random_weight(1)
    found = round_to_nearest(weight, format_of(name, clip=clip))
    if name == "FP8":
        points = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        points = points[np.isfinite(points)]
    else:
        points = found.codebook
    scale = np.atleast_2d(found.scale).astype(np.float32)
    scale = np.repeat(scale, K // len(scale), axis=0)
    distances = np.abs(points * scale[..., None] - weight[..., None])
    # Distances are float32: two points may be equally near up to their rounding.
    chosen = np.abs(found.dequantized() - weight)
    assert (chosen <= distances.min(axis=-1) + 1e-6).all()


def test_the_largest_weight_is_met_by_the_largest_point():
    weight = random_weight(2)
    for name in ("NF4", "FP4", "FP8"):
        found = round_to_nearest(weight, format_of(name)).dequantized()
        rows, columns = np.abs(weight).argmax(axis=0), np.arange(N)
        np.testing.assert_allclose(found[rows, columns], weight[rows, columns], rtol=1e-6)


@pytest.mark.parametrize(
    ("largest", "scale"), [(6.0, 1.0), (7.9, 1.0), (4.0, 1.0), (3.9, 0.5), (8.0, 2.0), (0.02, 2.0**-8)]
)
def test_mxfp4_scales_are_powers_of_two_by_the_rule_of_its_specification(largest, scale):
    # 2^(⌊log2 largest⌋ − 2), 2 being the exponent of E2M1's largest number.
    weight = np.zeros((32, 1), np.float32)
    weight[3] = -largest
    found = round_to_nearest(weight, format_of("MXFP4"))
    assert found.scale.astype(np.float32).item() == scale
    assert found.dequantized()[3, 0] == -min(6 * scale, np.float32(largest)) or largest != 6.0


def test_nvfp4_scales_use_the_whole_range_of_e4m3():
    weight = random_weight(3)
    found = round_to_nearest(weight, format_of("NVFP4"))
    assert found.scale.astype(np.float32).max() == 448
    np.testing.assert_allclose(found.codebook.max() * 448, np.abs(weight).max(), rtol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros(name):
    found = round_to_nearest(np.zeros((K, N), np.float32), format_of(name))
    assert (found.dequantized() == 0).all()
    assert np.isfinite(found.scale.astype(np.float32)).all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_what_was_quantised_comes_back_bit_identical(name, algorithm):
    rng = np.random.default_rng(4)
    x = rng.standard_normal((200, K)) @ rng.standard_normal((K, K))
    statistics = LayerStatistics(x.T @ x, None, 200)
    once = round_to_nearest(random_weight(4), format_of(name, np.float16)).dequantized()
    again = ALGORITHMS[algorithm]()(once, format_of(name, np.float16), statistics, no_remark)
    if name == "NVFP4":
        # The tensor's scale is found by a division that need not give back the float32 it was.
        np.testing.assert_allclose(again.dequantized(), once, rtol=3e-7)
    else:
        np.testing.assert_array_equal(again.dequantized(), once)


weights = arrays(np.float32, (K, 2), elements=st.floats(-100, 100, width=32))


@settings(max_examples=20, deadline=None)
@given(weights, st.sampled_from(FORMATS))
def test_clipping_never_makes_a_layer_worse(weight, name):
    def error(clip):
        found = round_to_nearest(weight, format_of(name, clip=clip))
        return np.square(found.dequantized().astype(np.float64) - weight).sum()

    # Sums of squares in float32 decide.
    assert error(True) <= error(False) * (1 + 1e-4) + 1e-9


@pytest.mark.parametrize("name", FORMATS)
def test_gptq_takes_every_format(name):
    rng = np.random.default_rng(5)
    x = rng.standard_normal((300, K)) @ (np.eye(K) + rng.standard_normal((K, K)) / 8)
    covariance = x.T @ x / len(x)
    weight = random_weight(5, columns=16)

    def error(algorithm):
        found = ALGORITHMS[algorithm]()(
            weight, format_of(name), LayerStatistics(covariance, None, 300), no_remark
        )
        difference = found.dequantized() - weight
        return np.sum(difference * (covariance @ difference))

    assert error("gptq") < 0.8 * error("rtn")


def test_awq_clip_takes_the_range_that_errs_least_in_the_output():
    rng = np.random.default_rng(6)
    weight = random_weight(6, rows=32, columns=3)
    weight[5] *= 4
    x = rng.standard_normal((100, 32)) @ rng.standard_normal((32, 32))
    covariance = x.T @ x / len(x)
    grid = Grid(bits=3, symmetric=True, block_size=16, scale_dtype=np.dtype(np.float32))
    found = ALGORITHMS["awq-clip"]()(weight, grid, LayerStatistics(covariance, None, 100), no_remark)
    for block, column in itertools.product(range(2), range(3)):
        rows = slice(16 * block, 16 * block + 16)
        values, part = weight[rows, column].astype(np.float64), covariance[rows, rows]
        costs = {}
        for step in range(21):
            scale = np.abs(values).max() * (1 - 0.5 * step / 20) / 3
            error = np.clip(np.round(values / scale), -4, 3) * scale - values
            costs[scale] = error @ part @ error
        np.testing.assert_allclose(found.scale[block, column], min(costs, key=costs.get), rtol=1e-5)


def test_names_and_block_sizes_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="'INT3' is not known"):
        format_of("INT3")
    with pytest.raises(ValueError, match="MXFP4 has groups of 32, found 64"):
        format_of("MXFP4", block_size=64)
