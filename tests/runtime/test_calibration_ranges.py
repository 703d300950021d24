"""Ranges of activations: against numpy on all the data at once, and however the data was cut into batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.ir.errors import InputError
from planish.runtime.calibration.ranges import (
    METHODS,
    ChannelMaxima,
    ChannelMeans,
    RangeCollector,
    asymmetric_grid,
    symmetric_scale,
)


def gaussian(count=50_000, seed=0, scale=1.0, shift=0.0):
    return (np.random.default_rng(seed).standard_normal(count) * scale + shift).astype(np.float32)


def collected(values, method, *, batches=1, **options):
    collector = RangeCollector(method, **options)
    for part in np.array_split(values, batches):
        collector.update(part.reshape(-1, 1))
    return collector.range()


def bin_width(values, bins=2048):
    """The histogram has more than ``bins`` bins over a range that holds zero."""
    return (max(values.max(), 0) - min(values.min(), 0)) / bins


def quantised(values, lowest, highest, bits=8, symmetric=False):
    """Rounding and clipping by the textbook, in float64."""
    x = values.astype(np.float64)
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = max(abs(lowest), abs(highest)) / top
        return np.clip(np.round(x / scale), -top - 1, top) * scale
    scale = (highest - lowest) / (2**bits - 1)
    zero = np.round(-lowest / scale)
    return (np.clip(np.round(x / scale) + zero, 0, 2**bits - 1) - zero) * scale


def squared_error(values, clip, **options):
    return float(((quantised(values, *clip, **options) - values) ** 2).mean())


def test_min_max_is_the_smallest_and_the_largest():
    values = gaussian(shift=0.3)
    assert collected(values, "min-max", batches=7) == (values.min(), values.max())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("values", "end"), [(np.abs(gaussian()) + 1, 0), (-np.abs(gaussian()) - 1, 1)], ids=["above", "below"]
)
def test_the_range_holds_zero(method, values, end):
    assert collected(values, method)[end] == 0


@pytest.mark.parametrize("percentile", [99.0, 99.9, 99.99, 100.0])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_percentiles_are_those_of_numpy_to_a_bin(percentile, shift):
    values = gaussian(200_000, shift=shift)
    outside = (100 - percentile) / 2
    expected = np.percentile(values, [outside, 100 - outside])
    expected = [min(expected[0], 0), max(expected[1], 0)]
    # Between neighbours in the tail, further apart than a bin, any value is as good a percentile.
    ordered = np.sort(values)
    gap = np.diff(ordered)[[*range(20), *range(-20, 0)]].max() if percentile > 99.9 else 0
    np.testing.assert_allclose(
        collected(values, "percentile", percentile=percentile, batches=9),
        expected,
        atol=bin_width(values) + gap,
        rtol=0,
    )


def test_percentiles_count_zeros():
    values = np.concatenate([np.zeros(900, np.float32), np.linspace(1, 2, 100, dtype=np.float32)])
    # 1 % is cut off at the upper end: a tenth of what is not zero.
    _, highest = collected(values, "percentile", percentile=98.0)
    assert highest == pytest.approx(np.percentile(values, 99), abs=float(bin_width(values)) + 1 / 99)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_mse_is_as_good_as_the_best_of_all_pairs_of_ends(bits, symmetric):
    values = np.concatenate([gaussian(20_000), gaussian(20, scale=8, shift=4)])
    found = collected(values, "mse", batches=5, bits=bits, symmetric=symmetric)
    fractions = np.linspace(0.1, 1, 25)
    pairs = [(f, f) for f in fractions] if symmetric else [(f, g) for f in fractions for g in fractions]
    options = {"bits": bits, "symmetric": symmetric}
    best = min(squared_error(values, (f * values.min(), g * values.max()), **options) for f, g in pairs)
    # The histogram knows a value to an eighth of a step of the finer grid or better, half of it either way:
    # (1/8)² / 12 of a step² against 1/12 for rounding.
    assert squared_error(values, found, **options) <= best * (1 + 1 / 64)
    assert squared_error(values, found, **options) < squared_error(
        values, (values.min(), values.max()), **options
    )


def divergence(values, clip, bins=2048, levels=128):
    """KL(P‖Q) of magnitudes, written from the talk's slides: loops, no smoothing."""
    counts, _ = np.histogram(np.abs(values), bins=bins, range=(0, np.abs(values).max()))
    p = counts[:clip].astype(float)
    p[-1] += counts[clip:].sum()
    q = np.zeros(clip)
    for level in range(levels):
        start, end = level * clip // levels, (level + 1) * clip // levels
        filled = [i for i in range(start, end) if counts[i]]
        for i in filled:
            q[i] = sum(counts[start:end]) / len(filled)
    p, q = p / p.sum(), q / q.sum()
    terms = [a * np.log(a / max(b, 1e-4 * p.max())) for a, b in zip(p, q, strict=True) if a]
    return sum(terms)


