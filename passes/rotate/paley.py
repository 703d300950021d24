"""Paley's Hadamard matrices, from the squares of a finite field GF(q), q = pᵏ an odd prime power.

χ(a) is 0 for a = 0, 1 for squares and −1 for the rest; Q[i, j] = χ(aᵢ − aⱼ) over all elements.

- I, q ≡ 3 (mod 4): Q is skew. H = I + [[0, 1ᵀ], [−1, Q]] has order q + 1.
- II, q ≡ 1 (mod 4): Q is symmetric. C = [[0, 1ᵀ], [1, Q]]; H of order 2(q + 1) has the blocks
  [[1, 1], [1, −1]] · C[i, j] off the diagonal and [[1, −1], [−1, −1]] on it.

R. E. A. C. Paley, On orthogonal matrices, Journal of Mathematics and Physics 12 (1933).
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt

Signs = npt.NDArray[np.int8]


def paley(order: int) -> Signs | None:
    """A Hadamard matrix [order, order] of Paley's first or second kind, if there is one."""
    if (field := _first_kind(order)) is not None:
        return _paley_first(_differences(*field))
    if (field := _second_kind(order)) is not None:
        return _paley_second(_differences(*field))
    return None


def is_paley(order: int) -> bool:
    """Whether `paley` has a matrix of this order."""
    return _first_kind(order) is not None or _second_kind(order) is not None


def _first_kind(order: int) -> tuple[int, int] | None:
    """(p, k) with pᵏ + 1 = order and pᵏ ≡ 3 (mod 4)."""
    return prime_power(order - 1) if order % 4 == 0 else None


def _second_kind(order: int) -> tuple[int, int] | None:
    """(p, k) with 2(pᵏ + 1) = order and pᵏ ≡ 1 (mod 4)."""
    return prime_power(order // 2 - 1) if order % 8 == 4 and order > 4 else None


def _paley_first(differences: Signs) -> Signs:
    core = _bordered(differences, -1)
    np.fill_diagonal(core, 1)
    return core


def _paley_second(differences: Signs) -> Signs:
    core = _bordered(differences, 1)
    off_diagonal = np.array([[1, 1], [1, -1]], np.int8)
    diagonal = np.array([[1, -1], [-1, -1]], np.int8)
    return np.kron(core, off_diagonal) + np.kron(np.eye(len(core), dtype=np.int8), diagonal)


def _bordered(core: Signs, left: int) -> Signs:
    bordered = np.pad(core, ((1, 0), (1, 0)), constant_values=1)
    bordered[1:, 0] = left
    bordered[0, 0] = 0
    return bordered


def _differences(prime: int, degree: int) -> Signs:
    """Q [q, q]. Elements are numbered by their coefficients as digits in base p."""
    places = prime ** np.arange(degree)
    digits = np.arange(prime**degree)[:, None] // places % prime
    index = sum((digits[:, None, d] - digits[None, :, d]) % prime * places[d] for d in range(degree))
    differences: Signs = quadratic_characters(prime, degree)[index]
    return differences


def quadratic_characters(prime: int, degree: int) -> Signs:
    """χ of every element of GF(pᵏ), [pᵏ].

    The powers of a generator g run through all elements but 0, and gⁱ is a square if and only if i is even.
    """
    places = [prime**d for d in range(degree)]
    characters = np.zeros(prime**degree, np.int8)
    for exponent, element in enumerate(_powers_of_generator(prime, degree)):
        characters[sum(digit * place for digit, place in zip(element, places, strict=True))] = (
            -1 if exponent % 2 else 1
        )
    return characters


def _powers_of_generator(prime: int, degree: int) -> list[tuple[int, ...]]:
    """g⁰, g¹, … as coefficients, lowest first, for a g that generates the multiplicative group.

    In GF(p)[x] modulo a monic polynomial of degree k, x generates all pᵏ − 1 nonzero elements if and only if
    the polynomial is primitive; about one in k is. For k = 1, x is the number −c of the polynomial x + c.
    """
    one = (1,) + (0,) * (degree - 1)
    for low in itertools.product(range(prime), repeat=degree):
        if low[0] == 0:
            continue
        powers = [one]
        while (element := _times_x(powers[-1], low, prime)) != one and len(powers) < prime**degree:
            powers.append(element)
        if len(powers) == prime**degree - 1:
            return powers
    raise ValueError(f"GF({prime}^{degree}): {prime} is not a prime")


def _times_x(element: tuple[int, ...], low: tuple[int, ...], prime: int) -> tuple[int, ...]:
    """Times x, reduced by xᵏ = −(low coefficients of the polynomial)."""
    top = element[-1]
    shifted = (0, *element[:-1])
    return tuple((digit - top * coefficient) % prime for digit, coefficient in zip(shifted, low, strict=True))


def prime_power(number: int) -> tuple[int, int] | None:
    """(p, k) with pᵏ = number, p prime and k ≥ 1; None if there are none."""
    if number < 2:
        return None
    prime = next((d for d in range(2, math.isqrt(number) + 1) if number % d == 0), number)
    degree = 0
    while number % prime == 0:
        number, degree = number // prime, degree + 1
    return (prime, degree) if number == 1 else None
