"""Compiles of all studies: each program once, however many studies want it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from tuner.settings import Settings
from tuner.study import Config, Study
from tuner.task import config_key
from tuner.workers import COMPILE_ENV, WorkerPool, WorkerTrouble


class Compiling:
    """A pool of niced processes; ``job`` is what they do with each configuration, within ``timeout`` seconds."""

    def __init__(self, settings: Settings, job: Callable[..., Any], timeout: float) -> None:
        self.pool = WorkerPool(settings.jobs, env=COMPILE_ENV, log=settings.log, nice=10)
        self._job, self._timeout, self._target = job, timeout, settings.hardware.arch
        self.futures: dict[tuple[Any, ...], Future[Any]] = {}

    @property
    def busy(self) -> bool:
        return any(not future.done() for future in self.futures.values())

    def submit(self, study: Study, cfg: Config) -> None:
        """Compile a configuration for a study, or let the study share the compile of another. Early studies come first."""
        task = study.task
        key = (task.kernel, task.p, config_key(cfg))
        future = self.futures.get(key)
        if future is None or (future.done() and isinstance(future.exception(), WorkerTrouble)):
            args = (task.kernel, task.p, cfg, self._target)
            future = self.futures[key] = self.pool.submit(self._job, *args, timeout=self._timeout, priority=study.position)
        study.compiling[future] = cfg

    def cancel(self, future: Future[Any], studies: list[Study]) -> None:
        """Take a compile out of the queue unless one of ``studies`` waits for it."""
        if not any(future in study.compiling for study in studies) and future.cancel():
            self.futures = {key: other for key, other in self.futures.items() if other is not future}