def test_entropy_clips_where_the_divergence_is_least():
    values = np.concatenate([gaussian(20_000), np.float32([20, -20, 25])])
    lowest, highest = collected(values, "entropy", symmetric=True, batches=3)
    assert lowest == -highest
    top = np.abs(values).max()
    clips = range(128, 2049, 16)
    divergences = [divergence(values, clip) for clip in clips]
    best = clips[int(np.argmin(divergences))] / 2048 * top
    # Other bins see another minimum of a flat function; the clip is a fifth of the range either way.
    at_found = divergence(values, round(highest / top * 2048))
    assert at_found <= min(divergences) + 0.1 * (max(divergences) - min(divergences))
    assert highest == pytest.approx(best, rel=0.25)
    assert highest < 0.5 * top


def test_entropy_keeps_a_uniform_distribution():
    values = np.random.default_rng(0).uniform(-1, 1, 200_000).astype(np.float32)
    lowest, highest = collected(values, "entropy")
    assert (lowest, highest) == pytest.approx((-1, 1), abs=0.02)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=200),
    st.integers(1, 9),
    st.sampled_from(METHODS),
    st.randoms(use_true_random=False),
)
def test_neither_order_nor_batches_matter(values, batches, method, random):
    shuffled = values.copy()
    random.shuffle(shuffled)
    whole = collected(np.float32(values), method)
    assert collected(np.float32(shuffled), method, batches=min(batches, len(values))) == whole


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_a_range_that_grows_a_thousandfold_needs_no_second_pass(method):
    small, large = gaussian(5000, scale=1e-3), gaussian(5000, seed=1)
    growing = RangeCollector(method)
    growing.update(small)
    growing.update(large)
    together = RangeCollector(method)
    together.update(np.concatenate([large, small]))
    assert growing.range() == together.range()


@pytest.mark.parametrize("method", METHODS)
def test_zeros_alone(method):
    lowest, highest = collected(np.zeros(10, np.float32), method)
    assert (lowest, highest) == (0, 0)
    assert asymmetric_grid(lowest, highest) == (1, 0)
    assert symmetric_scale(lowest, highest) == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [1e-30, 3e38, -1e-42])
def test_a_single_value_of_any_size(method, value):
    values = np.float32([value])
    assert collected(values, method) == pytest.approx((min(values[0], 0), max(values[0], 0)), rel=0.02)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(bad):
    rows = np.ones((3, 4), np.float32)
    rows[1, 2] = bad
    for collector in (
        RangeCollector(name="fc.input"),
        ChannelMaxima(4, "fc.input"),
        ChannelMeans(4, "fc.input"),
    ):
        with pytest.raises(InputError, match=r"'fc\.input' hold NaN or infinity"):
            collector.update(rows)


def test_no_value_at_all():
    collector = RangeCollector(name="fc.input")
    collector.update(np.zeros((0, 4), np.float32))
    with pytest.raises(InputError, match=r"no value of fc\.input was seen"):
        collector.range()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "median"}, "expected one of"),
        ({"percentile": 50}, "more than 50"),
        ({"percentile": 101}, "at most 100"),
        ({"bins": 100}, "256 points"),
    ],
)
def test_settings_out_of_bounds(options, message):
    with pytest.raises(ValueError, match=message):
        RangeCollector(**options)


@settings(max_examples=50, deadline=None)
@given(st.floats(-1e6, 0), st.floats(0, 1e6), st.integers(2, 8))
def test_grids_hold_zero_and_both_ends(lowest, highest, bits):
    scale, zero = asymmetric_grid(lowest, highest, bits)
    assert 0 <= zero <= 2**bits - 1
    # Rounding the zero point moves both ends by half a step at most.
    assert (0 - zero) * scale <= lowest + 0.5001 * scale
    assert (2**bits - 1 - zero) * scale >= highest - 0.5001 * scale
    top = symmetric_scale(lowest, highest, bits) * (2 ** (bits - 1) - 1)
    assert top == pytest.approx(max(-lowest, highest)) or max(-lowest, highest) < 1e-35


def test_channel_statistics_are_those_of_all_rows():
    rows = gaussian(6000).reshape(-1, 6) * np.float32([1, 10, 0.1, 0, 3, 1])
    maxima, means = ChannelMaxima(6), ChannelMeans(6)
    for part in np.array_split(rows, 11):
        maxima.update(part)
        means.update(part)
    np.testing.assert_array_equal(maxima.maxima, np.abs(rows).max(0))
    np.testing.assert_allclose(means.means, np.abs(rows.astype(np.float64)).mean(0), rtol=1e-12)
    assert means.tokens == 1000


def test_channel_statistics_of_no_rows_are_zero():
    maxima, means = ChannelMaxima(3), ChannelMeans(3)
    maxima.update(np.zeros((0, 3), np.float32))
    means.update(np.zeros((0, 3), np.float32))
    assert maxima.maxima.tolist() == means.means.tolist() == [0, 0, 0]
