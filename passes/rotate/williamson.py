"""Williamson's Hadamard matrices of order 4m, m odd: four symmetric circulants, found by search.

    H = [[A, B, C, D], [−B, A, −D, C], [−C, D, A, −B], [−D, −C, B, A]],   A² + B² + C² + D² = 4m·I

A symmetric circulant of ±1 is a sequence a₀ … aₘ₋₁ with aᵢ = a₋ᵢ, and the equation says that the periodic
autocorrelations Σᵢ aᵢ aᵢ₊ₛ of the four sequences add up to 0 for every shift s ≠ 0. Two searches:

- *cyclic*: B and C are A with its indices multiplied by t and t², t³ ≡ ±1 (mod m), and D is invariant under
  t. The sum is then invariant too, and one A is matched with one D: this reaches m = 39 (order 156).
- *invariant*: all four sequences are invariant under a multiplier t (t = 1: any symmetric sequence). Pairs
  (A, B) are matched with pairs (C, D): this reaches m = 23 and 29 (orders 92, 116) and m = 43 (172).

Matching compares a random linear function of the autocorrelations in 64-bit integers; what matches is
verified. The equation holds for the eigenvalues too, frequency by frequency: none is larger than √(4m), and
the row sums satisfy a² + b² + c² + d² = 4m. Both narrow the searches.

J. Williamson, Hadamard's determinant theorem and the sum of four squares, Duke Math. Journal 11 (1944).
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

Signs = npt.NDArray[np.int8]
Integers = npt.NDArray[np.int64]
Quadruple = tuple[Signs, Signs, Signs, Signs]

LARGEST = 43
"""m beyond which the searches take minutes."""
_MOST_FREE_SIGNS_OF_PAIRS = 14
_MOST_FREE_SIGNS_OF_CYCLIC = 19
_ROUNDING = 1 + 1e-9
"""Sums of at most 43 signs in float64 are far more exact than this."""


@functools.cache
def williamson(order: int) -> Signs | None:
    """A Hadamard matrix [order, order] of Williamson's form, if the searches find one."""
    m = order // 4
    if order % 8 != 4 or not 3 <= m <= LARGEST:
        return None
    found = next(itertools.chain(_cyclic(m), _invariant(m)), None)
    if found is None:
        return None
    a, b, c, d = (_circulant(sequence) for sequence in found)
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])


def _circulant(sequence: Signs) -> Signs:
    index = np.arange(len(sequence))
    circulant: Signs = sequence[(index[None, :] - index[:, None]) % len(sequence)]
    return circulant


def _cyclic(m: int) -> Iterator[Quadruple]:
    if (m - 1) // 2 > _MOST_FREE_SIGNS_OF_CYCLIC:
        return
    for t in _multipliers(m):
        if pow(t, 3, m) not in (1, m - 1):
            continue
        shifts = [orbit[0] for orbit in _orbits(m, t)]
        rows = {a: 4 * m - 3 * a * a for a in range(1, 2 * m, 2) if 3 * a * a < 4 * m}
        rows = {a: math.isqrt(d) for a, d in rows.items() if math.isqrt(d) ** 2 == d}
        free, invariant = _sequences(m, 1, list(rows)), _sequences(m, t, list(rows.values()))
        turned = sum(_keys(free, [shift * t**power % m for shift in shifts]) for power in range(3))
        _, at, of = np.intersect1d(turned, -_keys(invariant, shifts), return_indices=True)
        for a, d in zip(free[at], invariant[of], strict=True):
            index = np.arange(m)
            yield from _if_right((a, a[index * t % m], a[index * t * t % m], d))


def _invariant(m: int) -> Iterator[Quadruple]:
    for t in (1, *_multipliers(m)):
        orbits = _orbits(m, t)
        if len(orbits) > _MOST_FREE_SIGNS_OF_PAIRS:
            continue
        shifts = [orbit[0] for orbit in orbits]
        for sums in _four_squares(4 * m):
            groups = [_sequences(m, t, [total]) for total in sums]
            keys = [_keys(group, shifts) for group in groups]
            first, second = (np.add.outer(keys[i], keys[i + 1]).reshape(-1) for i in (0, 2))
            _, at, of = np.intersect1d(first, -second, return_indices=True)
            for left, right in zip(at, of, strict=True):
                a, b = divmod(int(left), len(keys[1]))
                c, d = divmod(int(right), len(keys[3]))
                yield from _if_right((groups[0][a], groups[1][b], groups[2][c], groups[3][d]))


def _if_right(found: Quadruple) -> Iterator[Quadruple]:
    """Equal keys are not yet equal autocorrelations."""
    total = sum(_autocorrelations(sequence[None], range(1, len(sequence))) for sequence in found)
    if not np.any(total):
        yield found


def _multipliers(m: int) -> list[int]:
    return [t for t in range(2, m - 1) if math.gcd(t, m) == 1]


def _orbits(m: int, t: int) -> list[list[int]]:
    """The nonzero indices modulo m in classes that multiplication by t and −1 do not leave."""
    orbits: dict[int, list[int]] = collections.defaultdict(list)
    for index in range(1, m):
        powers = [index * pow(t, power, m) % m for power in range(m)]
        orbits[min(*powers, *(m - value for value in powers))].append(index)
    return list(orbits.values())


def _sequences(m: int, t: int, sums: Sequence[int]) -> Signs:
    """The sequences [·, m] with a₀ = 1, constant on the orbits of t, whose sum is one of ±``sums``.

    Sequences with an eigenvalue that is too large are left out.
    """
    orbits = _orbits(m, t)
    signs = (1 - 2 * (np.arange(1 << len(orbits))[:, None] >> np.arange(len(orbits)) & 1)).astype(np.int8)
    totals = 1 + signs @ np.array([len(orbit) for orbit in orbits], np.int16)
    signs = signs[np.isin(np.abs(totals), sums)]
    sequences = np.ones((len(signs), m), np.int8)
    for column, orbit in zip(signs.T, orbits, strict=True):
        sequences[:, orbit] = column[:, None]
    largest = np.abs(np.fft.rfft(sequences, axis=1)).max(axis=1, initial=0)
    possible: Signs = sequences[largest <= 2 * math.sqrt(m) * _ROUNDING]
    return possible


def _keys(sequences: Signs, shifts: Sequence[int]) -> Integers:
    """A number for each sequence, linear in its autocorrelations at ``shifts``."""
    weights = np.random.default_rng(0).integers(1, 1 << 40, len(shifts))
    keys: Integers = _autocorrelations(sequences, shifts) @ weights
    return keys


def _autocorrelations(sequences: Signs, shifts: Sequence[int]) -> Integers:
    products = [
        np.einsum("ij,ij->i", sequences, np.roll(sequences, -shift, axis=1), dtype=np.int16)
        for shift in shifts
    ]
    return np.stack(products, axis=1).astype(np.int64)


def _four_squares(total: int) -> Iterator[tuple[int, int, int, int]]:
    """Odd a ≥ b ≥ c ≥ d ≥ 1 whose squares add up to ``total``, in an order that makes pairs alike in size."""
    odd = range(1, math.isqrt(total) + 1, 2)
    for a, b, c, d in itertools.combinations_with_replacement(odd, 4):
        if a * a + b * b + c * c + d * d == total:
            yield a, d, b, c
