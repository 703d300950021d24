"""Structured Optimal Brain Surgeon: which inputs of a layer can go, and what the others become.

    minimise E‖(Ŵ − W)x‖²  over Ŵ that are zero at the columns of removed structures     W [out, in] → Ŵ

One structure (a column; the columns of a head, of a group of heads, of a convolution's input channel) is
removed after the other, each time the one that costs least. With H = E[xxᵀ] over the columns that are left,
G = H⁻¹, and S the columns of a structure,

    cost(S) = tr(W_S G_SS⁻¹ W_Sᵀ)      W ← W − W_S G_SS⁻¹ G_S:      G ← G − G_:S G_SS⁻¹ G_S:

The cost is exactly what removing S adds to the squared error, and the updated weight is the least-squares
refit of the columns that are left. (The published code has H = 2 E[xxᵀ], whose score is twice the cost.)

How it is computed:

- The order needs G and N = WᵀW only, not W: N ← Tᵀ N T with T = I − E_S G_SS⁻¹ G_S:. Both are downdated
  lazily: a step computes the rows S of the two, and the blocks on their diagonals; matrix products bring
  the rest up to date after some steps, for the columns that are still there.
- Given the order, the weights of all levels follow from one Cholesky factor. With the columns that stay
  longest first, H = L Lᵀ and Z = L⁻¹(WH)ᵀ, those of a level are leading parts of L and Z, and so of L⁻¹:
  Ŵᵀ = (L⁻¹)_kkᵀ Z_k, a sum over k that grows from level to level. No error of the downdates gets into it.

Preconditions: all numbers are finite. A bias is refitted too if the covariance is that of x about its mean:
it then becomes b + (W − Ŵ) E[x], which is the constant column that is never removed and not damped.

Source: Kurtic, Frantar and Alistarh, ZipLM, 2023, https://arxiv.org/abs/2302.04089.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from scipy.linalg import lapack, solve_triangular

Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_WAITING = 96
"""Rows of updates that wait for a matrix product: enough for its full speed, few enough for the cache."""
_DRIFT = 1e-6
"""Of G·H from the identity, along one vector, at which G is computed afresh: the scores keep six digits."""
_LEAST_DAMP = 1e-8
"""What is tried when a covariance cannot be inverted as it is; multiplied by ten while that does not help."""


@dataclasses.dataclass(frozen=True, eq=False)
class Consumer:
    """A layer that reads the structures.

    Attributes:
        weight: [out, in] float64, y = W x.
        covariance: [in, in] float64, E[xxᵀ], or about the mean where the layer's bias is refitted.
        structures: [structures, width], which columns each structure has; each column is in one at most.
            Columns of no structure stay as they are.
        energy: what errors of this layer are measured in: E‖y‖².
    """

    weight: Doubles
    covariance: Doubles
    structures: Integers
    energy: float = 1.0

    def selected(self, structures: Integers) -> tuple[Doubles, Doubles]:
        """The weight and the covariance of these structures' columns, side by side."""
        columns = self.structures[structures].reshape(-1)
        return self.weight[:, columns], self.covariance[np.ix_(columns, columns)]


