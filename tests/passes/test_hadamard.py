"""Hadamard matrices: H·Hᵀ = n·I in integers, for every way of constructing them; rotations are orthogonal."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.ir.errors import PassError
from planish.passes.rotate.hadamard import (
    hadamard_matrix,
    is_constructible,
    kronecker_factors,
    kronecker_hadamard,
    largest_block,
    rotation,
)
from planish.passes.rotate.paley import is_paley, paley, prime_power, quadratic_characters
from planish.passes.rotate.williamson import williamson

# One rounding per addition: products of ±1 entries are exact, 1/√n and sums of up to a few thousand are not.
ORTHOGONAL = 1e-12


def assert_hadamard(matrix, n):
    assert matrix.shape == (n, n)
    assert matrix.dtype == np.int8
    assert set(np.unique(matrix)) <= {-1, 1}
    np.testing.assert_array_equal(matrix.astype(np.int64) @ matrix.T.astype(np.int64), n * np.eye(n))


# The constructions here reach all multiples of 4 up to 256 but 188 (Turyn) and 236 (Baumert and Hall).
ORDERS = [1, 2, *(n for n in range(4, 257, 4) if n not in (188, 236))]


@pytest.mark.parametrize("n", ORDERS)
def test_rows_are_orthogonal_in_integers(n):
    assert is_constructible(n)
    assert_hadamard(hadamard_matrix(n), n)


# Paley I over a prime; over 3³; Paley II over a prime; over 3², 5² and 7²; Paley times Sylvester.
@pytest.mark.parametrize("n", [44, 28, 76, 20, 52, 100, 704])
def test_paley(n):
    assert_hadamard(hadamard_matrix(n), n)
    assert is_paley(n) == (n != 704)


@pytest.mark.parametrize(("n", "prime", "degree"), [(28, 3, 3), (244, 3, 5), (344, 7, 3)])
def test_paley_over_prime_powers_of_the_first_kind(n, prime, degree):
    assert prime_power(n - 1) == (prime, degree)
    assert_hadamard(paley(n), n)


@pytest.mark.parametrize("m", [3, 5, 7, 9, 13, 15, 23, 29, 39, 43])
def test_williamson(m):
    assert_hadamard(williamson(4 * m), 4 * m)


# m = 35 is the smallest without four symmetric circulants (Ðoković, 1993); 8 and 6 are not 4m with m odd.
@pytest.mark.parametrize("order", [4, 140, 8, 6, 4 * 45])
def test_where_the_search_finds_nothing(order):
    assert williamson(order) is None


@pytest.mark.parametrize(("prime", "degree"), [(3, 1), (43, 1), (3, 2), (5, 2), (3, 4), (7, 2)])
def test_half_of_the_field_is_squares_and_the_character_is_multiplicative_on_the_prime_field(prime, degree):
    characters = quadratic_characters(prime, degree)
    assert len(characters) == prime**degree
    assert characters[0] == 0
    assert characters.sum() == 0
    squares = {a * a % prime for a in range(1, prime)}
    for a in range(1, prime):
        # In an extension of even degree every number of the prime field is a square.
        assert characters[a] == (1 if degree % 2 == 0 or a in squares else -1)


@pytest.mark.parametrize(
    ("number", "expected"), [(1, None), (2, (2, 1)), (9, (3, 2)), (12, None), (343, (7, 3)), (97, (97, 1))]
)
def test_prime_powers(number, expected):
    assert prime_power(number) == expected


# The widths of feed-forward layers and hidden states of published models that are not powers of two.
SIZES = [384, 704, 768, 896, 1152, 1280, 1536, 2304, 2560, 2816, 3072, 3584, 4864, 5120, 5632, 6144, 6912]
SIZES += [8960, 9216, 9728, 10240, 11008, 12288, 13824, 14336, 15360, 17408, 17920, 18432, 18944, 20480]


@pytest.mark.parametrize("n", SIZES)
def test_sizes_of_real_models_are_covered(n):
    factors = kronecker_factors(n)
    assert math.prod(factors) == n
    for order in set(factors):
        assert_hadamard(hadamard_matrix(order), order)


def test_factors_are_as_balanced_as_they_can_be():
    assert kronecker_factors(4096) == (64, 64)
    assert kronecker_factors(4096, 3) == (16, 16, 16)
    assert kronecker_factors(704) == (44, 16)
    assert kronecker_factors(18944) == (148, 128)
    assert kronecker_factors(12) == (12,)
    assert kronecker_factors(1) == (1,)
    assert kronecker_factors(64, 1) == (64,)


@pytest.mark.parametrize("n", [0, -4, 3, 6, 18, 188])
def test_orders_without_a_matrix(n):
    assert not is_constructible(n)
    with pytest.raises(PassError, match=f"no Hadamard matrix of order {n} is known"):
        hadamard_matrix(n)
    with pytest.raises(PassError, match=f"no Hadamard matrix of order {n} is known"):
        kronecker_factors(n)


def test_the_cached_matrix_cannot_be_changed():
    matrix = hadamard_matrix(12)
    assert hadamard_matrix(12) is matrix
    with pytest.raises(ValueError, match="read-only"):
        matrix[0, 0] = -1


@pytest.mark.parametrize("kind", ["hadamard", "random-hadamard", "random-matrix"])
@pytest.mark.parametrize("n", [2, 12, 64, 188, 448])
def test_rotations_are_orthogonal(n, kind):
    result = rotation(n, kind, np.random.default_rng(0))
    assert result.matrix.dtype == np.float64
    assert np.abs(result.matrix @ result.matrix.T - np.eye(n)).max() < ORTHOGONAL
    in_blocks = n == 188 and kind != "random-matrix"
    assert (result.remark is not None) == in_blocks
    if in_blocks:
        assert "47 blocks of 4 features" in result.remark
        assert not result.matrix[:4, 4:].any()


def test_a_rotation_is_drawn_from_the_generator():
    def drawn(kind, seed):
        return rotation(16, kind, np.random.default_rng(seed)).matrix

    for kind in ("random-hadamard", "random-matrix"):
        np.testing.assert_array_equal(drawn(kind, 0), drawn(kind, 0))
        assert np.abs(drawn(kind, 0) - drawn(kind, 1)).max() > 0.1
    np.testing.assert_array_equal(drawn("hadamard", 0), drawn("hadamard", 1))


def test_random_signs_change_how_large_the_rotated_entries_are():
    x = np.ones(64)  # along the first row of H: without signs, one entry gets everything
    plain = x @ rotation(64, "hadamard", np.random.default_rng(0)).matrix
    signed = x @ rotation(64, "random-hadamard", np.random.default_rng(0)).matrix
    assert np.abs(plain).max() == pytest.approx(8)
    assert np.abs(signed).max() < 4


def test_odd_sizes_have_no_hadamard_rotation():
    with pytest.raises(PassError, match="7 features have no Hadamard rotation"):
        rotation(7, "hadamard", np.random.default_rng(0))


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 60).map(lambda half: 2 * half),
    count=st.integers(1, 3),
    inverse=st.booleans(),
    axis=st.integers(0, 2),
    data=st.data(),
)
def test_applying_the_factors_is_the_product_with_the_matrix(n, count, inverse, axis, data):
    transform = kronecker_hadamard(n, count)
    assert transform.block_size == largest_block(n)
    dense = np.eye(1)
    for factor in transform.factors:
        dense = np.kron(dense, factor)
    dense = np.kron(np.eye(n // len(dense)), dense) / math.sqrt(len(dense))
    shape = [data.draw(st.integers(1, 3)) for _ in range(3)]
    shape[axis] = n
    x = np.random.default_rng(n).standard_normal(shape)
    q = dense.T if inverse else dense
    expected = np.moveaxis(np.moveaxis(x, axis, -1) @ q, -1, axis)
    np.testing.assert_allclose(transform.apply(x, axis, inverse=inverse), expected, atol=ORTHOGONAL)
    np.testing.assert_allclose(transform.matrix(), dense, atol=ORTHOGONAL)
