"""Levels under a budget: the dynamic programme against enumeration, the search on planted problems."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.passes.prune.spdy import brought_within, search, solve

# Multiples of 2⁻¹⁰ add up without rounding.
EXACT = st.integers(0, 1024).map(lambda time: time / 1024)


def total(values, choice):
    return math.fsum(value[level] for value, level in zip(values, choice, strict=True))


def enumerated(errors, seconds, budget):
    """The least error of all choices within the budget, infinite without any."""
    choices = itertools.product(*(range(len(unit)) for unit in errors))
    return min((total(errors, c) for c in choices if total(seconds, c) <= budget), default=math.inf)


@st.composite
def problems(draw, times):
    """Up to four units of up to four levels: errors and seconds of each."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    errors = [draw(st.lists(st.floats(0, 10), min_size=n, max_size=n)) for n in sizes]
    seconds = [draw(st.lists(times, min_size=n, max_size=n)) for n in sizes]
    return [np.array(unit) for unit in errors], [np.array(unit, np.float64) for unit in seconds]


@settings(max_examples=80, deadline=None)
@given(problems(st.integers(0, 8)), st.integers(0, 40))
def test_whole_times_are_solved_exactly(problem, budget):
    errors, seconds = problem
    spare = min(budget, total(seconds, [unit.argmax() for unit in seconds]))
    spare -= total(seconds, [unit.argmin() for unit in seconds])
    choice = solve(errors, seconds, budget, buckets=max(1, int(spare)))  # one bucket is one second
    least = enumerated(errors, seconds, budget)
    if choice is None:
        assert least == math.inf
    else:
        assert total(seconds, choice) <= budget
        assert total(errors, choice) == pytest.approx(least, rel=1e-12)


@settings(max_examples=80, deadline=None)
@given(problems(EXACT), EXACT.map(lambda time: 4 * time))
def test_rounded_times_keep_the_budget_and_cost_a_bucket_for_each_unit(problem, budget):
    errors, seconds = problem
    choice = solve(errors, seconds, budget, buckets=100)
    if choice is None:
        assert enumerated(errors, seconds, budget) == math.inf
        return
    assert total(seconds, choice) <= budget
    fastest = total(seconds, [unit.argmin() for unit in seconds])
    # Less by a bucket for each unit; 1e-9 for the rounding of a bucket's width itself.
    tighter = budget * (1 - 1e-9) - (budget - fastest) * len(errors) / 100
    assert enumerated(errors, seconds, budget) <= total(errors, choice) + 1e-12
    assert total(errors, choice) <= enumerated(errors, seconds, tighter) + 1e-12


ERRORS = [np.array([0.0, 0.2, 1.0]), np.array([0.0, 0.5, 1.0])]
SECONDS = [np.array([0.3, 0.2, 0.1]), np.array([0.7, 0.4, 0.1])]


def test_a_budget_of_exactly_the_fastest_choice_gives_it():
    assert solve(ERRORS, SECONDS, 0.1 + 0.1) == [2, 2]
    many = [np.array([1.0, 0.1])] * 10
    assert solve([np.array([0.0, 1.0])] * 10, many, 1.0) == [1] * 10  # ten times 0.1 add up to less than 1


def test_a_budget_below_the_fastest_choice_has_no_solution():
    assert solve(ERRORS, SECONDS, 0.1999) is None
    assert solve(ERRORS, SECONDS, -1.0) is None


@pytest.mark.parametrize("budget", [1.0 + 1e-9, 1e9, math.inf])
def test_a_budget_for_everything_leaves_all_dense(budget):
    assert solve(ERRORS, SECONDS, budget) == [0, 0]


def test_a_level_that_takes_longer_than_the_budget_is_not_taken():
    assert solve([np.array([0.0, 1.0])], [np.array([1e12, 0.5])], 1.0) == [1]


def test_times_of_zero():
    free = [np.zeros(3), np.zeros(3)]
    assert solve([np.array([0.3, 0.1, 0.2]), np.array([0.0, 1.0, 2.0])], free, 0.0) == [1, 0]


def test_units_of_one_level_only_take_their_time():
    errors = [np.array([0.5]), np.array([0.0, 1.0])]
    seconds = [np.array([0.6]), np.array([0.5, 0.4])]
    assert solve(errors, seconds, 1.0) == [0, 1]
    assert solve(errors, seconds, 1.1 + 1e-9) == [0, 0]


def synthetic(units=5, levels=6):
    """Errors and seconds of units; and how much each matters, over two decades."""
    rng = np.random.default_rng(3)
    errors = [np.linspace(0, 1, levels) ** power for power in rng.uniform(1, 3, units)]
    seconds = [np.linspace(1, 0.1, levels)] * units
    return errors, seconds, 10 ** rng.uniform(-2, 0, units)


ALIKE, TIMES, MATTERS = synthetic()
BUDGET = 2.75


def planted(choice):
    """A loss that the right coefficients make additive, with a part that no coefficients explain."""
    losses = [weight * unit[level] for weight, unit, level in zip(MATTERS, ALIKE, choice, strict=True)]
    return sum(losses) + 0.1 * math.sqrt(losses[0] * losses[1])


def run(fitness=planted, **options):
    options = {"evaluations": 200, "rng": np.random.default_rng(0)} | options
    return search(ALIKE, TIMES, BUDGET, fitness, **options)


def test_the_search_finds_the_planted_optimum():
    choices = itertools.product(range(6), repeat=5)
    feasible = (choice for choice in choices if total(TIMES, choice) <= BUDGET - 5 * 4.5 / 10_000)
    best = min(map(planted, feasible))
    found = run()
    assert found.loss == planted(found.choice)
    assert found.loss == pytest.approx(best, rel=1e-9)
    assert total(TIMES, found.choice) <= BUDGET
    assert planted(solve(ALIKE, TIMES, BUDGET)) > 1.2 * best  # equal coefficients do not find it


