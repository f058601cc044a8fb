"""Workers over planted jobs in processes of their own, for tests that kill them."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from optuna.trial import TrialState
from rich.console import Console

from tests.tuner import planted
from tests.tuner.conftest import EFFORT, HARDWARE, make_task
from tuner import identity, pipeline
from tuner.display import Display
from tuner.pipeline import Pipeline
from tuner.settings import Settings
from tuner.storage import open_storage
from tuner.store import Store
from tuner.task import Order
from tuner.writer import ProfileWriter

HEARTBEAT_S, GRACE_S = 1, 2

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.tuner.fleet"])


def start(url: str, folder: Path, shapes: list[tuple[int, int]], seed: int, far_away: bool) -> ForkServerProcess:
    """A worker on the studies of ``pre_bwd`` at shapes of (C, trials). ``far_away``: as if on a machine of its own, where nobody sees that
    its process died.
    """
    process = _context.Process(target=_work, args=(url, folder, shapes, seed, far_away), daemon=False)
    process.start()
    return process


def _work(url: str, folder: Path, shapes: list[tuple[int, int]], seed: int, far_away: bool) -> None:
    jobs = {"compile_job": planted.compile_ok, "measure_job": planted.measure_a_while, "confirm_job": planted.confirm_ok}
    for name, job in {**jobs, "copy_job": planted.copy_ok}.items():
        setattr(pipeline, name, job)
    if far_away:
        identity._machine = lambda: None
    log = folder / "workers.log"
    settings = Settings(HARDWARE, EFFORT, 0, None, 0, jobs=1, command="mhc-tune", log=log, search_seed=seed)
    wanted = [Order(make_task(C=C), trials, EFFORT, 0, "tpe") for C, trials in shapes]
    store = Store(open_storage(url, HEARTBEAT_S, GRACE_S), url)
    run = Pipeline(settings, wanted, store, ProfileWriter(folder / "cpu.yaml", HARDWARE), Display(Console(quiet=True)))
    run.run()
    store.close()


def deaths(rows: list[Any]) -> int:
    """Trials whose worker died at them: ended without a result, and not by the worker."""
    return sum(row.state == TrialState.FAIL and "withdrawn" not in row.user_attrs for row in rows)


def holders(rows: list[Any]) -> set[int]:
    """Process ids of the workers that are at a trial."""
    return {row.user_attrs["worker"]["pid"] for row in rows if not row.state.is_finished()}
