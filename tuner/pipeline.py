"""The run: compile on all cores, measure one configuration at a time on each device, confirm, write; study after study.

On a GPU compilation runs ahead, across studies, while the devices measure. On the CPU target both need the same cores, so they take turns:
nothing compiles while a configuration is timed. Other workers may be at the same studies: the storage says what they try and found.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from functools import partial
from typing import Any

from mhc.profile import related_profiles
from mhc.schema import Entry
from tuner.compile_job import compile_job
from tuner.compiling import Compiling
from tuner.deadline import Deadline
from tuner.device_process import GPU_GONE
from tuner.devices import Device
from tuner.display import Display
from tuner.entry import Confirmation, entries_of, stored_entry
from tuner.errors import LOST, TuneError
from tuner.ladder import hopeless
from tuner.measure_job import confirm_job, copy_job, measure_job
from tuner.phases import Phases
from tuner.runner import Job, Runner
from tuner.search import Search
from tuner.settings import Settings
from tuner.store import Store
from tuner.study import Config, Study
from tuner.task import Order, config_key
from tuner.timing import median
from tuner.warm import ORDER, Warm, orders
from tuner.workers import WorkerError, WorkerTrouble
from tuner.writer import ProfileWriter, make_provenance

COMPILE_TIMEOUT_S = 120.0
MEASURE_TIMEOUT_S = 120.0
CONFIRM_TIMEOUT_S = 240.0
POLL_S = 0.2

#: Studies whose configurations may be compiled before their turn.
LOOKAHEAD = {"cpu": 6, "gpu": 12}
#: Measurements handed to a measuring process: the next one starts while this process stores the last.
MEASURE_DEPTH = 2
#: Times that a job is tried again after trouble with the machine, as long as others go through; and how often in a row jobs of one stage
#: may meet with it before the run ends.
RETRIES = 3
TROUBLE_IN_A_ROW = 5


class DeviceLost(TuneError):
    """No device is left to measure on."""

    code = LOST


class MachineTrouble(TuneError):
    """One job after another fails of what says nothing of it: a full disk, a device that another process keeps, no process to be had."""

    code = LOST


class Pipeline:
    """One run over ``orders``. :meth:`run` returns when every study is done or time is up; results are in ``entries``.

    ``announce``: whether workers that come may join these studies. ``writer``: None for a worker that writes no profile.
    """

    def __init__(
        self,
        settings: Settings,
        wanted: Sequence[Order],
        store: Store,
        writer: ProfileWriter | None,
        display: Display,
        devices: Sequence[Device] = (Device(0, None, "", ""),),
        announce: bool = True,
    ) -> None:
        self.settings, self.store, self.writer, self.display = settings, store, writer, display
        self.target = settings.hardware.arch
        self.exclusive = settings.hardware.is_cpu
        self.lookahead = LOOKAHEAD["cpu" if self.exclusive else "gpu"]
        self.entries: list[Entry] = []
        self.unreached: list[str] = []
        self.copy_gbps = 0.0
        self.measured = 0
        self.phases = Phases()
        self.devices = list(devices)
        self._runners: list[Runner] = []
        self._struck: Counter[tuple[str, str]] = Counter()
        self._in_a_row: Counter[str] = Counter()
        self.deadline = Deadline(settings.time_limit, len(wanted), self.lookahead)
        self.studies: list[Study] = []
        searches: list[Search] = []
        hw = settings.hardware
        related = [entry for other in related_profiles(hw.arch, hw.name, hw.sm_count) for entry in other.entries]
        warm = Warm(store, searches, [*(writer.entries if writer is not None else ()), *related])
        seed = settings.seed if settings.search_seed is None else settings.search_seed
        for order in wanted:
            task = order.task
            hints, known = partial(warm.hints, task), partial(warm.known, task)
            search = Search(task, store, order.trials, seed, hints, order.sampler, known, warm.priors(task), order.effort.rounds)
            searches.append(search)
            self.studies.append(Study(order, search, len(self.studies)))
        if announce:
            self._announce()

    def _announce(self) -> None:
        """Say in the storage what each study is; what other runs asked of it stays asked."""
        stored = dict(orders(self.store))
        for study in self.studies:
            order, before = replace(study.order, trials=study.search.trials), stored.get(study.task.key)
            if before is not None:
                covers = tuple(sorted({*order.task.covers, *before.task.covers}))
                effort = max(before.effort, order.effort, key=lambda effort: effort.rounds)
                order = replace(order, task=replace(order.task, covers=covers), trials=max(order.trials, before.trials), effort=effort)
            if order != before:
                study.search.set_attr(ORDER, order.as_attr())

    # -- what each study may try --------------------------------------------------------------------------------------------------

    def _window(self) -> list[Study]:
        return [s for s in self.studies if s.open][: self.lookahead]

    def left_s(self) -> float | None:
        """An estimate of the seconds to go."""
        fresh = sum(s.state == "done" and s.search.measured_now > 0 for s in self.studies)
        return self.deadline.left_s(fresh, sum(s.open for s in self.studies))

    # -- the loop -----------------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Tune. Raises KeyboardInterrupt, StorageLost, DeviceLost and MachineTrouble as they come; what is finished then is written
        already, and what is not is given back to whoever goes on.
        """
        try:
            with contextlib.ExitStack() as stack:
                self.compiling = Compiling(self.settings, compile_job, COMPILE_TIMEOUT_S)
                stack.enter_context(self.compiling.pool)
                for device in self.devices:
                    runner = Runner(device, self.settings.log, self.phases)
                    stack.enter_context(runner.pool)
                    runner.start_copy(copy_job, self.target, MEASURE_TIMEOUT_S)
                    self._runners.append(runner)
                if self.exclusive:
                    self._finish_copy()
                while any(s.open for s in self.studies):
                    self._close_late()
                    self._submit_compiles()
                    self._submit_measures()
                    self._retire()
                    self._wait()
                self._finish_copy()
        finally:
            self.deadline.stop()
            for study in self.studies:
                # after the storage was lost there is nobody to give it to
                with contextlib.suppress(TuneError):
                    study.search.release()

    def _finish_copy(self) -> None:
        """Wait for the first device's bandwidth; it stands for all, which are of one kind."""
        if self.copy_gbps == 0.0:
            why, kind = "no device is left", TuneError
            for runner in self._runners:
                assert runner.copy is not None
                try:
                    self.copy_gbps = runner.copy.result()
                    return
                except WorkerError as e:
                    why, kind = str(e), MachineTrouble if isinstance(e, WorkerTrouble) else TuneError
            raise kind(f"the copy that measures bandwidth failed on {self.settings.hardware.name}: {why}")

    def _known_copy(self) -> float:
        """The bandwidth, 0 as long as it is not known."""
        if self.copy_gbps == 0.0:
            done = [r.copy for r in self._runners if r.copy is not None and r.copy.done() and r.copy.exception() is None]
            if done:
                self.copy_gbps = median([copy.result() for copy in done])
        return self.copy_gbps

    def _close_late(self) -> None:
        for study in self.studies:
            started = study.search.results or study.search.inflight
            if study.state != "searching" or study.closed or not started or not self.deadline.late(study.position):
                continue
            study.closed = True
            for future, cfg in list(study.compiling.items()):
                if not study.is_default(cfg) or self.deadline.up:
                    del study.compiling[future]
                    study.search.withdraw(cfg)
                    self.compiling.cancel(future, self.studies)
        if self.deadline.up:
            for study in self.studies:
                if study.state == "searching":
                    for cfg in [*study.ready, *study.compiling.values()]:
                        study.search.withdraw(cfg)
                    study.ready.clear()
                    study.compiling.clear()

    @property
    def _measuring(self) -> bool:
        return any(runner.jobs for runner in self._runners)

    def _submit_compiles(self) -> None:
        if self.exclusive and (self._measuring or any(s.ready or s.state == "confirming" for s in self.studies)):
            return
        capacity = (8 if self.exclusive else 3) * self.settings.jobs
        underway = sum(len(s.compiling) for s in self.studies)
        window = self._window()
        # first every default, then the batches; a study late before it began gets its default alone
        rooms = [(s, 1) for s in window if not s.search.results] + [(s, _batch(s)) for s in window if not self.deadline.late(s.position)]
        for study, room in rooms:
            while study.state == "searching" and not study.closed and underway < capacity and len(study.search.inflight) < room:
                cfg = study.search.propose()
                if cfg is None:
                    break
                if not self._refused(study, cfg):
                    self.compiling.submit(study, cfg)
                    underway += 1

    def _refused(self, study: Study, cfg: Config) -> bool:
        """Whether its bytes alone keep a configuration from winning, which is then stored."""
        if self.exclusive or study.is_default(cfg):
            return False
        why = hopeless(study.task.spec, study.task.p, study.task.T, cfg, self._known_copy(), study.search.best_us)
        if why is not None:
            study.refuse(cfg, why)
        return why is not None

    def _submit_measures(self) -> None:
        if self.exclusive and self.compiling.busy:
            return
        # one each, then the next: a device with two must not leave another with none
        for depth in range(1, MEASURE_DEPTH + 1):
            for runner in self._runners:
                while len(runner.jobs) < depth and self._submit_measure(runner):
                    pass

    def _submit_measure(self, runner: Runner) -> bool:
        """Give one job to a device, or find that one need not be done; False where there is nothing to give."""
        waiting = [s for s in self._window() if s.ready or s.state == "confirming"]
        if not waiting:
            return False
        # stay with the shape whose inputs and answer the measuring process holds; but where time may run out, every default comes first
        new = [s for s in waiting if s.ready and not s.search.results] if self.settings.time_limit is not None else []
        theirs = [r.last for r in self._runners if r is not runner and r.jobs]
        free = [s for s in waiting if s not in theirs]
        study = new[0] if new else runner.last if runner.last in waiting else (free or waiting)[0]
        assert study is not None
        task, effort, seed = study.task, study.order.effort, study.order.seed
        waited = "compile" if self.compiling.busy or study.ready else "others"
        if study.ready:
            cfg = study.ready.popleft()
            if self._refused(study, cfg):
                return True
            # the default is never cut short: everything is compared with it
            best_us = None if study.is_default(cfg) else study.search.best_us
            job = (task.kernel, task.p, task.T, cfg, self.target, effort, seed, best_us)
            runner.submit(study, [cfg], False, waited, measure_job, job, MEASURE_TIMEOUT_S)
            return True
        if not study.search.claim_confirmation():
            study.state = "searching"  # another worker confirms it, or has
            return True
        study.state = "confirmation under way"
        cfgs = study.finalists()
        args = (task.kernel, task.p, task.T, cfgs, self.target, effort, seed, self.exclusive)
        runner.submit(study, cfgs, True, waited, confirm_job, args, CONFIRM_TIMEOUT_S)
        return True

    def _retire(self) -> None:
        """Studies with nothing under way: wait for other workers, confirm, take a stored confirmation, or give up."""
        for study in self.studies:
            search = study.search
            if study.state != "searching" or not study.idle:
                continue
            if search.left > 0 and not study.closed and not self.deadline.up:
                continue
            if search.confirmed_elsewhere or (search.elsewhere and not self.deadline.up):
                search.refresh()
                continue
            if not search.ranking or search.default_result is None:
                study.give_up(self.deadline.up or study.closed)
                self.unreached.append(f"{study.task.label}: {study.why}")
            elif (stored := search.confirmation) is not None:
                self._finish(study, stored)
            else:
                study.state = "confirming"

    def _wait(self) -> None:
        futures: set[Future[Any]] = {f for s in self.studies for f in s.compiling}
        futures |= {job.future for runner in self._runners for job in runner.jobs}
        if not futures:
            # compiles that nobody waits for any more still keep the cores from timing
            futures = {f for f in self.compiling.futures.values() if not f.done()}
        if futures:
            wait(futures, timeout=POLL_S, return_when=FIRST_COMPLETED)
        elif any(s.search.elsewhere or s.search.confirmed_elsewhere for s in self.studies if s.open):
            time.sleep(POLL_S)
        for runner in list(self._runners):
            while (job := runner.finished()) is not None:
                self._submit_measures()
                self._measured(runner, job)
        for future in dict.fromkeys(f for s in self.studies for f in s.compiling if f.done()):
            troubled = self._troubled("compile", future.exception())
            for study in [s for s in self.studies if future in s.compiling]:
                cfg = study.compiling.pop(future)
                if troubled:
                    study.search.give_back(cfg, again=self._may_retry(study, "compile", cfg))
                else:
                    study.compiled(cfg, future)
        self._show()

    # -- what came back -----------------------------------------------------------------------------------------------------------

    def _measured(self, runner: Runner, job: Job) -> None:
        study, error = job.study, job.future.exception()
        if error is not None and GPU_GONE in str(error):
            self._give_back(job)
            self._lose(runner, str(error))
        elif not self._troubled("measure", error):
            if job.confirmation:
                self._confirmed(job)
            else:
                study.measured(job.configs[0], job.future)
                self.measured += 1
        elif job.confirmation:
            study.search.give_up_confirmation()
            if self._may_retry(study, "confirm"):
                study.state = "confirming"
            else:
                self._fail(study, f"the confirmation failed; {error}")
        elif self._may_retry(study, "measure", job.configs[0]):
            study.ready.appendleft(job.configs[0])
        else:
            study.search.give_back(job.configs[0], again=False)

    def _troubled(self, stage: str, error: BaseException | None) -> bool:
        """Whether a job failed of the machine's trouble; raises :class:`MachineTrouble` where one after another does."""
        if not isinstance(error, WorkerTrouble):
            self._in_a_row[stage] = 0
            return False
        self._in_a_row[stage] += 1
        if self._in_a_row[stage] == TROUBLE_IN_A_ROW:
            raise MachineTrouble(
                f"{error}; {TROUBLE_IN_A_ROW} jobs in a row failed so: what was measured stays, and the same command goes on"
            )
        return True

    def _may_retry(self, study: Study, stage: str, cfg: Config | None = None) -> bool:
        """Whether a job that met with trouble is tried again in this run."""
        key = (study.task.key, f"{stage} {config_key(cfg or {})}")
        self._struck[key] += 1
        return self._struck[key] <= RETRIES

    def _give_back(self, job: Job) -> None:
        if job.confirmation:
            job.study.search.give_up_confirmation()
            job.study.state = "searching"
        else:
            job.study.search.withdraw(job.configs[0], "its device was lost")

    def _lose(self, runner: Runner, why: str) -> None:
        """A device is gone: what it was given goes to the others, as long as there are any."""
        if runner in self._runners:
            self._runners.remove(runner)
            for job in runner.jobs:
                self._give_back(job)
            runner.jobs.clear()
            runner.pool.close()
            self.display.note(f"device {runner.device.index}: {why}; going on with {len(self._runners)} devices")
        if not self._runners:
            raise DeviceLost(f"{self.settings.hardware.name}: lost in mid-run: {why}")

    def _confirmed(self, job: Job) -> None:
        study, search = job.study, job.study.search
        try:
            answer = job.future.result()
        except WorkerError as e:
            search.give_up_confirmation()
            self._fail(study, f"the confirmation failed; {e}")
            return
        self._finish_copy()
        samples = list(answer["samples"])
        reference = samples.pop() if self.exclusive else None
        if not study.is_default(job.configs[0]):
            why = search.default_result.reason if search.default_result else None
            self.display.note(f"{study.task.label}: the default configuration does not work here: {why}")
        found = Confirmation(job.configs, samples, reference, answer.get("clock_mhz"), answer.get("dirty"))
        stored = {**stored_entry(search, self.settings.hardware, self.copy_gbps, found), "seed": study.order.seed}
        if search.confirm(stored):
            self._finish(study, stored)
        else:
            study.state = "searching"  # this process slept, and another worker took it over

    def _fail(self, study: Study, why: str) -> None:
        study.state, study.why = "failed", why
        self.unreached.append(f"{study.task.label}: {why}")

    def _finish(self, study: Study, stored: dict[str, Any]) -> None:
        self._finish_copy()
        entries = entries_of(stored, study.task.covers)
        search, settings = study.search, self.settings
        if self.writer is not None:
            trials = sum(s.search.count for s in self.studies)
            seed = stored.get("seed", settings.seed)  # of the run that made the entry, which may not be this one
            self.writer.add(entries, make_provenance(settings.hardware, self.copy_gbps, seed, trials, settings.command))
        study.state = "done"
        self.entries += entries
        done = sum(not s.open for s in self.studies)
        self.display.finished(study.task.label, entries[0], search.count, search.measured_now, done, len(self.studies), self.left_s())

    # -- what is shown ------------------------------------------------------------------------------------------------------------

    def _show(self) -> None:
        lasts: Iterable[Study | None] = (runner.last for runner in self._runners)
        study = next((s for s in lasts if s is not None and s.open), None) or next((s for s in self.studies if s.open), None)
        if study is None:
            return
        search = study.search
        compiling = sum(len(s.compiling) for s in self.studies)
        ready = sum(len(s.ready) for s in self.studies)
        others = sum(len(s.search.elsewhere) for s in self.studies)
        busy = f"{compiling} compiling, {ready} ready" + (f", {others} at other workers" if others else "")
        done = sum(not s.open for s in self.studies)
        self.display.progress(study.task.label, search.count, search.trials, search.best_us, done, len(self.studies), self.left_s(), busy)

    def funnel(self) -> dict[str, int]:
        """Configurations by what became of them, over all studies."""
        total: Counter[str] = Counter()
        for study in self.studies:
            total.update(study.search.funnel())
        return dict(total)

    def time_lines(self) -> list[str]:
        """Where the time went, for people."""
        return self.phases.lines(self.deadline.seconds, len(self.devices), self.store.seconds)


def _batch(study: Study) -> int:
    """Configurations of a study under way at once: one that asked for all its trials at once could not learn from any of them."""
    return max(4, -(-study.search.trials // 4))