def test_measured_sensitivities_are_tried_early():
    additive = lambda choice: sum(  # noqa: E731
        weight * unit[level] for weight, unit, level in zip(MATTERS, ALIKE, choice, strict=True)
    )
    found = run(additive, evaluations=4, start=MATTERS * 1e-3)
    best = solve([weight * unit for weight, unit in zip(MATTERS, ALIKE, strict=True)], TIMES, BUDGET)
    assert list(found.choice) == best
    assert found.evaluations == 4


def test_exchanges_find_what_no_coefficients_do():
    """Level 1 is slower than level 2 and worse by its error: no solution has it, but the loss is least."""
    errors = [np.array([0.0, 0.6, 0.5, 1.0])] * 3
    seconds = [np.array([1.0, 0.6, 0.5, 0.1])] * 3
    found = search(
        errors,
        seconds,
        1.8,
        lambda choice: 3.0 - sum(level == 1 for level in choice),
        evaluations=30,
        rng=np.random.default_rng(0),
    )
    assert found.choice == (1, 1, 1)


def test_no_choice_is_evaluated_twice_and_the_search_ends_when_there_are_no_more():
    asked = []
    found = search(
        [np.array([0.0, 1.0])] * 2,
        [np.array([1.0, 0.5])] * 2,
        1.5,
        lambda choice: asked.append(choice) or choice[0],
        evaluations=50,
        rng=np.random.default_rng(0),
    )
    assert sorted(asked) == [(0, 1), (1, 0)]
    assert found.choice == (0, 1)
    assert found.evaluations == 2


def test_infinite_losses_are_never_chosen_while_there_are_others():
    found = run(lambda choice: planted(choice) if choice[0] < 2 else math.inf, evaluations=30)
    assert found.choice[0] < 2
    everywhere = run(lambda choice: math.inf, evaluations=5)
    assert everywhere.loss == math.inf
    assert len(everywhere.choice) == 5


def test_a_budget_below_the_fastest_choice_has_no_best():
    assert search(ALIKE, TIMES, 0.4, planted, evaluations=5, rng=np.random.default_rng(0)) is None


def test_the_same_seed_gives_the_same_answer():
    first, second = run(evaluations=20), run(evaluations=20)
    assert (first.choice, first.loss) == (second.choice, second.loss)
    np.testing.assert_array_equal(first.coefficients, second.coefficients)


def test_progress_is_shown():
    shown = []

    def progress(items, description):
        for item in items:
            shown.append((item, len(items), description))
            yield item

    run(evaluations=7, progress=progress)
    assert [entry[0] for entry in shown] == list(range(7))
    assert shown[0][1:] == (7, "search levels")


def test_an_interrupted_search_goes_on_where_it_was():
    known = {}

    def remembered(choice, most):
        if choice not in known:
            if len(known) == most:
                raise KeyboardInterrupt
            known[choice] = planted(choice)
        return known[choice]

    with pytest.raises(KeyboardInterrupt):
        run(lambda choice: remembered(choice, 12), evaluations=25)
    found, whole = run(lambda choice: remembered(choice, 25), evaluations=25), run(evaluations=25)
    assert len(known) == 25
    assert (found.choice, found.loss, found.evaluations) == (whole.choice, whole.loss, whole.evaluations)
    np.testing.assert_array_equal(found.coefficients, whole.coefficients)


@given(st.data())
def test_a_choice_is_brought_within_a_budget(data):
    errors, seconds = data.draw(problems(EXACT))
    choice = [data.draw(st.integers(0, len(times) - 1)) for times in seconds]
    fastest = sum(times.min() for times in seconds)
    budget = data.draw(EXACT) * 5
    found = brought_within(choice, errors, seconds, budget)
    if budget < fastest:
        assert found is None
        return
    assert total(seconds, found) <= budget
    if total(seconds, choice) <= budget:
        assert total(errors, found) <= total(errors, choice)


def test_the_least_error_for_the_time_goes_first_and_what_is_left_over_is_used():
    errors = [np.array([0.0, 1.0, 5.0]), np.array([0.0, 1.0]), np.array([0.0, 0.4])]
    seconds = [np.array([4.0, 3.0, 0.0]), np.array([5.0, 2.0]), np.array([1.0, 0.5])]
    # Of 10 s, 3 must go: the second unit gives 3 for 1.
    assert brought_within([0, 0, 0], errors, seconds, 7.0) == (0, 1, 0)
    # Half a second less: then the third gives it for 0.4.
    assert brought_within([0, 0, 0], errors, seconds, 6.5) == (0, 1, 1)
    assert brought_within([0, 1, 1], errors, seconds, 10.0) == (0, 0, 0)
    assert brought_within([0, 0, 0], errors, seconds, 2.4) is None


def test_a_search_looks_at_the_near_choice_first():
    errors = [np.array([0.0, 1.0]), np.array([0.0, 1.0])]
    seconds = [np.array([2.0, 1.0]), np.array([2.0, 1.0])]
    asked = []

    def fitness(choice):
        asked.append(tuple(choice))
        return 1.0

    rng = np.random.default_rng(0)
    learned = np.array([0.5, 1.0])
    found = search(errors, seconds, 3.0, fitness, evaluations=2, rng=rng, start=learned, near=[0, 1])
    assert asked[0] == found.choice == (0, 1)
    # All choices lose the same, so the first one stays, with what was learned.
    np.testing.assert_array_equal(found.coefficients, learned)
