"""GPTQ against the published column-by-column algorithm; what its extensions guarantee."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.passes.quantize.algorithms import ALGORITHMS, LayerStatistics, algorithm
from planish.passes.quantize.algorithms.curvature import curvature
from planish.passes.quantize.algorithms.gptaq import GPTAQ
from planish.passes.quantize.algorithms.gptq import GPTQ
from planish.passes.quantize.algorithms.rtn import round_to_nearest
from planish.passes.quantize.grid import PAIR_LIMIT, Grid


def grid_of(bits=4, symmetric=True, block_size=0, dtype=np.float32, **options):
    return Grid(bits=bits, symmetric=symmetric, block_size=block_size, scale_dtype=np.dtype(dtype), **options)


def correlated_inputs(rng, features, tokens=400):
    mixing = rng.standard_normal((features, features)) / np.sqrt(features)
    return (
        rng.standard_normal((tokens, features)) @ (np.eye(features) + mixing) * rng.uniform(0.2, 3, features)
    )


def problem(seed, rows=48, columns=7):
    rng = np.random.default_rng(seed)
    x = correlated_inputs(rng, rows)
    return rng.standard_normal((rows, columns)).astype(np.float32), statistics_of(x.T @ x / len(x))


def statistics_of(covariance, prefix_error=None):
    return LayerStatistics(np.asarray(covariance, np.float64), prefix_error, 400)


def no_remark(text):
    raise AssertionError(text)


def weighted_error(weight, quantized, covariance):
    error = (quantized.dequantized() - weight).astype(np.float64)
    return np.einsum("kn,kn->n", error, covariance @ error)


# The published algorithm, one column of W [out, in] after the other, with its own grids.


def reference_grid(values, bits, symmetric):
    lowest, highest = values.min(axis=1).astype(np.float32), values.max(axis=1).astype(np.float32)
    if symmetric:
        return np.maximum(-lowest, highest) / np.float32(2 ** (bits - 1) - 1), np.zeros_like(lowest)
    lowest, highest = np.minimum(lowest, 0), np.maximum(highest, 0)
    scale = (highest - lowest) / np.float32(2**bits - 1)
    return scale, np.clip(np.round(-lowest / scale), 0, 2**bits - 1)


def reference_gptq(weight, covariance, *, bits, symmetric, group, act_order, damp=0.01):
    """Integers, scales and zero points in [out, in]; ``weight`` is [out, in] too."""
    w, (outputs, inputs) = weight.astype(np.float64), weight.shape
    group = group or inputs
    h = covariance + damp * np.mean(np.diag(covariance)) * np.eye(inputs)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    static = [reference_grid(w[:, g : g + group], bits, symmetric) for g in range(0, inputs, group)]
    permutation = np.argsort(-np.diag(covariance), kind="stable") if act_order else np.arange(inputs)
    w, h = w[:, permutation], h[permutation][:, permutation]
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    integers = np.empty((outputs, inputs))
    grids = list(static)
    for j in range(inputs):
        if not act_order and j % group == 0:
            grids[j // group] = reference_grid(w[:, j : j + group], bits, symmetric)
        scale, zero = grids[permutation[j] // group]
        q = np.clip(np.round(w[:, j] / scale) + zero, low, high)
        error = (w[:, j] - (q - zero) * scale.astype(np.float64)) / u[j, j]
        w[:, j:] -= np.outer(error, u[j, j:])
        integers[:, permutation[j]] = q
    return integers, np.stack([g[0] for g in grids], 1), np.stack([g[1] for g in grids], 1)


@pytest.mark.parametrize("block_size", [5, 128])
@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("act_order", [True, False], ids=["act-order", "natural"])
@pytest.mark.parametrize(("bits", "seed"), [(2, 0), (3, 1), (4, 2), (8, 3)])
def test_the_integers_are_those_of_the_published_algorithm(
    bits, seed, act_order, symmetric, group, block_size
):
    weight, statistics = problem(seed)
    gptq = GPTQ(act_order=act_order, block_size=block_size, sweeps=0)
    found = gptq(weight, grid_of(bits, symmetric, group), statistics, no_remark)
    integers, scale, zero = reference_gptq(
        weight.T, statistics.covariance, bits=bits, symmetric=symmetric, group=group, act_order=act_order
    )
    np.testing.assert_array_equal(found.integers, integers.T)
    # Updated rows are rounded to float32 before a grid is fitted to them: one unit in the last place.
    np.testing.assert_allclose(np.atleast_2d(found.scale), scale.T, rtol=2e-7)
    if not symmetric:
        np.testing.assert_array_equal(np.atleast_2d(found.zero_point), zero.T)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("clip", [True, False])
def test_weights_on_the_grid_come_back_bit_identical(act_order, clip):
    rng = np.random.default_rng(0)
    integers = rng.integers(-127, 128, (64, 9))
    integers[0] = 127
    scale = rng.uniform(0.01, 0.1, 9).astype(np.float16).astype(np.float32)
    weight = (integers * scale).astype(np.float32)
    _, statistics = problem(1, rows=64)
    found = GPTQ(act_order=act_order)(weight, grid_of(8, dtype=np.float16, clip=clip), statistics, no_remark)
    np.testing.assert_array_equal(found.integers, integers)
    np.testing.assert_array_equal(found.dequantized(), weight)


def test_uncorrelated_inputs_leave_nothing_to_make_up_for():
    weight, _ = problem(2)
    statistics = statistics_of(np.diag(np.random.default_rng(0).uniform(0.1, 4, len(weight))))
    found = GPTQ()(weight, grid_of(3), statistics, no_remark)
    np.testing.assert_array_equal(found.integers, round_to_nearest(weight, grid_of(3)).integers)


def test_damping_grows_until_cholesky_succeeds():
    weight, statistics = problem(3)
    energies, directions = np.linalg.eigh(statistics.covariance)
    energies[0] = -0.05 * energies.mean()
    remarks = []
    indefinite = statistics_of(directions * energies @ directions.T)
    found = GPTQ(damp=0.001)(weight, grid_of(), indefinite, remarks.append)
    assert remarks == ["its inputs' covariance needed damping 0.1 instead of 0.001"]
    assert (found.integers != round_to_nearest(weight, grid_of()).integers).any()


@pytest.mark.parametrize("name", ["gptq", "gptaq", "spqr"])
def test_a_covariance_that_no_damping_helps_is_remarked_and_the_layer_rounded(name):
    weight, statistics = problem(4)
    remarks = []
    broken = statistics_of(-statistics.covariance, np.zeros_like(statistics.covariance))
    grid = grid_of(symmetric=name != "spqr")
    found = algorithm(name, act_order=True, damp=0.01)(weight, grid, broken, remarks.append)
    assert len(remarks) == 1
    assert remarks[0].startswith("rounded to nearest")
    if name == "spqr":
        assert found.outliers is None
        assert np.linalg.norm(found.dequantized() - weight) < 0.2 * np.linalg.norm(weight)
    else:
        np.testing.assert_array_equal(found.integers, round_to_nearest(weight, grid).integers)


def test_a_covariance_that_is_not_finite_is_remarked_too():
    weight, statistics = problem(4)
    statistics.covariance[3, 5] = statistics.covariance[5, 3] = np.nan
    remarks = []
    GPTQ()(weight, grid_of(), statistics, remarks.append)
    assert len(remarks) == 1


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("sweeps", [0, 2])
def test_dead_rows_are_rounded_to_nearest_and_change_nothing_else(act_order, sweeps):
    weight, statistics = problem(5)
    dead = [0, 17, 40]
    living = np.setdiff1d(np.arange(len(weight)), dead)
    weight[living[0]] = 5 * np.abs(weight).max(axis=0)
    covariance = statistics.covariance.copy()
    covariance[dead] = covariance[:, dead] = 0
    gptq = GPTQ(act_order=act_order, sweeps=sweeps)
    found = gptq(weight, grid_of(), statistics_of(covariance), no_remark)
    np.testing.assert_array_equal(found.integers[dead], round_to_nearest(weight, grid_of()).integers[dead])
    alone = gptq(weight[living], grid_of(), statistics_of(covariance[living][:, living]), no_remark)
    np.testing.assert_array_equal(found.integers[living], alone.integers)


def test_inputs_that_were_all_zero_round_the_layer_to_nearest():
    weight, _ = problem(6)
    found = GPTQ()(weight, grid_of(), statistics_of(np.zeros((48, 48))), no_remark)
    np.testing.assert_array_equal(found.integers, round_to_nearest(weight, grid_of()).integers)


@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("act_order", [True, False])
def test_columns_are_independent_across_slabs(group, act_order):
    rng = np.random.default_rng(7)
    weight = rng.standard_normal((32, 1030)).astype(np.float32)
    _, statistics = problem(7, rows=32)
    gptq, grid = GPTQ(act_order=act_order), grid_of(3, False, group, clip=True)
    whole = gptq(weight, grid, statistics, no_remark)
    part = gptq(np.ascontiguousarray(weight[:, 1020:]), grid, statistics, no_remark)
    np.testing.assert_array_equal(whole.columns(1020, 1030).integers, part.integers)
    np.testing.assert_array_equal(whole.columns(1020, 1030).scale, part.scale)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([2, 3, 4]),
    st.booleans(),
    st.sampled_from([0, 16, 48]),
    st.booleans(),
    st.integers(1, 4),
)
def test_a_sweep_never_raises_the_error(seed, bits, symmetric, group, clip, sweeps):
    weight, statistics = problem(seed)
    grid = grid_of(bits, symmetric, group, clip=clip)
    damped = statistics.covariance + 0.01 * np.diag(statistics.covariance).mean() * np.eye(len(weight))
    before = weighted_error(weight, GPTQ(sweeps=sweeps - 1)(weight, grid, statistics, no_remark), damped)
    after = weighted_error(weight, GPTQ(sweeps=sweeps)(weight, grid, statistics, no_remark), damped)
    # dequantized() is float32, the descent float64.
    assert (after <= before * (1 + 1e-4) + 1e-6).all()


def test_every_layer_of_a_small_sample_gets_better_with_each_step():
    for seed in range(5):
        weight, statistics = problem(seed, rows=64, columns=32)
        grid = grid_of(3, False, 16, clip=True)

        def error(quantized, weight=weight, statistics=statistics):
            return weighted_error(weight, quantized, statistics.covariance).sum()

        rounded = error(round_to_nearest(weight, grid))
        looped = error(GPTQ(sweeps=0)(weight, grid, statistics, no_remark))
        descended = error(GPTQ()(weight, grid, statistics, no_remark))
        assert descended < 0.95 * looped < 0.95 * rounded


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 40), st.booleans(), st.integers(0, 2), st.booleans())
def test_pairs_stay_within_16_bits(seed, rows, act_order, sweeps, clip):
    weight, statistics = problem(seed, rows=rows)
    # Large neighbours of one sign, so that the limit is met.
    weight = np.abs(weight) + 2
    gptq = GPTQ(act_order=act_order, sweeps=sweeps)
    found = gptq(weight, grid_of(8, limit_pairs=True, clip=clip), statistics, no_remark)
    integers = found.integers.astype(int)[: rows // 2 * 2]
    even, odd = integers[0::2], integers[1::2]
    assert (np.maximum(even, 0) + np.maximum(odd, 0)).max() <= PAIR_LIMIT
    assert (np.minimum(even, 0) + np.minimum(odd, 0)).min() >= -PAIR_LIMIT


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"rtn"}))
def test_statistics_that_are_missing_or_of_another_layer_are_an_error(name):
    weight, statistics = problem(8)
    run = algorithm(name, act_order=True, damp=0.01)
    grid = grid_of(symmetric=False)
    with pytest.raises(ValueError, match="covariance of the layer's inputs, found none"):
        run(weight, grid, None, no_remark)
    with pytest.raises(ValueError, match="covariance of 32 features"):
        run(weight[:32], grid, statistics, no_remark)


def test_settings_reach_the_algorithms_that_have_them():
    assert algorithm("gptq", act_order=False, damp=0.1) == GPTQ(act_order=False, damp=0.1)
    assert algorithm("rtn", act_order=False, damp=0.1) == ALGORITHMS["rtn"]()


# GPTAQ


def reference_gptaq(weight, dense, quantized, scale, *, bits, alpha):
    """From the objective: the rows behind take over a row's rounding error and mismatch by least squares."""
    w, rows = weight.astype(np.float64), len(weight)
    integers = np.empty_like(w)
    for i in range(rows):
        integers[i] = np.clip(np.round(w[i] / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        rounding = np.outer(quantized[:, i], w[i] - integers[i] * scale.astype(np.float64))
        mismatch = np.outer(dense[:, i] - quantized[:, i], weight[i].astype(np.float64))
        if i + 1 < rows:
            behind = quantized[:, i + 1 :]
            w[i + 1 :] += np.linalg.lstsq(behind, rounding + alpha * mismatch, rcond=None)[0]
    return integers


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_gptaq_follows_from_its_objective(seed, alpha):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((24, 5)).astype(np.float32)
    dense = correlated_inputs(rng, 24)
    quantized = dense + 0.3 * rng.standard_normal(dense.shape)
    statistics = statistics_of(
        quantized.T @ quantized / len(dense), (dense - quantized).T @ quantized / len(dense)
    )
    gptaq = GPTAQ(alpha=alpha, only_behind=True, damp=0, act_order=False, sweeps=0)
    found = gptaq(weight, grid_of(4), statistics, no_remark)
    expected = reference_gptaq(weight, dense, quantized, found.scale, bits=4, alpha=alpha)
    np.testing.assert_array_equal(found.integers, expected)


def test_the_whole_correction_is_the_least_squares_solution():
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((24, 5)).astype(np.float32)
    dense = correlated_inputs(rng, 24)
    quantized = dense + 0.3 * rng.standard_normal(dense.shape)
    statistics = statistics_of(
        quantized.T @ quantized / len(dense), (dense - quantized).T @ quantized / len(dense)
    )
    best = np.linalg.lstsq(quantized, dense @ weight.astype(np.float64), rcond=None)[0]
    for act_order in (True, False):
        found = curvature(statistics, 24, damp=0, act_order=act_order, remark=no_remark)
        np.testing.assert_allclose(GPTAQ().target(weight, statistics, found), best, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("act_order", [True, False])
def test_gptaq_without_prefix_error_in_the_data_is_gptq(act_order):
    weight, statistics = problem(9)
    no_error = statistics_of(statistics.covariance, np.zeros_like(statistics.covariance))
    found = GPTAQ(act_order=act_order)(weight, grid_of(3), no_error, no_remark)
    expected = GPTQ(act_order=act_order)(weight, grid_of(3), statistics, no_remark)
    np.testing.assert_array_equal(found.integers, expected.integers)


def test_gptaq_needs_the_prefix_error():
    weight, statistics = problem(9)
    with pytest.raises(ValueError, match="error of the layer's inputs"):
        GPTAQ()(weight, grid_of(3), statistics, no_remark)


def test_gptaq_comes_closer_to_the_dense_output():
    rng = np.random.default_rng(10)
    weight = rng.standard_normal((48, 16)).astype(np.float32)
    dense = correlated_inputs(rng, 48)
    quantized = dense + 0.5 * dense @ rng.standard_normal((48, 48)) / 7
    statistics = statistics_of(
        quantized.T @ quantized / len(dense), (dense - quantized).T @ quantized / len(dense)
    )

    def error(gptq):
        found = gptq(weight, grid_of(4), statistics, no_remark).dequantized()
        return np.linalg.norm(quantized @ found - dense @ weight)

    assert error(GPTAQ()) < 0.9 * error(GPTAQ(only_behind=True)) < 0.9 * error(GPTQ())
