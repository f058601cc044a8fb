"""Timing entries in runs: fresh processes, one a revision, that take turns on the device in small batches.

A run starts a process for each side and times every entry in it, A B B A A B ..., while this process holds the device's lock alone, so that
drift hits both sides alike and no other tuner runs in between. What crashes, hangs or loses the device costs that entry and its process;
the run goes on with a new one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape

from tuner.compile_each import compile_each, progress_bar
from tuner.device_lock import DeviceBusy, hold
from tuner.device_process import GPU_GONE
from tuner.display import duration
from tuner.latency_case import Case
from tuner.latency_job import batch_job, build_job, copy_job, prepare_job, start_job
from tuner.timing import median
from tuner.waiting import answer
from tuner.workers import MEASURE_ENV, WorkerError, WorkerPool

#: Seconds for one job: starting, making inputs and the first call, or a batch.
JOB_S = 120.0
#: Seconds to wait for the device while others measure on it.
BUSY_S = 180.0
SEED = 0


@dataclass(frozen=True)
class Budget:
    """How long one entry is timed in a run: batches of ``rounds`` samples from each side in turn, at least two and at most ``batches``,
    none begun after ``seconds`` a side. ``ahead``: runs whose processes start while another is measured; not on a CPU.
    """

    rounds: int
    batches: int
    seconds: float
    ahead: int


GPU_BUDGET = Budget(rounds=8, batches=8, seconds=0.3, ahead=2)
CPU_BUDGET = Budget(rounds=3, batches=4, seconds=0.3, ahead=0)


@dataclass(frozen=True)
class Side:
    """One revision: ``cases`` by their names. ``path``: where its processes import from (tuner/against.py), None for here."""

    name: str
    cases: Mapping[str, Case]
    path: tuple[str, ...] | None = None


@dataclass
class Measured:
    """An entry of one side. ``runs``: the median of each in microseconds; ``clocks``: SM clock in MHz, None where not known; ``dirty``:
    what disturbed each, or None; ``samples`` kept and ``dropped``; ``seconds`` it took.
    """

    runs: list[float] = field(default_factory=list)
    clocks: list[float | None] = field(default_factory=list)
    dirty: list[str | None] = field(default_factory=list)
    samples: int = 0
    dropped: int = 0
    seconds: float = 0.0

    @property
    def clock_mhz(self) -> float | None:
        """The median over the runs."""
        known = [mhz for mhz in self.clocks if mhz is not None]
        return median(known) if known else None

    @property
    def disturbed(self) -> str | None:
        """What disturbed more than half of the runs, or None."""
        found = [why for why in self.dirty if why is not None]
        return found[0] if 2 * len(found) > len(self.dirty) else None


class Runs:
    """Runs over the names that every side has. ``lock``: the device's (tuner/device_lock.py). ``env``: what shows a process its device.

    After :meth:`measure`, or an exception out of it: ``found[side][name]``, ``failed`` (name -> on one line why it has no time),
    ``programs`` (side -> name -> hash of the generated text), ``copy_gbps`` of the runs, ``done`` runs, and ``lost``: why nothing more can
    be measured.
    """

    def __init__(
        self, sides: Sequence[Side], target: str, lock: str, console: Console, env: Mapping[str, str] | None = None, jobs: int | None = None
    ) -> None:
        self.sides, self.target = sides, target
        self.names = [name for name in sides[0].cases if all(name in side.cases for side in sides)]
        self.found: dict[str, dict[str, Measured]] = {side.name: {} for side in sides}
        self.failed: dict[str, str] = {}
        self.programs: dict[str, dict[str, str | None]] = {side.name: {} for side in sides}
        self.copy_gbps: list[float] = []
        self.done = 0
        self.lost: str | None = None
        self.budget = CPU_BUDGET if target == "cpu" else GPU_BUDGET
        self._lock, self._console, self._env, self._jobs = lock, console, {**MEASURE_ENV, **(env or {})}, jobs

    def compile(self) -> None:
        """Compile every program of every side; nothing is timed meanwhile."""
        for side in self.sides:
            what = "compiling" if len(self.sides) == 1 else f"compiling {side.name}"
            todo = {name: (side.cases[name], self.target) for name in self.names if name not in self.failed}
            for name, built in compile_each(build_job, todo, self._jobs, self._console, what, side.path).items():
                if isinstance(built, WorkerError):
                    self.failed[name] = self._of(side, f"not compiled: {built}")
                else:
                    self.programs[side.name][name] = built["program"]

    def measure(self, runs: int) -> None:
        """Measure so many runs; fewer where the device is lost. Compile first."""
        start = time.monotonic()
        pending: deque[list[WorkerPool]] = deque()
        try:
            with progress_bar(self._console) as progress:
                bar = progress.add_task("measuring", total=runs * len(self.names))
                for run in range(runs):
                    if all(name in self.failed for name in self.names):
                        return
                    while len(pending) < min(1 + self.budget.ahead, runs - run):
                        pending.append([WorkerPool(1, env=self._env, path=side.path) for side in self.sides])
                        for pool in pending[-1]:
                            pool.submit(start_job, timeout=JOB_S)
                    progress.update(bar, description=f"measuring, run {run + 1} of {runs}", completed=run * len(self.names))
                    for _ in self._run(pending[0]):
                        progress.advance(bar)
                    for pool in pending.popleft():
                        pool.close()
                    if self.lost is not None:
                        return
                    self.done += 1
                    if not self._console.is_terminal:  # a CI log: say that it lives
                        took, good = time.monotonic() - start, len(self.names) - len(self.failed)
                        self._console.print(escape(f"[run {self.done}/{runs}] {duration(took)} {good} entries"), soft_wrap=True)
        finally:
            for pools in pending:
                for pool in pools:
                    pool.close()

    def _run(self, pools: Sequence[WorkerPool]) -> Iterator[None]:
        """One run, an entry a step."""
        try:
            for pool in pools:  # started, and none starts beside a timing
                answer(pool.submit(start_job, timeout=JOB_S))
            with hold(self._lock, timeout_s=BUSY_S):
                self.copy_gbps.append(answer(pools[0].submit(copy_job, self.target, timeout=JOB_S)))
        except (WorkerError, DeviceBusy) as e:
            self.lost = str(e).removeprefix("FatalError: ")
            return
        for name in self.names:
            if name not in self.failed:
                try:
                    self._entry(name, pools)
                except _Failed as e:
                    if GPU_GONE in str(e):
                        self.lost = str(e).removeprefix("FatalError: ")
                        return
                    self.failed[name] = str(e)
            yield

    def _entry(self, name: str, pools: Sequence[WorkerPool]) -> None:
        start = time.monotonic()
        for side, pool in zip(self.sides, pools, strict=True):
            self._ask(side, pool, prepare_job, side.cases[name], self.target, SEED)
        taken: list[list[dict[str, Any]]] = [[] for _ in self.sides]
        try:
            with hold(self._lock, timeout_s=BUSY_S):
                began = time.monotonic()
                for batch in range(self.budget.batches):
                    if batch >= 2 and time.monotonic() - began > self.budget.seconds * len(self.sides):
                        break
                    order = list(range(len(self.sides)))
                    for i in order if batch % 2 == 0 else reversed(order):
                        taken[i].append(self._ask(self.sides[i], pools[i], batch_job, self.target, self.budget.rounds))
        except DeviceBusy as e:
            raise _Failed(str(e)) from None
        for side, batches in zip(self.sides, taken, strict=True):
            kept = self.found[side.name].setdefault(name, Measured())
            samples = [us for batch in batches for us in batch["samples"]]
            clocks = [batch["clock_mhz"] for batch in batches if batch["clock_mhz"] is not None]
            dirty = [batch["dirty"] for batch in batches if batch["dirty"] is not None]
            kept.runs.append(median(samples))
            kept.clocks.append(median(clocks) if clocks else None)
            kept.dirty.append(dirty[0] if 2 * len(dirty) > len(batches) else None)
            kept.samples += len(samples)
            kept.dropped += sum(batch["dropped"] for batch in batches)
            kept.seconds += time.monotonic() - start

    def _ask(self, side: Side, pool: WorkerPool, job: Any, *args: Any) -> Any:
        try:
            return answer(pool.submit(job, *args, timeout=JOB_S))
        except WorkerError as e:
            raise _Failed(self._of(side, str(e))) from None

    def _of(self, side: Side, why: str) -> str:
        return why if side is self.sides[0] else f"{side.name}: {why}"


class _Failed(Exception):
    """An entry has no time, on one line."""
