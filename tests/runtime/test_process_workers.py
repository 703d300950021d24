"""Two processes of this machine give the bytes of a run without them; one that is lost is a clear error."""

import os
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest
import worker_tasks
from planish.ir.errors import InputError, PassError, WorkerError
from planish.passes.quantize.algorithms import base
from planish.runtime.process_workers import LocalProcesses
from planish.runtime.workers import SERIAL, LocalWorkers, opened_workers
from worker_cases import PASSES, compiled, solved


@pytest.fixture(scope="module")
def processes():
    """They find the functions of tests by their module's name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.path.dirname(worker_tasks.__file__))
        found = LocalProcesses(2)
        list(found.map(worker_tasks.scaled, 1, range(2)))
        yield found
        found.close()


def test_the_work_is_done_by_other_processes_on_one_thread_each(processes):
    found = {process for process, _ in processes.map(worker_tasks.process_and_thread, None, range(20))}
    assert len(found) == 2
    assert os.getpid() not in found
    assert list(processes.map(worker_tasks.threads, None, range(3))) == [([1], 1)] * 3


def test_results_come_in_order_and_errors_as_they_were(processes):
    assert list(processes.map(worker_tasks.slow_first, None, range(6))) == list(range(6))
    results = processes.map(worker_tasks.failing_at, 2, range(9))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(PassError, match="layer 2 is broken — repair it") as caught:
        next(results)
    assert caught.value.hint == "repair it"
    assert list(processes.map(worker_tasks.scaled, 2, range(3))) == [0, 2, 4]


def test_a_process_reads_what_is_shared_once_and_cannot_change_it(processes):
    shared = {"weight": np.ones(10**6), "half": np.ones(3, ml_dtypes.bfloat16)}
    seen = list(processes.map(worker_tasks.identity_of_shared, shared, range(12)))
    first = [process for process, again in seen if not again]
    assert len(first) == len(set(first)) == 2
    with pytest.raises(ValueError, match="read-only"):
        list(processes.map(worker_tasks.changes_shared, shared["weight"], [1.0]))
    assert list(processes.map(worker_tasks.type_of_shared, shared["half"], [0])) == ["bfloat16"]


def test_a_process_that_grows_stays(monkeypatch):
    """Loky takes a growth of 300 MB for a leak; what is shared is mapped, and counts."""
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(worker_tasks.__file__))
    alone = LocalProcesses(1)
    assert len(set(alone.map(worker_tasks.growing, None, [0, 350_000_000, 0, 0]))) == 1
    alone.close()


def test_bits_are_those_of_threads(processes):
    matrix = np.random.default_rng(0).standard_normal((700, 500)).astype(np.float32)
    columns = [matrix[index].copy() for index in range(6)]
    here = list(LocalWorkers(2).map(worker_tasks.product, matrix, columns))
    assert list(processes.map(worker_tasks.product, matrix, columns)) == here


@pytest.mark.parametrize("name", ["gptq", "spqr"])
def test_a_weight_has_the_same_integers(name, processes):
    assert solved(name, processes) == solved(name, SERIAL)


@pytest.mark.slow
def test_a_compilation_gives_the_same_bytes(processes, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "_NARROWEST", 16)
    assert compiled(PASSES["gptq"], processes, tmp_path) == compiled(PASSES["gptq"], 2, tmp_path)


def test_a_process_that_is_lost_is_said_and_replaced_for_the_next_work(processes, tmp_path):
    with pytest.raises(WorkerError, match=r"a process was lost.*ask for fewer processes"):
        list(processes.map(worker_tasks.killed, str(tmp_path), range(6)))
    assert list(processes.map(worker_tasks.scaled, 2, range(3))) == [0, 2, 4]


def test_what_may_be_asked_for():
    for asked, count in (("processes", None), ("processes:3", 3)):
        with opened_workers(asked) as found:
            assert isinstance(found, LocalProcesses)
            assert count in (None, found.count)
            assert found._started is None  # before there is work
    for wrong in ("processes:", "processes:many", "processes:-1"):
        with pytest.raises(InputError, match="workers: expected"), opened_workers(wrong):
            pass
    with pytest.raises(InputError, match="expected a positive number of processes, found 0"):
        LocalProcesses(0)


@pytest.mark.slow
def test_a_script_needs_no_guard_and_leaves_no_process(tmp_path):
    """Processes that ran the script again would start processes, and so on."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import worker_tasks
            from planish.runtime.workers import opened_workers

            print("here")
            with opened_workers("processes:2") as workers:
                print(sorted({process for process, _ in workers.map(
                    worker_tasks.process_and_thread, None, range(20))}))
            """
        )
    )
    helpers = os.path.dirname(worker_tasks.__file__)
    path = os.pathsep.join([helpers, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": path},
        check=True,
        capture_output=True,
        text=True,
    )
    here, found = done.stdout.splitlines()
    assert here == "here"
    for process in found.strip("[]").split(", "):
        with pytest.raises(ProcessLookupError):
            os.kill(int(process), 0)
