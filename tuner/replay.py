"""``mhc-tune replay``: the tuner's own search, sampler by sampler and seed by seed, with a ledger in place of the device.

What is counted is what costs time on the device: trials measured (whatever came of them) until a configuration within 2% of the ledger's
best was among them. A replay proposes as the tuner does (default first, infeasible and known suggestions refused, several under way at a
time), but it knows one study: no hints from the same kernel at another T. ``cold`` runs lack the kernel's hand-written starting points
too, which are known to be good; ``seeded`` runs, as they ship, have them.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import math
import platform
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import optuna
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mhc.files import replace_file
from tl_kernels import KERNELS
from tl_kernels.spec import Config, Kernel, Problem
from tuner.errors import TuneError, writing
from tuner.ledger import Ledger, Study, read_ledger
from tuner.replay_plot import QUARTER, plot
from tuner.search import Search
from tuner.task import Result, Task, config_key
from tuner.waiting import as_they_end
from tuner.workers import COMPILE_ENV, WorkerError, WorkerPool
from tuner.writer import check_writable

COLD, SEEDED = "cold", "seeded"


@dataclass(frozen=True)
class ReplayRequest:
    """The command line as typed. ``within``: 0.02 for 2%; ``trials``: budget of each search, None for all but one of the space."""

    ledger: Path
    samplers: tuple[str, ...]
    seeds: int
    batch: int
    within: float
    trials: int | None
    cold_only: bool
    jobs: int
    out: Path
    command: str


@dataclass(frozen=True)
class Job:
    """One search to replay."""

    study: int
    sampler: str
    start: str
    seed: int


@dataclass(frozen=True)
class LedgerTask(Task):
    """The task of a ledger's study, with the ledger's space in place of the kernel's, and its hand-written seeds where ``seeded``."""

    study: Study | None = None
    seeded: bool = False

    @cached_property
    def _spec(self) -> Kernel:
        assert self.study is not None
        study, kernel = self.study, KERNELS[self.kernel]
        values: dict[str, dict[Any, None]] = {name: {} for name in study.default}
        for trial in study.trials:
            for name, value in trial.config.items():
                values[name].setdefault(value)
        space = {name: tuple(sorted(found, key=lambda v: (str(type(v)), v))) for name, found in values.items()}
        known = study.results

        def invalid(p: Problem, cfg: Config) -> str | None:
            return None if config_key(cfg) in known else "not in the ledger"

        return replace(
            kernel,
            space=lambda p: space,
            default=lambda p: dict(study.default),
            invalid=invalid,
            seeds=kernel.seeds if self.seeded else (),
            gpu_only=(),
        )

    @property
    def spec(self) -> Kernel:
        return self._spec

    @property
    def key(self) -> str:
        assert self.study is not None
        return self.study.study


def make_search(study: Study, arch: str, sampler: str, seed: int, seeded: bool, trials: int) -> Search:
    """The tuner's search over a ledger's study: all that a replay depends on in tuner/search.py."""
    p = KERNELS[study.kernel].problem(study.n, study.C[0], study.dtype)
    task = LedgerTask(study.kernel, p, study.tokens, arch, "replay", tuple(study.C), study=study, seeded=seeded)
    return Search(task, optuna.storages.InMemoryStorage(), trials, seed, sampler=sampler)


def replay(search: Search, oracle: Callable[[Config], Result], batch: int, found: Callable[[Config], bool]) -> int | None:
    """Search with ``batch`` configurations under way. Returns how many were measured when the first one was ``found``, or None."""
    underway: deque[dict[str, Any]] = deque()
    while True:
        while len(underway) < batch and (cfg := search.propose()) is not None:
            underway.append(cfg)
        if not underway:
            return None
        cfg = underway.popleft()
        search.tell(cfg, oracle(cfg))
        if found(cfg):
            return search.count


def replay_job(study: Study, arch: str, job: Job, request: ReplayRequest) -> int | None:
    """Trials measured until one was near the best, None where the budget ended first. The same arguments give the same answer."""
    budget = min(
        request.trials or study.size, study.size - 1
    )  # less than all: a search with trials for all goes through the space in order
    search = make_search(study, arch, job.sampler, job.seed, job.start == SEEDED, max(1, budget))
    near = study.near_best(request.within)
    return replay(search, lambda cfg: study.results[config_key(cfg)], request.batch, lambda cfg: config_key(cfg) in near)


# -- many of them, in processes ---------------------------------------------------------------------------------------------------

#: Seconds for one search: nobody waits for one that has gone wrong for ever.
JOB_S = 24 * 3600.0
#: A process reads it once.
_read = functools.cache(read_ledger)


def _run(job: Job, request: ReplayRequest) -> int | None:
    ledger = _read(request.ledger)
    return replay_job(ledger.studies[job.study], ledger.hardware.arch, job, request)


def make_jobs(ledger: Ledger, request: ReplayRequest) -> list[Job]:
    """Cold and, where the ledger has the kernel's hand-written seeds, seeded; the slowest sampler first, not to end with it alone."""
    jobs = []
    for sampler in sorted(request.samplers, key=lambda name: name != "gp"):
        for i, study in enumerate(ledger.studies):
            known = any(config_key(seed) in study.results for seed in KERNELS[study.kernel].seeds)
            starts = [COLD, SEEDED] if known and not request.cold_only else [COLD]
            jobs += [Job(i, sampler, start, seed) for start in starts for seed in range(request.seeds)]
    return jobs


