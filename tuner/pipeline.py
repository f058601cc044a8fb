"""The run: compile on all cores, measure one configuration at a time, confirm, write; study after study.

On a GPU compilation runs ahead, across studies, while the device measures. On the CPU target both need the same cores, so they take
turns: nothing compiles while a configuration is timed.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna

from mhc.schema import Entry
from tuner.compile_job import compile_job
from tuner.confirm import decide
from tuner.display import Display
from tuner.effort import Effort
from tuner.errors import TuneError
from tuner.hardware import Hardware
from tuner.measure_job import confirm_job, copy_job, measure_job
from tuner.search import INFEASIBLE, Result, Search, Task, config_key
from tuner.timing import median, median_interval
from tuner.workers import WorkerCrash, WorkerError, WorkerPool, WorkerTimeout
from tuner.writer import ProfileWriter, make_provenance

COMPILE_TIMEOUT_S = 120.0
MEASURE_TIMEOUT_S = 120.0
CONFIRM_TIMEOUT_S = 240.0
POLL_S = 0.2

#: Studies whose configurations may be compiled before their turn.
LOOKAHEAD = {"cpu": 6, "gpu": 12}
#: Measurements handed to the measuring process: the next one starts while this process stores the last.
MEASURE_DEPTH = 2


@dataclass(frozen=True)
class Settings:
    """What the command line decided. Times in seconds."""

    hardware: Hardware
    effort: Effort
    trials: int
    time_limit: float | None
    seed: int
    jobs: int
    command: str
    log: Path | None = None


class Study:
    """A search and where it stands: compiled candidates, and whether it waits for its confirmation."""

    def __init__(self, search: Search, position: int) -> None:
        self.search, self.position = search, position
        self.ready: deque[dict[str, Any]] = deque()
        self.compiling: dict[Future[Any], dict[str, Any]] = {}
        self.meta: dict[str, dict[str, Any]] = {}
        self.closed = False
        self.state = "searching"

    @property
    def task(self) -> Task:
        return self.search.task

    @property
    def open(self) -> bool:
        return self.state in ("searching", "confirming", "confirmation under way")


class Pipeline:
    """One run over ``tasks``. :meth:`run` returns when every study is done or time is up; results are in ``entries``."""

    def __init__(
        self, settings: Settings, tasks: list[Task], storage: optuna.storages.BaseStorage, writer: ProfileWriter, display: Display
    ) -> None:
        self.settings, self.writer, self.display = settings, writer, display
        self.target = settings.hardware.arch
        self.exclusive = settings.hardware.is_cpu
        self.lookahead = LOOKAHEAD["cpu" if self.exclusive else "gpu"]
        self.entries: list[Entry] = []
        self.unreached: list[str] = []
        self.copy_gbps = 0.0
        self.measured = 0
        self._storage = storage
        self._compiled: dict[tuple[Any, ...], Future[Any]] = {}
        self._measuring: deque[tuple[Future[Any], Study, list[dict[str, Any]], bool]] = deque()
        self._last: Study | None = None
        self._start = time.monotonic()
        self._todo = 0
        self.studies: list[Study] = []
        for task in tasks:
            search = Search(task, storage, settings.trials, settings.seed, hints=partial(self._hints, task))
            self.studies.append(Study(search, len(self.studies)))

    # -- what each study may try -------------------------------------------------------------------------------------------------

    def _hints(self, task: Task) -> list[dict[str, Any]]:
        """Configurations that the same program tried at another T: their compilation is free."""
        tried = []
        for study in self.studies:
            if study.task is not task and (study.task.kernel, study.task.p) == (task.kernel, task.p):
                tried += study.search.proposed
        return tried

    def _window(self) -> list[Study]:
        return [s for s in self.studies if s.open][: self.lookahead]

    def _out_of_time(self, study: Study) -> bool:
        """Each study must be through by its share of the time; what early ones leave, later ones have."""
        limit = self.settings.time_limit
        if limit is None:
            return False
        share = (study.position + 1 + self.lookahead) / (len(self.studies) + self.lookahead)
        return time.monotonic() - self._start > 0.93 * limit * share

    @property
    def _time_up(self) -> bool:
        limit = self.settings.time_limit
        return limit is not None and time.monotonic() - self._start > limit

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self._start

    def left_s(self) -> float | None:
        """An estimate: the time limit's rest at most, else what the finished studies took each."""
        spent = time.monotonic() - self._start
        fresh = sum(s.state == "done" and s.search.measured_now > 0 for s in self.studies)
        rest = None if self.settings.time_limit is None else self.settings.time_limit - spent
        if fresh == 0:
            return rest
        guess = spent / fresh * sum(s.open for s in self.studies)
        return guess if rest is None else min(guess, rest)

    # -- the loop -----------------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Tune. Raises KeyboardInterrupt as it comes; what is finished then is written already."""
        hide = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TILELANG_PRINT_ON_COMPILATION": "0"}
        # OpenMP threads that spin lose their core on a busy machine, and then a 20 us cast takes a scheduler's quantum of 8 ms
        runner_env = {"TILELANG_PRINT_ON_COMPILATION": "0", "OMP_WAIT_POLICY": "passive"}
        with (
            WorkerPool(self.settings.jobs, env=hide, log=self.settings.log, nice=10) as self._compilers,
            WorkerPool(1, env=runner_env, log=self.settings.log) as self._runner,
        ):
            self._copy = self._runner.submit(copy_job, self.target, timeout=MEASURE_TIMEOUT_S)
            if self.exclusive:
                self._finish_copy()
            while any(s.open for s in self.studies):
                self._close_late()
                self._submit_compiles()
                self._submit_measure()
                self._retire()
                self._wait()
            self._finish_copy()

    def _finish_copy(self) -> None:
        if self.copy_gbps == 0.0:
            try:
                self.copy_gbps = self._copy.result()
            except WorkerError as e:
                raise TuneError(f"the copy that measures bandwidth failed on {self.settings.hardware.name}: {e}") from None

    def _close_late(self) -> None:
        for study in self.studies:
            started = study.search.results or study.search.inflight
            if study.state != "searching" or study.closed or not started or not self._out_of_time(study):
                continue
            study.closed = True
            for future, cfg in list(study.compiling.items()):
                if config_key(cfg) != config_key(study.search.default) or self._time_up:
                    del study.compiling[future]
                    study.search.withdraw(cfg)
                    self._cancel(study, future, cfg)
        if self._time_up:
            for study in self.studies:
                if study.state == "searching":
                    for cfg in [*study.ready, *study.compiling.values()]:
                        study.search.withdraw(cfg)
                    study.ready.clear()
                    study.compiling.clear()

    def _cancel(self, study: Study, future: Future[Any], cfg: dict[str, Any]) -> None:
        """Take a compile out of the queue unless another study waits for it."""
        if not any(future in other.compiling for other in self.studies) and future.cancel():
            del self._compiled[study.task.kernel, study.task.p, config_key(cfg)]

    def _submit_compiles(self) -> None:
        if self.exclusive and (self._measuring or any(s.ready or s.state == "confirming" for s in self.studies)):
            return
        capacity = (8 if self.exclusive else 3) * self.settings.jobs
        underway = sum(len(s.compiling) for s in self.studies)
        # a study that asked for all its trials at once could not learn from any of them
        batch = max(4, -(-self.settings.trials // 4))
        window = self._window()
        # first every default, then the batches; a study late before it began gets its default alone
        rooms = [(s, 1) for s in window if not s.search.results] + [(s, batch) for s in window if not self._out_of_time(s)]
        for study, room in rooms:
            while study.state == "searching" and not study.closed and underway < capacity and len(study.search.inflight) < room:
                cfg = study.search.propose()
                if cfg is None:
                    break
                study.compiling[self._compile(study, cfg)] = cfg
                underway += 1

    def _compile(self, study: Study, cfg: dict[str, Any]) -> Future[Any]:
        task = study.task
        key = (task.kernel, task.p, config_key(cfg))
        future = self._compiled.get(key)
        if future is None:
            future = self._compilers.submit(
                compile_job, task.kernel, task.p, cfg, self.target, timeout=COMPILE_TIMEOUT_S, priority=study.position
            )
            self._compiled[key] = future
        return future

    def _submit_measure(self) -> None:
        if self.exclusive and any(not f.done() for f in self._compiled.values()):
            return
        while len(self._measuring) < MEASURE_DEPTH:
            waiting = [s for s in self._window() if s.ready or s.state == "confirming"]
            if not waiting:
                return
            # stay with the shape whose inputs and answer the measuring process holds; but where time may run out, every default comes first
            new = [s for s in waiting if s.ready and not s.search.results] if self.settings.time_limit is not None else []
            study = new[0] if new else self._last if self._last in waiting else waiting[0]
            assert study is not None
            self._last = study
            self._measuring.append(self._measure(study) if study.ready else self._confirm(study))

    def _measure(self, study: Study) -> tuple[Future[Any], Study, list[dict[str, Any]], bool]:
        task, search, cfg = study.task, study.search, study.ready.popleft()
        # the default is never cut short: everything is compared with it
        best_us = None if cfg == search.default else search.best_us
        args = (task.kernel, task.p, task.T, cfg, self.target, self.settings.effort, self.settings.seed, best_us)
        return self._runner.submit(measure_job, *args, timeout=MEASURE_TIMEOUT_S), study, [cfg], False

    def _confirm(self, study: Study) -> tuple[Future[Any], Study, list[dict[str, Any]], bool]:
        study.state = "confirmation under way"
        task, cfgs = study.task, self._finalists(study)
        args = (task.kernel, task.p, task.T, cfgs, self.target, self.settings.effort, self.settings.seed, self.exclusive)
        return self._runner.submit(confirm_job, *args, timeout=CONFIRM_TIMEOUT_S), study, cfgs, True

    def _finalists(self, study: Study) -> list[dict[str, Any]]:
        search = study.search
        correct = {config_key(cfg): cfg for cfg, _ in search.ranking}
        default = correct.pop(config_key(search.default), None)
        best = list(correct.values())
        return ([default] if default is not None else []) + best[: self.settings.effort.finalists]

    def _retire(self) -> None:
        """Studies with nothing under way: confirm, take a stored confirmation, or give up."""
        for study in self.studies:
            search = study.search
            if study.state != "searching" or study.compiling or study.ready or search.inflight:
                continue
            if search.left > 0 and not study.closed and not self._time_up:
                continue
            stored = search.confirmation
            if stored is not None:
                self._finish(study, stored)
            elif search.ranking:
                study.state = "confirming"
            else:
                study.state = "failed"
                reasons = [r.reason for _, r in search.results.values() if r.reason]
                why = f"no configuration worked; {reasons[0]}" if reasons else "time was up before its turn"
                self.unreached.append(f"{study.task.label}: {why}")

    def _wait(self) -> None:
        futures: set[Future[Any]] = {f for s in self.studies for f in s.compiling}
        futures |= {m[0] for m in self._measuring}
        if not futures:
            # compiles that nobody waits for any more still keep the cores from timing
            futures = {f for f in self._compiled.values() if not f.done()}
        if futures:
            wait(futures, timeout=POLL_S, return_when=FIRST_COMPLETED)
        while self._measuring and self._measuring[0][0].done():
            future, study, cfgs, confirmation = self._measuring.popleft()
            self._submit_measure()
            if confirmation:
                self._confirmed(study, cfgs, future)
            else:
                self._measured(study, cfgs[0], future)
        for study in self.studies:
            for future in [f for f in study.compiling if f.done()]:
                self._compiled_one(study, study.compiling.pop(future), future)
        self._show()

    # -- what came back -----------------------------------------------------------------------------------------------------------

    def _compiled_one(self, study: Study, cfg: dict[str, Any], future: Future[Any]) -> None:
        try:
            info = future.result()
        except WorkerError as e:
            study.search.tell(cfg, Result(outcome=_failure(e, "compile_error"), reason=str(e)))
            return
        if info["infeasible"]:
            study.search.tell(cfg, Result(outcome=INFEASIBLE, reason=info["infeasible"], shared_bytes=info["shared_bytes"]))
            return
        study.meta[config_key(cfg)] = info
        first = config_key(cfg) == config_key(study.search.default)
        study.ready.appendleft(cfg) if first else study.ready.append(cfg)

    def _measured(self, study: Study, cfg: dict[str, Any], future: Future[Any]) -> None:
        info = study.meta.get(config_key(cfg), {})
        about: dict[str, Any] = {"compile_s": info.get("seconds"), "shared_bytes": info.get("shared_bytes")}
        try:
            result = Result(**future.result(), **about)
        except WorkerError as e:
            result = Result(outcome=_failure(e, "run_error"), reason=str(e), **about)
        study.search.tell(cfg, result)
        self.measured += 1

    def _confirmed(self, study: Study, cfgs: list[dict[str, Any]], future: Future[Any]) -> None:
        search, task, hardware = study.search, study.task, self.settings.hardware
        try:
            samples = future.result()
        except WorkerError as e:
            study.state = "failed"
            self.unreached.append(f"{task.label}: the confirmation failed; {e}")
            return
        self._finish_copy()
        reference = samples.pop() if self.exclusive else None
        verdict = decide(samples, reference)
        if cfgs[0] != search.default:
            why = search.results[config_key(search.default)][1].reason if config_key(search.default) in search.results else "not measured"
            self.display.note(f"{task.label}: the default configuration does not work here: {why}")
            order = min(range(len(cfgs)), key=lambda i: median(samples[i]))
            verdict = replace(decide([samples[order]], reference), verdict="win", chosen=order)
        cfg = cfgs[verdict.chosen]
        result = search.results[config_key(cfg)][1]
        use_reference = verdict.reference_wins and hardware.is_cpu
        time_us = verdict.reference_us if use_reference and verdict.reference_us else verdict.time_us
        floor = task.spec.bytes_moved(task.p, task.T)
        gbps = floor / time_us / 1e3
        common = {
            "kernel": task.kernel,
            "n": task.p.n,
            "dtype": task.p.dtype,
            "tokens": task.T,
            "impl": "reference" if use_reference else "tilelang",
            "config": cfg,
            "time_us": round(time_us, 3),
            "time_ci_us": _rounded(median_interval(reference) if use_reference and reference else verdict.time_ci_us),
            "gbps": round(gbps, 2),
            "copy_share": round(gbps / self.copy_gbps, 4),
            "default_us": round(verdict.default_us, 3),
            "runner_up_us": None if verdict.runner_up_us is None else round(verdict.runner_up_us, 3),
            "verdict": verdict.verdict,
            "error": {name: float(f"{e:.3g}") for name, e in result.error.items()},
            "source_hash": task.spec.source_hash,
        }
        stored = {"entry": common, "reference_us": verdict.reference_us}
        search.confirm(stored)
        self._finish(study, stored)

    def _finish(self, study: Study, stored: dict[str, Any]) -> None:
        study.state = "done"
        self._finish_copy()
        # through JSON in the storage, a tuple comes back as a list
        common = {**stored["entry"], "time_ci_us": tuple(stored["entry"]["time_ci_us"])}
        entries = [Entry(**{**common, "C": C}) for C in study.task.covers]
        self.entries += entries
        trials = sum(s.search.count for s in self.studies)
        settings = self.settings
        self.writer.add(entries, make_provenance(settings.hardware, self.copy_gbps, settings.seed, trials, settings.command))
        done = sum(not s.open for s in self.studies)
        search = study.search
        self.display.finished(study.task.label, entries[0], search.count, search.measured_now, done, len(self.studies), self.left_s())

    def _show(self) -> None:
        study = self._last if self._last is not None and self._last.open else next((s for s in self.studies if s.open), None)
        if study is None:
            return
        search = study.search
        compiling = sum(len(s.compiling) for s in self.studies)
        ready = sum(len(s.ready) for s in self.studies)
        done = sum(not s.open for s in self.studies)
        self.display.progress(
            study.task.label,
            search.count,
            search.trials,
            search.best_us,
            done,
            len(self.studies),
            self.left_s(),
            f"{compiling} compiling, {ready} ready",
        )

    def raw(self) -> dict[str, Any]:
        """Everything per trial, as plain data for JSON."""
        studies = []
        for study in self.studies:
            search, task = study.search, study.task
            trials = [{"config": cfg, **asdict(result)} for cfg, result in search.results.values()]
            studies.append(
                {
                    "kernel": task.kernel,
                    "n": task.p.n,
                    "C": list(task.covers),
                    "dtype": task.p.dtype,
                    "tokens": task.T,
                    "study": task.key,
                    "state": study.state,
                    "default": search.default,
                    "confirmation": search.confirmation,
                    "trials": trials,
                }
            )
        return {
            "schema_version": 1,
            "hardware": asdict(self.settings.hardware),
            "copy_gbps": self.copy_gbps,
            "seed": self.settings.seed,
            "command": self.settings.command,
            "seconds": round(self.seconds, 1),
            "studies": studies,
        }


def _failure(error: WorkerError, otherwise: str) -> str:
    return "timeout" if isinstance(error, WorkerTimeout) else "crash" if isinstance(error, WorkerCrash) else otherwise


def _rounded(interval: tuple[float, float]) -> tuple[float, float]:
    return round(interval[0], 3), round(interval[1], 3)
