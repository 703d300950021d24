"""Structured OBS against least squares on the inputs themselves, and against the published steps."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.passes.prune import obs
from planish.passes.prune.obs import Consumer, refits, removal, removal_errors

EXACT = 1e-8
"""Relative, in float64: normal equations of well-conditioned inputs (condition below 1e4) lose 1e-12."""


def inputs(rng, tokens, features):
    """Correlated, of different sizes, about a mean that is not zero."""
    mixing = np.eye(features) + 0.5 * rng.standard_normal((features, features)) / np.sqrt(features)
    offset = rng.standard_normal(features)
    return (rng.standard_normal((tokens, features)) @ mixing + offset) * rng.uniform(0.5, 2, features)


def problem(seed, structures, width, *, outputs=5, tokens=300, bias=False, energy=1.0):
    """Inputs [tokens, in] and the layer that reads them; structures are scattered over the columns."""
    rng = np.random.default_rng(seed)
    x = inputs(rng, tokens, structures * width)
    columns = rng.permutation(structures * width).reshape(structures, width)
    centered = x - x.mean(axis=0) if bias else x
    weight = rng.standard_normal((outputs, structures * width))
    return x, Consumer(weight, centered.T @ centered / tokens, columns, energy)


def columns_of(consumer, keep):
    return consumer.structures[np.asarray(keep, int)].reshape(-1)


def least_squares(x, consumer, keep, *, bias=False):
    """Weight [out, kept columns], how much the bias changes, and the mean squared error, from the inputs."""
    kept = x[:, columns_of(consumer, keep)]
    if bias:
        kept = np.column_stack([kept, np.ones(len(x))])
    y = x @ consumer.weight.T
    solution = np.linalg.lstsq(kept, y)[0]
    error = np.square(kept @ solution - y).sum() / len(x)
    return (solution[:-1].T, solution[-1], error) if bias else (solution.T, None, error)


def published(consumers, least, damp=0.0):
    """Order and costs by the published steps, W and H⁻¹ written out after each."""
    states = []
    for consumer in consumers:
        h = consumer.covariance + damp * np.diag(consumer.covariance).mean() * np.eye(
            len(consumer.covariance)
        )
        states.append([consumer, consumer.weight.copy(), np.linalg.inv(h)])
    left, order, costs = list(range(len(consumers[0].structures))), [], []
    while len(left) > least:
        scores = [sum(score(w, g, c.structures[s]) / c.energy for c, w, g in states) for s in left]
        costs.append(min(scores))
        order.append(left.pop(int(np.argmin(scores))))
        for state in states:
            consumer, w, g = state
            own = consumer.structures[order[-1]]
            block = np.linalg.inv(g[np.ix_(own, own)])
            w -= w[:, own] @ block @ g[own]
            g -= g[:, own] @ block @ g[own]
            w[:, own] = 0
            g[own], g[:, own] = 0, 0
            g[own, own] = 1
    return order, costs


def score(w, g, own):
    return np.trace(w[:, own] @ np.linalg.inv(g[np.ix_(own, own)]) @ w[:, own].T)


SHAPES = {"columns": (24, 1), "heads": (6, 4), "key-value groups": (3, 8)}


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_stays_is_the_least_squares_refit(shape, bias):
    x, consumer = problem(1, *shape, bias=bias)
    order = removal([consumer], 1, damp=0)
    counts = range(1, shape[0] + 1)
    for count, refit in zip(counts, refits(consumer, order, counts), strict=True):
        keep = np.sort(np.setdiff1d(np.arange(shape[0]), order.removed[: shape[0] - count]))
        expected, change, error = least_squares(x, consumer, keep, bias=bias)
        np.testing.assert_array_equal(refit.keep, keep)
        np.testing.assert_allclose(refit.weight, expected, rtol=EXACT, atol=EXACT)
        energy = np.square(x @ consumer.weight.T).sum() / len(x)
        assert refit.error == pytest.approx(error, rel=EXACT, abs=1e-12 * energy)
        if bias:
            mean = x.mean(axis=0)
            refitted_bias = consumer.weight @ mean - refit.weight @ mean[columns_of(consumer, keep)]
            np.testing.assert_allclose(refitted_bias, change, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_half_the_published_score_is_the_squared_error_of_a_removal(shape):
    x, consumer = problem(2, *shape)
    hessian = 2 * x.T @ x / len(x)
    inverse = np.linalg.inv(hessian)
    for structure in range(shape[0]):
        keep = np.setdiff1d(np.arange(shape[0]), structure)
        _, _, error = least_squares(x, consumer, keep)
        half = score(consumer.weight, inverse, consumer.structures[structure]) / 2
        assert half == pytest.approx(error, rel=EXACT)
    costs = removal([consumer], shape[0] - 1, damp=0).costs
    errors = [
        least_squares(x, consumer, np.setdiff1d(np.arange(shape[0]), structure))[2]
        for structure in range(shape[0])
    ]
    assert costs == pytest.approx([min(errors)], rel=EXACT)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    structures=st.integers(2, 6),
    width=st.integers(1, 3),
    bias=st.booleans(),
)
def test_each_step_removes_what_costs_least(seed, structures, width, bias):
    x, consumer = problem(seed, structures, width, outputs=3, tokens=80, bias=bias)
    order = removal([consumer], 0, damp=0)
    left = np.arange(structures)
    before = 0.0
    for removed, cost in zip(order.removed, order.costs, strict=True):
        errors = {int(one): least_squares(x, consumer, np.setdiff1d(left, one), bias=bias)[2] for one in left}
        least = min(errors.values())
        assert errors[int(removed)] == pytest.approx(least, rel=EXACT)
        assert cost == pytest.approx(least - before, rel=1e-6, abs=1e-9)
        left, before = np.setdiff1d(left, removed), least


@pytest.mark.parametrize("drift", [obs._DRIFT, 0.0], ids=["down-dated", "computed afresh"])
@pytest.mark.parametrize(("structures", "width"), [(150, 1), (40, 5)])
def test_waiting_updates_change_nothing(structures, width, drift, monkeypatch):
    monkeypatch.setattr(obs, "_WAITING", 16)
    _, consumer = problem(3, structures, width, tokens=1000)
    # Told that inverses have drifted, or that they are good enough to begin with.
    monkeypatch.setattr(obs, "_inverse", np.linalg.inv)
    monkeypatch.setattr(obs, "_DRIFT", drift)
    order = removal([consumer], 2, damp=1e-3)
    expected, costs = published([consumer], 2, damp=1e-3)
    np.testing.assert_array_equal(order.removed, expected)
    np.testing.assert_allclose(order.costs, costs, rtol=EXACT)


def test_costs_add_up_to_the_damped_error_and_errors_are_without_damping():
    damp = 0.05
    x, consumer = problem(4, 12, 2)
    order = removal([consumer], 1, damp=damp)
    added = damp * np.diag(consumer.covariance).mean()
    for refit in refits(consumer, order, [1, 4, 11]):
        columns = columns_of(consumer, refit.keep)
        whole = np.zeros_like(consumer.weight)
        whole[:, columns] = refit.weight
        error = np.square(x @ (whole - consumer.weight).T).sum() / len(x)
        damping = added * np.square(whole - consumer.weight).sum()
        assert refit.error == pytest.approx(error, rel=EXACT)
        assert refit.damped_error == pytest.approx(error + damping, rel=EXACT)
        assert order.costs[: 12 - len(refit.keep)].sum() == pytest.approx(error + damping, rel=EXACT)
        # The damped refit is least squares with √λ on each weight's change as further rows.
        rows = np.concatenate([x / np.sqrt(len(x)), np.sqrt(added) * np.eye(24)])
        expected = np.linalg.lstsq(rows[:, columns], rows @ consumer.weight.T)[0].T
        np.testing.assert_allclose(refit.weight, expected, rtol=EXACT, atol=EXACT)


def test_several_consumers_decide_together_each_in_units_of_its_energy():
    _, narrow = problem(5, 10, 1, energy=3.0)
    _, wide = problem(6, 10, 3, energy=8.0)
    order = removal([narrow, wide], 1, damp=0)
    expected, costs = published([narrow, wide], 1)
    np.testing.assert_array_equal(order.removed, expected)
    np.testing.assert_allclose(order.costs, costs, rtol=EXACT)
    alone = [list(removal([consumer], 1, damp=0).removed) for consumer in (narrow, wide)]
    assert expected not in alone
    for index, consumer in enumerate([narrow, wide]):
        (refit,) = refits(consumer, order, [4], index=index)
        np.testing.assert_array_equal(refit.keep, np.sort(np.setdiff1d(np.arange(10), expected[:6])))


def test_inputs_that_never_vary_go_first_and_keep_their_weights_as_long_as_they_stay():
    x, consumer = problem(7, 8, 1)
    dead = consumer.structures[[2, 5]].reshape(-1)
    x[:, dead] = 0
    consumer = dataclasses.replace(consumer, covariance=x.T @ x / len(x))
    order = removal([consumer], 1, damp=0)
    assert sorted(order.removed[:2]) == [2, 5]
    assert order.costs[:2] == pytest.approx([0, 0], abs=1e-14)
    assert order.damp == (0,)
    seven, eight = refits(consumer, order, [7, 8])
    np.testing.assert_allclose(eight.weight, consumer.weight[:, consumer.structures[:, 0]], rtol=EXACT)
    np.testing.assert_array_equal(
        seven.weight[:, np.flatnonzero(seven.keep == 5)], consumer.weight[:, consumer.structures[5]]
    )
    assert seven.error == pytest.approx(0, abs=1e-12)


def test_a_constant_input_goes_into_the_bias():
    x, consumer = problem(8, 6, 1, bias=True)
    constant = consumer.structures[3, 0]
    x[:, constant] = 7.0
    centered = x - x.mean(axis=0)
    order = removal([dataclasses.replace(consumer, covariance=centered.T @ centered / len(x))], 5, damp=1e-2)
    np.testing.assert_array_equal(order.removed, [3])
    assert order.costs == pytest.approx([0], abs=1e-12)


def test_a_singular_covariance_is_damped_and_the_damping_reported():
    x, consumer = problem(9, 10, 1)
    x[:, consumer.structures[4, 0]] = x[:, consumer.structures[1, 0]]
    consumer = dataclasses.replace(consumer, covariance=x.T @ x / len(x))
    order = removal([consumer], 1, damp=0)
    (used,) = order.damp
    assert 0 < used <= 1e-6
    assert order.removed[0] in (1, 4)
    (refit,) = refits(consumer, order, [9])
    energy = np.square(x @ consumer.weight.T).sum() / len(x)
    # One of two equal columns does the work of both; what is left is the damping that was needed.
    assert refit.error < used * energy
    assert order.indefinite == (False,)


def test_an_indefinite_covariance_is_cut_to_its_positive_part_and_that_is_reported():
    _, consumer = problem(10, 6, 1)
    values, vectors = np.linalg.eigh(consumer.covariance)
    values[0] = -10 * values.sum()
    positive = (vectors[:, 1:] * values[1:]) @ vectors[:, 1:].T
    order = removal([dataclasses.replace(consumer, covariance=(vectors * values) @ vectors.T)], 1, damp=1e-2)
    assert order.indefinite == (True,)
    assert order.damp == (1.0,)
    expected, _ = published([dataclasses.replace(consumer, covariance=positive)], 1, damp=1.0)
    np.testing.assert_array_equal(order.removed, expected)


def test_errors_of_plain_removals():
    x, consumer = problem(11, 5, 3)
    removed = np.array([3, 0, 4, 1, 2])
    errors = removal_errors(consumer, removed)
    y = x @ consumer.weight.T
    for steps, error in enumerate(errors):
        columns = columns_of(consumer, removed[steps:])
        expected = np.square(x[:, columns] @ consumer.weight[:, columns].T - y).sum() / len(x)
        assert error == pytest.approx(expected, rel=EXACT, abs=1e-12)
