"""One device and the process that measures on it: what it was given, and where its time goes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuner.devices import Device
from tuner.phases import Phases
from tuner.study import Config, Study
from tuner.workers import MEASURE_ENV, WorkerPool


@dataclass
class Job:
    """One measurement (of one configuration) or confirmation (of several)."""

    future: Future[Any]
    study: Study
    configs: list[Config]
    confirmation: bool
    since: float = field(default_factory=time.monotonic)
    until: float = 0.0

    def __post_init__(self) -> None:
        def done(_: Future[Any]) -> None:
            self.until = time.monotonic()

        self.future.add_done_callback(done)


class Runner:
    """``jobs``: under way, first come first served. ``last``: the study whose inputs and answer the process holds."""

    def __init__(self, device: Device, log: Path | None, phases: Phases) -> None:
        self.device = device
        self.pool = WorkerPool(1, env={**MEASURE_ENV, **device.env}, log=log)
        self.jobs: deque[Job] = deque()
        self.last: Study | None = None
        self.copy: Future[float] | None = None
        self._phases = phases
        self._idle_since: float | None = time.monotonic()
        self._done_at = 0.0

    def start_copy(self, job: Callable[[str], float], target: str, timeout: float) -> None:
        """The first thing it does: bandwidth, which also starts the process."""
        start = time.monotonic()
        self.copy = self.pool.submit(job, target, timeout=timeout)

        def done(_: Future[float]) -> None:
            self._phases.add("copy", time.monotonic() - start)
            self._done_at = time.monotonic()
            if self._idle_since is not None:
                self._idle_since = self._done_at

        self.copy.add_done_callback(done)

    def submit(self, study: Study, configs: list[Config], confirmation: bool, waited_for: str, job: Any, args: Any, timeout: float) -> None:
        """Queue a job. ``waited_for``: the phase that the time counts as, where the device had nothing to do."""
        if self._idle_since is not None and (self.copy is None or self.copy.done()):
            self._phases.add(waited_for, time.monotonic() - self._idle_since)
        self._idle_since = None
        self.last = study
        self.jobs.append(Job(self.pool.submit(job, *args, timeout=timeout), study, configs, confirmation))

    def finished(self) -> Job | None:
        """The next job that is through, or None."""
        if not self.jobs or not self.jobs[0].future.done():
            return None
        job = self.jobs.popleft()
        until = job.until or time.monotonic()  # the callback may come a moment after the result
        took = until - max(job.since, self._done_at)
        self._done_at = until
        answer = job.future.result() if job.future.exception() is None else {}
        if job.confirmation:
            self._phases.add("confirm", took)
        else:
            gate, timing = (float(answer.get(name) or 0.0) for name in ("gate_s", "timing_s"))
            self._phases.add("gate", min(gate, took))
            self._phases.add("timing", min(timing, took - min(gate, took)))
            self._phases.add("load", took - gate - timing)
        if not self.jobs:
            self._idle_since = until
        return job
