"""SpQR: what it stores, what that stands for, and which weights it keeps."""

from __future__ import annotations

import numpy as np
import pytest
from planish.ir.errors import PipelineError
from planish.passes.quantize import Quantize
from planish.passes.quantize.algorithms import LayerStatistics
from planish.passes.quantize.algorithms.gptq import GPTQ
from planish.passes.quantize.algorithms.spqr import SpQR
from planish.passes.quantize.formats import number_format
from planish.passes.quantize.grid import Grid


def grid_of(bits=3, block_size=16, clip=True):
    return Grid(
        bits=bits, symmetric=False, block_size=block_size, scale_dtype=np.dtype(np.float16), clip=clip
    )


def problem(seed=0, rows=64, columns=40):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((400, rows)) @ (np.eye(rows) + rng.standard_normal((rows, rows)) / 8)
    weight = rng.standard_normal((rows, columns)).astype(np.float32) * np.float32(0.02)
    return weight, LayerStatistics(x.T @ x / len(x), np.zeros((rows, rows)), 400)


def no_remark(text):
    raise AssertionError(text)


@pytest.mark.parametrize("block_size", [0, 16])
def test_dequantized_follows_the_equations(block_size):
    weight, statistics = problem()
    found = SpQR()(weight, grid_of(block_size=block_size), statistics, no_remark)
    level, outliers = found.second_level, found.outliers
    blocks = 64 // (block_size or 64)
    assert level.scale_scale.shape == (blocks, 3)  # 40 columns, 16 to a grid
    scales, zeros = np.atleast_2d(found.scale), np.atleast_2d(found.zero_point)
    assert max(scales.max(), zeros.max()) < 8
    expected = np.empty((64, 40))
    for row in range(64):
        for column in range(40):
            block, part = row // (64 // blocks), column // 16
            scale = scales[block, column] - np.float64(level.scale_zero[block, part])
            scale *= np.float64(level.scale_scale[block, part])
            zero = zeros[block, column] - np.float64(level.zero_zero[block, part])
            zero *= np.float64(level.zero_scale[block, part])
            expected[row, column] = (found.integers[row, column] - zero) * scale
    expected.flat[outliers.positions] = outliers.values
    # float32 against float64; zero points up to 8 cancel.
    np.testing.assert_allclose(found.dequantized(), expected, atol=1e-6)


def test_bits_per_weight_counts_everything():
    weight, statistics = problem()
    found = SpQR(largest_share=0.01)(weight, grid_of(), statistics, no_remark)
    outliers = len(found.outliers.positions)
    assert 0 < outliers <= 25
    first_level = 2 * 3 * 4 * 40
    second_level = 4 * 16 * 4 * 3
    total = 3 * 64 * 40 + first_level + second_level + outliers * 32
    assert found.bits_per_weight() == total / (64 * 40)


def test_planted_outliers_are_found_and_kept():
    weight, _ = problem(1)
    # Uncorrelated inputs: nothing is added to a weight to make up for others.
    statistics = LayerStatistics(np.eye(64), np.zeros((64, 64)), 400)
    places = [(3, 7), (20, 0), (63, 39)]
    for row, column in places:
        weight[row, column] = 1.0 + row / 64
    found = SpQR(largest_share=0.002)(weight, grid_of(clip=False), statistics, no_remark)
    positions = [row * 40 + column for row, column in places]
    assert set(positions) <= set(found.outliers.positions.tolist())
    assert (np.diff(found.outliers.positions) > 0).all()
    expected = weight.astype(np.float16).ravel()[found.outliers.positions]
    np.testing.assert_array_equal(found.outliers.values, expected)


@pytest.mark.parametrize("share", [0.0, 0.004, 0.5])
def test_outliers_stay_within_their_share(share):
    weight, statistics = problem(2)
    found = SpQR(largest_share=share)(weight, grid_of(bits=2), statistics, no_remark)
    assert len(found.outliers.positions) <= share * weight.size
    strict = SpQR(largest_share=share, threshold=1e9)(weight, grid_of(bits=2), statistics, no_remark)
    assert len(strict.outliers.positions) == 0


def test_columns_come_apart_at_the_grids_of_scales():
    weight, statistics = problem(3, columns=48)
    found = SpQR()(weight, grid_of(), statistics, no_remark)
    whole = found.dequantized()
    for start, stop in ((0, 16), (16, 48), (32, 40)):
        np.testing.assert_array_equal(found.columns(start, stop).dequantized(), whole[:, start:stop])
    with pytest.raises(ValueError, match="expected a multiple of 16"):
        found.columns(8, 24)


def test_outliers_lower_the_error_and_bilevel_grids_the_size():
    weight, statistics = problem(4, rows=128, columns=64)

    def error(found):
        difference = found.dequantized() - weight
        return np.sum(difference * (statistics.covariance @ difference))

    grouped = GPTQ()(weight, grid_of(2), statistics, no_remark)
    bilevel = SpQR(largest_share=0)(weight, grid_of(2), statistics, no_remark)
    kept = SpQR(largest_share=0.02)(weight, grid_of(2), statistics, no_remark)
    assert bilevel.bits_per_weight() < grouped.bits_per_weight() - 0.4
    assert error(kept) < 0.9 * error(bilevel)


@pytest.mark.parametrize("scale", [0.0, 1e-7, 1e4])
def test_any_magnitude_stays_finite(scale):
    weight, statistics = problem(5)
    weight *= np.float32(scale)
    weight[16:32, 4] = 0
    found = SpQR(largest_share=0)(weight, grid_of(), statistics, no_remark)
    assert np.isfinite(found.dequantized()).all()
    # 3 bits: a step is a seventh of the range, about ±3.5 σ over 16 rows at most.
    assert np.linalg.norm(found.dequantized() - weight) <= 0.5 * np.linalg.norm(weight)


@pytest.mark.parametrize(
    "options",
    [{"scheme": "NF4"}, {"scheme": "W4A8"}, {"config_groups": {"a": {"scheme": "FP8A16", "targets": ["x"]}}}],
)
def test_spqr_of_other_schemes_is_refused_at_once(options):
    with pytest.raises(PipelineError, match="'spqr' needs integer weights and float activations"):
        Quantize(algorithm="spqr", **options)


def test_a_code_book_is_refused():
    weight, statistics = problem()
    with pytest.raises(ValueError, match="grid of integers"):
        SpQR()(weight, number_format("NF4", scale_dtype=np.dtype(np.float32)), statistics, no_remark)
