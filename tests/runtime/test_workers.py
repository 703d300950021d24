"""Work by several workers: in order, bounded, errors as they were, and the same bits whoever does it."""

import threading
import time

import pytest
import worker_tasks
from planish.ir.errors import InputError, PassError
from planish.passes.quantize.algorithms import base
from planish.runtime.thread_limit import one_blas_thread
from planish.runtime.workers import AHEAD, SERIAL, LocalWorkers, opened_workers
from worker_cases import ALGORITHMS, PASSES, WEIGHT, compiled, solved


@pytest.fixture(params=[1, 2, 5])
def workers(request):
    found = LocalWorkers(request.param)
    yield found
    found.close()


@pytest.fixture
def two():
    found = LocalWorkers(2)
    yield found
    found.close()


def test_results_come_in_the_order_of_the_items(workers):
    assert list(workers.map(worker_tasks.slow_first, None, range(8))) == list(range(8))
    assert list(workers.map(worker_tasks.scaled, 3, range(4))) == [0, 3, 6, 9]
    assert list(workers.map(worker_tasks.scaled, 3, [])) == []


def test_items_are_made_when_there_is_room(workers):
    made = 0

    def items():
        nonlocal made
        for number in range(20):
            made += 1
            yield number

    for taken, _ in enumerate(workers.map(worker_tasks.scaled, 1, items())):
        assert made <= taken + workers.count + AHEAD
    assert made == 20


def test_several_work_at_the_same_time(two):
    both = threading.Barrier(2, timeout=20)
    assert sorted(two.map(lambda barrier, number: (barrier.wait(), number)[1], both, range(2))) == [0, 1]


@pytest.mark.parametrize("hands", [SERIAL, LocalWorkers(1), LocalWorkers(3)])
def test_an_error_arrives_as_it_was_in_its_place(hands):
    results = hands.map(worker_tasks.failing_at, 2, range(9))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(PassError, match="layer 2 is broken") as caught:
        next(results)
    assert caught.value.hint == "repair it"
    assert list(hands.map(worker_tasks.scaled, 2, range(3))) == [0, 2, 4]


def test_what_was_begun_is_finished_when_an_item_cannot_be_made(workers):
    def items():
        yield from (1, 2)
        raise PassError("no third layer")

    results = workers.map(worker_tasks.scaled, 5, items())
    assert [next(results), next(results)] == [5, 10]
    with pytest.raises(PassError, match="no third layer"):
        next(results)


def test_who_goes_away_leaves_no_work_behind():
    done = []
    single = LocalWorkers(1)

    def slow(_, number):
        time.sleep(0.05)
        done.append(number)

    results = single.map(slow, None, range(50))
    next(results)
    results.close()
    single.close()
    assert len(done) <= 1 + 1 + AHEAD


def test_each_piece_has_one_thread_and_the_caller_keeps_its_own(two):
    before = worker_tasks.threads()
    assert list(two.map(worker_tasks.threads, None, range(4))) == [([1], 1)] * 4
    assert worker_tasks.threads() == before
    with one_blas_thread():
        with one_blas_thread():
            pass
        assert worker_tasks.threads()[0] == [1]
    assert worker_tasks.threads() == before


def test_one_limit_outlasts_another_that_began_later():
    before = worker_tasks.threads()
    first, second = one_blas_thread(), one_blas_thread()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert worker_tasks.threads()[0] == [1]
    second.__exit__(None, None, None)
    assert worker_tasks.threads() == before


def test_what_may_be_asked_for():
    with opened_workers(None) as found:
        assert isinstance(found, LocalWorkers)
        assert found.count >= 1
    for asked in (3, "3"):
        with opened_workers(asked) as found:
            assert found.count == 3
    mine = LocalWorkers(2)
    with opened_workers(mine) as found:
        assert found is mine
        list(found.map(worker_tasks.scaled, 1, [1]))
    assert mine._started is not None
    mine.close()
    for wrong in (0, -1, "many", True, "http://host"):
        with pytest.raises(InputError, match="workers: expected"), opened_workers(wrong):
            pass


# --- the same bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_weight_has_the_same_integers_whoever_solves_it(name, two):
    assert len(base.slabs(WEIGHT.shape[1])) == 2
    assert solved(name, two) == solved(name, SERIAL)


@pytest.mark.parametrize("columns", [1, 15, 128, 129, 700, 1024, 2048, 2049, 11008])
def test_slabs_are_all_columns_and_even_in_number(columns):
    found = base.slabs(columns)
    assert [column for slab in found for column in range(slab.start, slab.stop)] == list(range(columns))
    assert max(slab.stop - slab.start for slab in found) <= 1024
    if columns > 256:
        assert len(found) % 2 == 0


@pytest.fixture
def _narrow(monkeypatch):
    """Layers of a small model fall into several slabs, too."""
    monkeypatch.setattr(base, "_NARROWEST", 16)


@pytest.mark.usefixtures("_narrow")
@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
def test_a_compilation_gives_the_same_bytes_whoever_works_on_it(passes, tmp_path):
    assert compiled(passes, 1, tmp_path) == compiled(passes, 2, tmp_path)


def test_draws_depend_on_the_group_and_not_on_who_comes_first(tmp_path):
    passes = "canonicalize,prune{sparsity=0.3,criterion=random,evaluations=4,samples=2,multiple=4}"
    assert compiled(passes, 1, tmp_path) == compiled(passes, 4, tmp_path)