@dataclasses.dataclass(frozen=True, eq=False)
class Removal:
    """In which order structures go.

    Attributes:
        removed: [steps], structures in the order in which they are removed.
        costs: [steps], what each adds to Σ over consumers of (squared error + damping) / energy.
        damp: of each consumer, what was added to the covariance's diagonal, relative to its mean.
        indefinite: of each consumer, whether its covariance had negative eigenvalues that damping does not
            make up for, and which were left out.
    """

    removed: Integers
    costs: Doubles
    damp: tuple[float, ...]
    indefinite: tuple[bool, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Refit:
    """A consumer with some structures left.

    Attributes:
        keep: [kept], the structures, sorted.
        weight: [out, kept · width], the columns of the structures in this order.
        error: E‖(Ŵ − W)x‖², without damping.
        damped_error: the same plus what the damping adds, Σ D_jj (Ŵ_ij − W_ij)², over all columns.
    """

    keep: Integers
    weight: Doubles
    error: float
    damped_error: float


def removal(consumers: Sequence[Consumer], least: int, *, damp: float) -> Removal:
    """Remove one structure after the other, the one with the least cost first, until ``least`` are left.

    Args:
        consumers: the layers that read the structures; a structure's cost is the sum over them, relative to
            each one's energy.
        least: how many structures stay, at least 0.
        damp: added to each covariance's diagonal, relative to its mean; ten times more as long as the
            result cannot be inverted accurately in float64.
    """
    states = [_State(consumer, damp) for consumer in consumers]
    left = np.arange(len(consumers[0].structures))
    gone = np.zeros(len(left), bool)
    removed: list[int] = []
    costs: list[float] = []
    while len(removed) < len(consumers[0].structures) - least:
        scores = np.where(gone, np.inf, sum(state.scores() for state in states))
        index = int(np.argmin(scores))
        removed.append(int(left[index]))
        costs.append(float(scores[index]))
        gone[index] = True
        for state in states:
            state.remove(index)
        if any(state.is_full for state in states):
            for state in states:
                state.flush(~gone)
            left, gone = left[~gone], np.zeros(np.count_nonzero(~gone), bool)
    return Removal(
        np.array(removed, np.int64),
        np.array(costs),
        tuple(state.curvature.damp for state in states),
        tuple(state.curvature.indefinite for state in states),
    )


def refits(consumer: Consumer, order: Removal, counts: Sequence[int], *, index: int = 0) -> Iterator[Refit]:
    """The consumer at each number of structures, refitted by least squares to its dense output.

    Args:
        consumer: one that ``order`` was found for.
        order: in which structures go, and the damping that was needed.
        counts: how many structures are kept, each at least 1; given in ascending order.
        index: which of the consumers of ``order`` this is.
    """
    structures, width = consumer.structures.shape
    stays = np.setdiff1d(np.arange(structures), order.removed)
    last_first = np.concatenate([stays, order.removed[::-1]])
    dense, covariance = consumer.selected(last_first)
    curvature = _curvature(covariance, order.damp[index], positive=order.indefinite[index])
    weight = np.where(curvature.dead, 0.0, dense)
    target = weight @ curvature.hessian
    inverse_factor, _ = lapack.dtrtri(lapack.dpotrf(curvature.hessian, lower=1)[0], lower=1, overwrite_c=1)
    z = inverse_factor @ target.T
    undamped = target - weight * curvature.added
    total, damped_total = np.vdot(undamped, weight), np.vdot(target, weight)
    refit, start = np.zeros_like(weight), 0
    for count in sorted(counts):
        k = count * width
        refit[:, :k] += z[start:k].T @ inverse_factor[start:k, :k]
        start, level = k, refit[:, :k]
        # Ŵ solves Ŵ H = W H on the kept columns, so Ŵ's own energy need not be multiplied out.
        error = total - np.vdot(undamped[:, :k], level)
        error += np.vdot((weight[:, :k] - level) * curvature.added[:k], level)
        damped_error = damped_total - np.vdot(z[:k], z[:k])
        sorting = np.argsort(last_first[:count])
        columns = np.where(curvature.dead[:k], dense[:, :k], level).reshape(-1, count, width)[:, sorting]
        yield Refit(
            last_first[sorting],
            columns.reshape(len(weight), k),
            max(float(error), 0.0),
            max(float(damped_error), 0.0),
        )


def removal_errors(consumer: Consumer, removed: Integers) -> Doubles:
    """E‖(Ŵ − W)x‖² after each step if the columns of structures go and the others stay as they are.

    Args:
        consumer: its covariance is E[xxᵀ] itself: a bias stays as it is too.
        removed: [steps], structures in the order in which they go.

    Returns:
        [steps + 1], the first one 0.
    """
    width = consumer.structures.shape[1]
    weight, covariance = consumer.selected(removed)
    products = (weight.T @ weight) * covariance
    # The error of a set of columns is the sum of its square of products: each step adds a row and a column.
    rows = np.tril(products).sum(axis=1) + np.tril(products, -1).sum(axis=1)
    return np.concatenate([[0.0], np.cumsum(rows.reshape(-1, width).sum(axis=1))])


@dataclasses.dataclass(frozen=True, eq=False)
class _Curvature:
    """A covariance that is damped, so that it can be inverted.

    Attributes:
        hessian: [columns, columns], the covariance with ``added`` on its diagonal.
        added: [columns].
        dead: [columns], which inputs never varied: their weights do not matter, and stay while they do.
        damp: ``added`` relative to the mean of the diagonal.
        indefinite: only the covariance's positive part is left.
    """

    hessian: Doubles
    added: Doubles
    dead: npt.NDArray[np.bool_]
    damp: float
    indefinite: bool


def _curvature(covariance: Doubles, damp: float, *, positive: bool) -> _Curvature:
    """With the damping asked for; ``positive`` leaves negative eigenvalues out."""
    if positive:
        values, vectors = np.linalg.eigh(covariance)
        covariance = (vectors * np.maximum(values, 0)) @ vectors.T
    variances = np.diag(covariance)
    mean = float(variances.mean())
    # Inputs are float32: what varies less than the largest one is rounded does not vary. Such an input is
    # taken apart from the others, and any number on its diagonal will do.
    dead = variances <= np.finfo(np.float32).eps ** 2 * max(float(variances.max()), 0.0)
    added = np.where(dead, mean or 1.0, damp * mean)
    hessian = np.where(dead | dead[:, None], 0.0, covariance)
    hessian[np.diag_indices_from(hessian)] += added
    return _Curvature(hessian, added, dead, damp, positive)


def _invertible(covariance: Doubles, damp: float) -> tuple[_Curvature, Doubles]:
    """With as much damping as is needed, and the inverse."""
    for tried in _damps(damp):
        curvature = _curvature(covariance, tried, positive=False)
        inverse = _inverse(curvature.hessian)
        if inverse is not None:
            return curvature, inverse
    curvature = _curvature(covariance, tried, positive=True)
    inverse = np.asarray(np.linalg.inv(curvature.hessian), np.float64)
    return curvature, inverse


def _damps(damp: float) -> Iterator[float]:
    """What to try, up to the whole mean of the diagonal."""
    yield damp
    damp = max(damp, _LEAST_DAMP / 10)
    while damp < 1:
        damp = min(10 * damp, 1.0)
        yield damp


def _inverse(hessian: Doubles) -> Doubles | None:
    """The inverse by Cholesky, or None where float64 is not enough for it."""
    factor, failed = lapack.dpotrf(hessian, lower=1)
    if failed:
        return None
    triangle, failed = lapack.dpotri(factor, lower=1, overwrite_c=1)
    if failed:
        return None
    inverse = triangle + triangle.T
    inverse[np.diag_indices_from(inverse)] /= 2
    return inverse if _drift(inverse, hessian) < _DRIFT / 10 else None


def _drift(inverse: Doubles, hessian: Doubles) -> float:
    """How far G·H is from the identity: ‖G H v − v‖∞ of a vector of signs."""
    signs = np.where(np.arange(len(hessian)) % 3, 1.0, -1.0)
    return float(np.abs(inverse @ (hessian @ signs) - signs).max())


class _State:
    """G and N of one consumer over the columns that were there at the last flush.

    Updates wait as rows X and U, with which G = G₀ − XᵀX and N = N₀ − UᵀX − XᵀU. The blocks of structures on
    both diagonals are always up to date.
    """

    def __init__(self, consumer: Consumer, damp: float) -> None:
        structures = len(consumer.structures)
        self._width = int(consumer.structures.shape[1])
        weight, covariance = consumer.selected(np.arange(structures))
        self.curvature, self._inverse = _invertible(covariance, damp)
        # Inputs that never varied cost nothing.
        self._weight = np.where(self.curvature.dead, 0.0, weight) / np.sqrt(consumer.energy)
        self._columns = np.arange(structures * self._width)
        self._identity = np.eye(self._width)
        self._gram = self._weight.T @ self._weight
        self._reset()

    def _reset(self) -> None:
        """Forget the updates, all of which are in G and N."""
        rows = max(_WAITING, self._width)
        self._x, self._u = (np.empty((rows, len(self._columns))) for _ in range(2))
        self._waiting = 0
        self._inverse_blocks, self._gram_blocks = (
            _diagonal_blocks(matrix, self._width) for matrix in (self._inverse, self._gram)
        )

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another removal."""
        return self._waiting + self._width > len(self._x)

    def scores(self) -> Doubles:
        """[structures], the cost of each: tr(G_SS⁻¹ N_SS); of those that are gone, any number."""
        if self._width == 1:
            scores: Doubles = (self._gram_blocks / self._inverse_blocks)[:, 0, 0]
            return scores
        solved = np.linalg.solve(self._inverse_blocks, self._gram_blocks)
        traces: Doubles = np.trace(solved, axis1=1, axis2=2)
        return traces

    def remove(self, index: int) -> None:
        """Remove one structure."""
        width, start = self._width, self._waiting
        own = slice(index * width, (index + 1) * width)
        x, u = self._x[:start], self._u[:start]
        g = self._inverse[own] - x[:, own].T @ x
        n = self._gram[own] - u[:, own].T @ x - x[:, own].T @ u
        factor = np.linalg.cholesky(g[:, own])
        if width == 1:
            g, n = g / factor, n / factor
        else:
            g, n = (solve_triangular(factor, rows, lower=True, check_finite=False) for rows in (g, n))
        # L⁻¹ N_SS L⁻ᵀ is symmetric: half of it goes to either side of the update.
        inner = solve_triangular(factor, n[:, own].T, lower=True, check_finite=False)
        n -= 0.5 * inner @ g
        self._x[start : start + width], self._u[start : start + width] = g, n
        self._waiting += width
        self._downdate_blocks(g, n)
        # What is gone must not divide by zero in a score.
        self._inverse_blocks[index], self._gram_blocks[index] = self._identity, 0.0

    def _downdate_blocks(self, x: Doubles, u: Doubles) -> None:
        if self._width == 1:
            self._inverse_blocks[:, 0, 0] -= x[0] * x[0]
            self._gram_blocks[:, 0, 0] -= 2 * u[0] * x[0]
            return
        x, u = (rows.reshape(self._width, -1, self._width).transpose(1, 2, 0) for rows in (x, u))
        self._inverse_blocks -= x @ x.transpose(0, 2, 1)
        cross = u @ x.transpose(0, 2, 1)
        self._gram_blocks -= cross + cross.transpose(0, 2, 1)

    def flush(self, left: npt.NDArray[np.bool_]) -> None:
        """Bring G and N up to date for the structures that are left, which are all from now on."""
        local = np.flatnonzero(np.repeat(left, self._width))
        x, u = self._x[: self._waiting, local], self._u[: self._waiting, local]
        self._columns = self._columns[local]
        self._inverse = self._inverse[np.ix_(local, local)]
        self._inverse -= x.T @ x
        if self._has_drifted():
            self._refresh()
        else:
            self._gram = self._gram[np.ix_(local, local)]
            self._gram -= np.concatenate([u, x]).T @ np.concatenate([x, u])
        self._reset()

    def _has_drifted(self) -> bool:
        hessian = self.curvature.hessian[np.ix_(self._columns, self._columns)]
        return len(hessian) > 0 and _drift(self._inverse, hessian) > _DRIFT

    def _refresh(self) -> None:
        """G and N from the columns that are left, W by solving for it."""
        kept, hessian = self._columns, self.curvature.hessian
        gone = np.setdiff1d(np.arange(len(hessian)), kept)
        self._inverse = np.asarray(np.linalg.inv(hessian[np.ix_(kept, kept)]), np.float64)
        from_gone = self._weight[:, gone] @ hessian[np.ix_(gone, kept)]
        weight = self._weight[:, kept] + from_gone @ self._inverse
        self._gram = weight.T @ weight


def _diagonal_blocks(matrix: Doubles, width: int) -> Doubles:
    """[structures, width, width] from [structures · width, structures · width]."""
    columns = np.arange(len(matrix)).reshape(-1, width)
    blocks: Doubles = matrix[columns[:, :, None], columns[:, None, :]]
    return blocks