def run_jobs(jobs: Sequence[Job], request: ReplayRequest) -> Iterator[tuple[Job, int | None]]:
    """Each job's answer as it comes."""
    # a process a core: threads below it would only wait for each other
    with WorkerPool(request.jobs, env=COMPILE_ENV) as pool:
        futures = {pool.submit(_run, job, request, timeout=JOB_S): job for job in jobs}
        try:
            for future in as_they_end(futures):
                yield futures[future], future.result()
        except WorkerError as e:
            raise TuneError(f"replay: {e}") from None


# -- what came of it --------------------------------------------------------------------------------------------------------------


def percentile(values: Iterable[float], share: float) -> float:
    """Nearest rank: the smallest value that at least ``share`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def summarise(runs: Sequence[dict[str, Any]], size: int) -> dict[str, Any]:
    """Figures over the seeds of one sampler on one study of ``size`` configurations. None: more seeds than that did not get there."""
    trials = [math.inf if run["trials"] is None else run["trials"] for run in runs]
    figures: dict[str, Any] = {"seeds": len(trials), "reached": sum(t < math.inf for t in trials)}
    figures["within_quarter"] = sum(t <= QUARTER * size for t in trials)
    for name, share in (("median", 0.5), ("p90", 0.9)):
        value = percentile(trials, share)
        figures[f"{name}_trials"] = None if value == math.inf else int(value)
        figures[f"{name}_share"] = None if value == math.inf else round(value / size, 4)
    return figures


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def make_result(ledger: Ledger, request: ReplayRequest, answers: dict[Job, int | None]) -> dict[str, Any]:
    """What ``replay.json`` holds."""
    studies = []
    for i, study in enumerate(ledger.studies):
        mine = {job: trials for job, trials in answers.items() if job.study == i}
        rows = []
        for start in (COLD, SEEDED):
            for sampler in request.samplers:
                runs = [{"seed": j.seed, "trials": t} for j, t in mine.items() if (j.start, j.sampler) == (start, sampler)]
                if runs:
                    runs.sort(key=lambda run: run["seed"] or 0)
                    rows.append({"start": start, "sampler": sampler, **summarise(runs, study.size), "runs": runs})
        default = study.results[config_key(study.default)].time_us
        studies.append(
            {
                "study": study.study,
                "label": study.label,
                "measured": study.size,
                "refused": len(study.results) - study.size,
                "near_best": len(study.near_best(request.within)),
                "best_us": study.best.time_us,
                "best": study.best.config,
                "default_us": default,
                "rows": rows,
            }
        )
    return {
        "schema_version": 1,
        "command": request.command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in ("mhc-kernels", "optuna", "torch", "scipy")}},
        "ledger": str(request.ledger),
        "ledger_sha256": hashlib.sha256(request.ledger.read_bytes()).hexdigest(),
        "hardware": ledger.hardware.name,
        "within": request.within,
        "batch": request.batch,
        "trials": request.trials,
        "studies": studies,
    }


def result_table(result: dict[str, Any]) -> Table:
    """Median and 90th percentile over the seeds, per study, start and sampler."""
    title = f"Trials until one is within {result['within']:.0%} of the best, {result['batch']} under way at a time"
    table = Table(title=title, title_justify="left", pad_edge=False)
    for name in ("study", "start", "sampler"):
        table.add_column(name, no_wrap=True)
    for name in ("seeds\nthere", "in a\nquarter", "median", "90th\npct", "median\nshare", "90th\nshare"):
        table.add_column(name, justify="right", no_wrap=True)
    for study in result["studies"]:
        for i, row in enumerate(study["rows"]):
            about = f"  {study['measured']} measured, {study['near_best']} near the best"
            labels = [study["label"], about] if len(study["rows"]) > 1 else [f"{study['label']}\n{about}"]
            shares = [row["median_share"], row["p90_share"]]
            table.add_row(
                labels[i] if i < len(labels) else "",
                row["start"],
                row["sampler"],
                f"{row['reached']}/{row['seeds']}",
                f"{row['within_quarter']}/{row['seeds']}",
                *("never" if row[name] is None else str(row[name]) for name in ("median_trials", "p90_trials")),
                *("never" if share is None else f"{share:.1%}" for share in shares),
                end_section=i == len(study["rows"]) - 1,
            )
    return table


def run_replay(request: ReplayRequest) -> int:
    """The command. Returns the exit code; raises :class:`TuneError` for what the user can mend."""
    if importlib.util.find_spec("matplotlib") is None:
        raise TuneError("replay: wanted matplotlib for the chart, not installed here; pip install matplotlib")
    ledger = read_ledger(request.ledger)
    files = {name: request.out / name for name in ("replay.json", "replay.png")}
    for path in files.values():
        check_writable(path, "--out")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    for study in ledger.studies:
        missing = study.missing(ledger.hardware.arch)
        if missing:
            raise TuneError(
                f"ledger {request.ledger}: {study.label}: {missing} feasible configurations are missing, wanted all of the space"
            )
        if missing is None:
            console.print(f"{study.label}: the kernel has changed since; the space is the ledger's", markup=False)
    jobs = make_jobs(ledger, request)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    answers: dict[Job, int | None] = {}
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("replaying", total=len(jobs))
        for job, trials in run_jobs(jobs, request):
            answers[job] = trials
            progress.advance(bar)
    result = make_result(ledger, request, answers)
    console.print(result_table(result))  # first: the disk may be full
    with writing(f"--out {request.out}"):
        replace_file(files["replay.json"], json.dumps(result, indent=1) + "\n")
        plot(result, files["replay.png"])
    console.print(f"{len(jobs)} replays; written: {', '.join(map(str, files.values()))}", markup=False, soft_wrap=True)
    return 0
