"""Several worker processes on one storage, killed with SIGKILL and stopped with SIGSTOP in mid-trial: nothing lost, nothing twice."""

import os
import random
import signal
import threading
import time

import optuna
import pytest

from mhc.profile import read_profile
from tests.tuner import fleet
from tests.tuner.conftest import make_task
from tuner.claims import CONFIG, Claims
from tuner.search import Search
from tuner.storage import open_storage
from tuner.store import Store

#: C and trials: a space in full, and a budget smaller than the space.
SHAPES = [(2560, 100), (1280, 7)]
WORKERS, KILLS = 3, 3


@pytest.mark.slow
def test_killed_and_stopped_workers_lose_nothing_and_repeat_nothing(storage_url, tmp_path):
    random.seed(0)
    storage = open_storage(storage_url, fleet.HEARTBEAT_S, fleet.GRACE_S)
    far_away = "postgresql" in storage_url
    studies = [optuna.create_study(study_name=make_task(C=C).key, storage=storage, load_if_exists=True) for C, _ in SHAPES]
    seeds = iter(range(100))
    workers = [fleet.start(storage_url, tmp_path, SHAPES, next(seeds), far_away) for _ in range(WORKERS)]
    everybody, killed, stopped, waking = list(workers), 0, None, threading.Timer(0, lambda: None)
    deadline = time.monotonic() + 90
    try:
        while killed < KILLS or stopped is None:
            assert time.monotonic() < deadline
            time.sleep(random.uniform(0.05, 0.3))
            # in mid-trial: one that holds a configuration just now
            at_it = set().union(*(fleet.holders(study.get_trials(deepcopy=False)) for study in studies))
            victims = [w for w in workers if w.pid in at_it]
            if not any(w.is_alive() for w in workers):
                break
            if not victims:
                continue
            victim = random.choice(victims)
            if stopped is None and killed >= 1:
                os.kill(victim.pid, signal.SIGSTOP)
                stopped = victim
                # it wakes up to find that what it held was taken back; not before, and not only after the loop: it may hold SQLite's lock
                waking = threading.Timer(2 * fleet.GRACE_S, os.kill, (victim.pid, signal.SIGCONT))
                waking.start()
                workers.remove(victim)
                continue
            victim.kill()
            victim.join()
            workers.remove(victim)
            killed += 1
            workers.append(fleet.start(storage_url, tmp_path, SHAPES, next(seeds), far_away))
            everybody.append(workers[-1])
        assert killed >= 2, "they were through before anybody could be killed"
        assert stopped is not None
        waking.join()
        for worker in [*workers, stopped]:
            worker.join(max(1.0, deadline - time.monotonic()))
            assert worker.exitcode == 0, _table(studies)
    finally:
        for worker in everybody:
            if worker.is_alive():
                worker.kill()
                os.kill(worker.pid, signal.SIGCONT)
            worker.join(5)
    store = Store(storage, storage_url)
    for C, trials in SHAPES:
        rows = Claims(store, make_task(C=C).key).read()
        assert not [row for row in rows if row.running], "every trial has ended"
        counted = [row.key for row in rows if row.kind == CONFIG and row.result is not None]
        assert len(counted) == len(set(counted)), "no configuration was stored twice"
        search = Search(make_task(C=C), store, trials, seed=0)
        assert len(counted) == min(trials, len(search.space.listed))
        assert search.confirmation is not None
    died = sum(fleet.deaths(study.get_trials(deepcopy=False)) for study in studies)
    assert died >= killed, "those killed in mid-trial left their trials behind"
    assert sorted(entry.C for entry in read_profile(tmp_path / "cpu.yaml").entries) == [1280, 2560]


def _table(studies):
    """Every trial in a line, for a message."""
    rows = [(s.study_name, t) for s in studies for t in s.get_trials(deepcopy=False)]
    return "\n".join(f"{name} {t.number} {t.state.name} {t.user_attrs}" for name, t in rows)
