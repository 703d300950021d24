"""EoRA against the optimum that linear algebra promises."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from planish.passes.quantize.low_rank import low_rank_residual


def problem(seed, rows=24, columns=10, tokens=200, silent=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, rows)) @ rng.standard_normal((rows, rows))
    x[:, :silent] = 0
    weight = rng.standard_normal((rows, columns)).astype(np.float32)
    dequantized = (np.round(weight * 2) / 2).astype(np.float32)
    return x, weight, dequantized


@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize("silent", [0, 5])
def test_the_output_error_is_that_of_the_singular_values_left_out(rank, silent):
    x, weight, dequantized = problem(0, silent=silent)
    down, up = low_rank_residual(weight, dequantized, x.T @ x, rank)
    assert down.shape == (24, rank)
    assert up.shape == (rank, 10)
    found = np.linalg.norm(x @ (weight - dequantized - down.astype(np.float64) @ up))
    # No matrix of this rank comes closer to X(W − Ŵ) (Eckart and Young).
    optimum = np.linalg.norm(scipy.linalg.svdvals(x @ (weight.astype(np.float64) - dequantized))[rank:])
    np.testing.assert_allclose(found, optimum, rtol=1e-5)  # the factors are float32


def test_full_rank_restores_the_layer():
    x, weight, dequantized = problem(1)
    down, up = low_rank_residual(weight, dequantized, x.T @ x, 100)
    assert down.shape == (24, 10)
    np.testing.assert_allclose(dequantized + down @ up, weight, atol=1e-4)


def test_directions_without_energy_are_left_alone():
    x, weight, dequantized = problem(2, silent=5)
    down, up = low_rank_residual(weight, dequantized, x.T @ x, 4)
    assert np.isfinite(down).all()
    assert np.isfinite(up).all()
    np.testing.assert_allclose(down[:5], 0, atol=1e-6)


def test_inputs_without_any_energy_get_nothing():
    _, weight, dequantized = problem(3)
    down, up = low_rank_residual(weight, dequantized, np.zeros((24, 24)), 4)
    assert np.isfinite(down).all()
    np.testing.assert_array_equal(down @ up, np.zeros_like(weight))
