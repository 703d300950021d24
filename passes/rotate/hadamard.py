"""Hadamard matrices, H·Hᵀ = n·I with entries ±1, constructed and not tabulated; rotations made of them.

Orders 1 and 2, Paley's two families over prime and prime-power fields, Williamson's form, and Kronecker
products of all these. n = K·2ᵐ takes the smallest K that works: H₂ ⊗ … ⊗ H₂ ⊗ H_K.

A rotation acts on row vectors: x ↦ x·Q. Signs, where they are drawn, are applied first, Q = diag(±1)·H/√n:
after H they would change nothing about how large the entries of x·Q are. Where n has no Hadamard matrix that
is known here, Q is block-diagonal with the largest block that has one, and the result says so.

QuaRot (Ashkboos et al., 2024) for the kinds of rotation; QuIP# (Tseng et al., 2024) for orders that are no
powers of two.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ...ir.errors import PassError
from .paley import is_paley, paley
from .williamson import williamson

Signs = npt.NDArray[np.int8]
Doubles = npt.NDArray[np.float64]
Kind = Literal["hadamard", "random-hadamard", "random-matrix"]


@functools.cache
def is_constructible(n: int) -> bool:
    """Whether `hadamard_matrix` has a matrix of order ``n``."""
    if n in (1, 2):
        return True
    if n < 1 or n % 4:
        return False
    return is_constructible(n // 2) or is_paley(n) or williamson(n) is not None or bool(_splits(n))


@functools.lru_cache(maxsize=16)
def hadamard_matrix(n: int) -> Signs:
    """A Hadamard matrix of order ``n``: int8 [n, n] of ±1, H·Hᵀ = n·I. It is shared: read-only.

    Raises:
        PassError: no matrix of this order is known here.
    """
    _require(n)
    matrix = np.ascontiguousarray(_construct(n))
    matrix.flags.writeable = False
    return matrix


def _require(n: int) -> None:
    if not is_constructible(n):
        raise PassError(
            f"rotate: no Hadamard matrix of order {n} is known",
            hint=f"{largest_block(n)} is the largest divisor of {n} that has one" if n > 0 else None,
        )


def _construct(n: int) -> Signs:
    if n == 1:
        return np.ones((1, 1), np.int8)
    if n == 2:
        return np.array([[1, 1], [1, -1]], np.int8)
    if is_constructible(n // 2):
        return np.kron(hadamard_matrix(2), hadamard_matrix(n // 2))
    for construct in (paley, williamson):
        if (primitive := construct(n)) is not None:
            return primitive
    first = _splits(n)[0]
    return np.kron(hadamard_matrix(first), hadamard_matrix(n // first))


def _splits(n: int) -> list[int]:
    """Constructible orders a, ascending, 1 < a < n, for which n / a is constructible too."""
    return [a for a in _divisors(n)[1:-1] if is_constructible(a) and is_constructible(n // a)]


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def largest_block(n: int) -> int:
    """The largest divisor of ``n`` that has a Hadamard matrix; 1 for odd numbers."""
    return max(d for d in _divisors(n) if is_constructible(d))


def kronecker_factors(n: int, count: int = 2) -> tuple[int, ...]:
    """Orders a ≥ b ≥ … > 1 of Hadamard matrices, at most ``count`` of them, with a·b·… = n and the least sum.

    x·(A ⊗ B ⊗ …) costs n·(a + b + …) multiplications. An order that is no product is its own only factor.

    Raises:
        PassError: no matrix of order ``n`` is known.
    """
    _require(n)
    if n == 1:
        return (1,)
    return min(_factorisations(n, count), key=lambda orders: (sum(orders), orders))


def _factorisations(n: int, count: int) -> list[tuple[int, ...]]:
    """Constructible orders > 1 with product ``n``, descending, at most ``count``; ``n`` itself included."""
    found: set[tuple[int, ...]] = {(n,)}
    if count > 1:
        for first in _splits(n):
            rests = _factorisations(n // first, count - 1)
            found |= {tuple(sorted((first, *rest), reverse=True)) for rest in rests}
    return sorted(found)


@dataclasses.dataclass(frozen=True)
class KroneckerHadamard:
    """The orthogonal matrix Q = I ⊗ A ⊗ B ⊗ … / √(a·b·…), [n, n], without being written out.

    Attributes:
        features: n.
        factors: A, B, …, Hadamard matrices of ±1; their orders' product divides ``features``.
        remark: why Q is block-diagonal; None where it is not.
    """

    features: int
    factors: tuple[Signs, ...]
    remark: str | None = None

    @property
    def block_size(self) -> int:
        """a·b·…: ``features``, or the size of the blocks on the diagonal."""
        return math.prod(len(factor) for factor in self.factors)

    def apply(self, array: npt.NDArray[Any], axis: int = -1, *, inverse: bool = False) -> Doubles:
        """Rows along ``axis`` times Q (or Qᵀ), in float64: any shape whose ``axis`` is ``features`` long.

        For a weight W [K, N] that reads a transformed input, x·Q·(Qᵀ·W): ``apply(W, axis=0)``.
        """
        rows = np.moveaxis(np.asarray(array, np.float64), axis, -1)
        grouped = rows.reshape(-1, *(len(factor) for factor in self.factors))
        for position, factor in enumerate(self.factors, start=1):
            matrix = factor.T if inverse else factor
            grouped = np.moveaxis(np.tensordot(grouped, matrix, axes=(position, 0)), -1, position)
        result = grouped.reshape(rows.shape) / math.sqrt(self.block_size)
        return np.moveaxis(result, -1, axis)

    def matrix(self) -> Doubles:
        """Q, float64 [n, n]."""
        return self.apply(np.eye(self.features))


def kronecker_hadamard(n: int, count: int = 2) -> KroneckerHadamard:
    """The Hadamard rotation of ``n`` features in at most ``count`` Kronecker factors; in blocks if it must.

    Raises:
        PassError: ``n`` is odd: every block would be a number.
    """
    block = largest_block(n) if n > 0 else 1
    if block == 1:
        raise PassError(
            f"rotate: {n} features have no Hadamard rotation, not even in blocks", hint="kind=random-matrix"
        )
    factors = tuple(hadamard_matrix(order) for order in kronecker_factors(block, count))
    remark = None
    if block < n:
        remark = (
            f"no Hadamard matrix of order {n} is known: rotated in {n // block} blocks of {block} features"
        )
    return KroneckerHadamard(n, factors, remark)


@dataclasses.dataclass(frozen=True)
class Rotation:
    """An orthogonal float64 matrix [n, n], for x·matrix, and why it is block-diagonal, if it is."""

    matrix: Doubles
    remark: str | None = None


def rotation(n: int, kind: Kind, rng: np.random.Generator) -> Rotation:
    """A rotation of ``n`` features.

    Args:
        n: the number of features.
        kind: ``hadamard`` is H/√n; ``random-hadamard`` is diag(±1)·H/√n with drawn signs; ``random-matrix``
            is drawn from the Haar measure on the orthogonal matrices.
        rng: draws the signs or the matrix.

    Raises:
        PassError: a Hadamard rotation of an odd number of features.
    """
    if kind == "random-matrix":
        q, r = np.linalg.qr(rng.standard_normal((n, n)))
        # QR leaves the signs of the columns open; with those of R's diagonal, Q is uniformly distributed.
        return Rotation(q * np.sign(np.diag(r)))
    transform = kronecker_hadamard(n)
    signs = rng.choice([-1.0, 1.0], n) if kind == "random-hadamard" else np.ones(n)
    return Rotation(signs[:, None] * transform.matrix(), transform.remark)
