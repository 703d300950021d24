"""A local Ray cluster of two processes gives the bytes of a run without it, and survives lost workers."""

import os
import subprocess
import sys

import numpy as np
import pytest
import worker_tasks
from planish.ir.errors import InputError, PassError, WorkerError
from planish.passes.quantize.algorithms import base
from planish.runtime import ray_workers
from planish.runtime.ray_workers import RayWorkers
from planish.runtime.workers import SERIAL, LocalWorkers, opened_workers
from worker_cases import ALGORITHMS, PASSES, compiled, solved

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'planish[ray]'")
two_machines = pytest.importorskip("two_machines")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    """Its processes find the functions of tests by their module's name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.path.dirname(worker_tasks.__file__))
        found = RayWorkers(count=2)
        yield found
        found.close()


def test_the_work_is_done_by_other_processes_on_one_thread_each(cluster):
    assert cluster.count == 2
    processes = {process for process, _ in cluster.map(worker_tasks.process_and_thread, None, range(20))}
    assert len(processes) >= 2
    assert os.getpid() not in processes
    assert list(cluster.map(worker_tasks.threads, None, range(3))) == [([1], 1)] * 3


def test_results_come_in_order_and_errors_as_they_were(cluster):
    assert list(cluster.map(worker_tasks.slow_first, None, range(6))) == list(range(6))
    results = cluster.map(worker_tasks.failing_at, 2, range(9))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(PassError, match="layer 2 is broken — repair it") as caught:
        next(results)
    assert caught.value.hint == "repair it"


def test_a_process_fetches_what_is_shared_once(cluster):
    seen = list(cluster.map(worker_tasks.identity_of_shared, {"weight": np.ones(10**6)}, range(12)))
    first = [process for process, again in seen if not again]
    assert len(first) == len(set(first))
    assert len(seen) > len(first)


def test_bits_are_those_of_threads_here(cluster):
    matrix = np.random.default_rng(0).standard_normal((700, 500)).astype(np.float32)
    columns = [matrix[index].copy() for index in range(6)]
    here = list(LocalWorkers(2).map(worker_tasks.product, matrix, columns))
    assert list(cluster.map(worker_tasks.product, matrix, columns)) == here


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_weight_has_the_same_integers(name, cluster):
    assert solved(name, cluster) == solved(name, SERIAL)


@pytest.mark.parametrize(
    "passes",
    [
        pytest.param(passes, id=name, marks=[pytest.mark.exhaustive] if name in ("allocate", "prune") else [])
        for name, passes in PASSES.items()
    ],
)
def test_a_compilation_gives_the_same_bytes(passes, cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "_NARROWEST", 16)
    assert compiled(passes, cluster, tmp_path) == compiled(passes, 2, tmp_path)


def test_a_worker_that_is_killed_is_survived(cluster, tmp_path):
    found = list(cluster.map(worker_tasks.killed, str(tmp_path), range(6)))
    assert (tmp_path / "killed").exists()
    assert [array[0] for array in found] == list(range(6))


def test_a_piece_that_kills_every_worker_is_given_up(cluster, tmp_path, monkeypatch):
    hopeless = tmp_path / "hopeless"
    hopeless.mkdir()
    monkeypatch.setattr(cluster, "_retries", 1)
    with pytest.raises(WorkerError, match="2 workers were lost with the same piece of work"):
        list(cluster.map(worker_tasks.killed, str(hopeless), range(6)))
    assert list(cluster.map(worker_tasks.scaled, 2, range(3))) == [0, 2, 4]


def test_workers_of_another_version_are_refused(cluster, monkeypatch):
    monkeypatch.setattr(ray_workers, "code_version", lambda: "another")
    with pytest.raises(WorkerError, match="a worker has another planish"):
        list(cluster.map(worker_tasks.scaled, 2, range(3)))


def test_a_cluster_that_was_there_before_is_used_and_left_alone(cluster):
    with opened_workers("ray") as found:
        assert list(found.map(worker_tasks.scaled, 2, range(3))) == [0, 2, 4]
    assert ray.is_initialized()
    assert list(cluster.map(worker_tasks.scaled, 3, range(3))) == [0, 3, 6]


@pytest.mark.exhaustive
def test_a_cluster_of_two_nodes_is_reached_by_its_address_and_may_lose_one():
    """In a process of its own, which is on no other cluster."""
    program = two_machines.__file__
    done = subprocess.run([sys.executable, program], check=True, capture_output=True, text=True)
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert found["count"] == "2"
    assert found["gptq"] == two_machines.digest(solved("gptq", SERIAL))
    assert found["survived"] == str([3 * number for number in range(12)])


def test_what_is_missing_is_said(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)
        with pytest.raises(InputError, match=r"Ray is not installed — pip install 'planish\[ray\]'"):
            RayWorkers()
