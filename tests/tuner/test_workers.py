"""tuner/workers.py: a job's fault stays with its job."""

import operator
import os
import signal
import sys
import time

import pytest

from tests.tuner import planted
from tuner.workers import WorkerCrash, WorkerError, WorkerPool, WorkerTimeout, WorkerTrouble


@pytest.fixture
def pool():
    with WorkerPool(1) as pool:
        yield pool


def test_results_come_back_and_one_process_serves_many_jobs(pool):
    pids = {pool.submit(os.getpid, timeout=30).result() for _ in range(3)}
    assert len(pids) == 1
    assert pool.submit(operator.add, 2, 3, timeout=30).result() == 5


@pytest.mark.parametrize(("job", "args", "said"), [(os._exit, (3,), "exit code 3"), (signal.raise_signal, (signal.SIGSEGV,), "SIGSEGV")])
def test_a_crash_names_its_cause_and_the_pool_goes_on(pool, job, args, said):
    with pytest.raises(WorkerCrash, match=said):
        pool.submit(job, *args, timeout=30).result()
    assert pool.submit(operator.add, 2, 3, timeout=30).result() == 5


def test_a_hang_is_killed_after_its_limit_and_the_pool_goes_on(pool):
    pool.submit(os.getpid, timeout=30).result()
    start = time.monotonic()
    with pytest.raises(WorkerTimeout, match="within 1 s"):
        pool.submit(time.sleep, 60, timeout=1).result()
    assert time.monotonic() - start < 10
    assert pool.submit(operator.add, 2, 3, timeout=30).result() == 5


def test_nothing_is_imported_from_the_working_folder(hostile_folder, tmp_path):
    log = tmp_path / "log"
    with WorkerPool(1, log=log) as pool:
        path = pool.submit(planted.import_path, timeout=120).result()
    assert str(hostile_folder) not in path
    assert "" not in path
    assert not log.read_text()


def test_an_exception_arrives_as_one_line(pool):
    with pytest.raises(WorkerError, match="ZeroDivisionError: division by zero"):
        pool.submit(operator.truediv, 1, 0, timeout=30).result()


def test_a_process_whose_device_is_beyond_use_is_replaced(pool):
    pid = pool.submit(os.getpid, timeout=30).result()
    with pytest.raises(WorkerCrash, match="illegal memory access"):
        pool.submit(planted.poisoned_device, timeout=30).result()
    assert pool.submit(os.getpid, timeout=30).result() != pid


def test_a_process_that_cannot_start_or_is_gone_says_nothing_of_the_job(monkeypatch):
    with WorkerPool(1) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", "/bin/false")
            with pytest.raises(WorkerTrouble, match=r"did not start: its process died \(exit code 1\)"):
                pool.submit(os.getpid, timeout=30).result()
            patch.setattr(sys, "executable", "/no/such/python")
            with pytest.raises(WorkerTrouble, match=r"did not start: .*No such file"):
                pool.submit(os.getpid, timeout=30).result()
        assert pool.submit(operator.add, 2, 3, timeout=30).result() == 5


def test_trouble_with_the_machine_is_told_apart(pool):
    with pytest.raises(WorkerTrouble, match="held by process 1"):
        pool.submit(planted.measure_never, timeout=30).result()
    with pytest.raises(WorkerError) as e:
        pool.submit(operator.truediv, 1, 0, timeout=30).result()
    assert not isinstance(e.value, WorkerTrouble)


def test_lower_priority_runs_first(pool):
    blocker = pool.submit(time.sleep, 0.5, timeout=30)
    order = []
    for priority in (3.0, 1.0, 2.0):
        pool.submit(operator.add, 0, 0, timeout=30, priority=priority).add_done_callback(lambda _, p=priority: order.append(p))
    blocker.result()
    pool.submit(operator.add, 0, 0, timeout=30, priority=9.0).result()
    assert order == [1.0, 2.0, 3.0]


def test_closing_kills_what_still_runs():
    pool = WorkerPool(1)
    pid = pool.submit(os.getpid, timeout=30).result()
    pool.submit(time.sleep, 60, timeout=90)
    time.sleep(0.2)
    start = time.monotonic()
    pool.close()
    assert time.monotonic() - start < 5
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
