"""One run of ``mhc-tune``: check everything first, tune, report."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tuner.display import Display, duration, result_table
from tuner.effort import effort_of
from tuner.errors import INTERRUPTED, TuneError, one_line
from tuner.hardware import Hardware, find_compiler, resolve
from tuner.plan import make_tasks, parse_tokens, pick_kernels, pick_workloads, split_names
from tuner.workloads import WorkloadError, load_workloads

STATE = Path(".mhc-tune")


@dataclass(frozen=True)
class Request:
    """The command line as typed; None means the default. ``time_limit`` in seconds."""

    gpu: str
    kernels: str | None
    workloads: str | None
    workloads_file: Path | None
    tokens: str | None
    trials: int | None
    time_limit: float | None
    effort: str
    seed: int
    storage: str | None
    output: Path | None
    jobs: int | None
    raw: Path | None
    command: str


@contextlib.contextmanager
def _alone(folder: Path, hardware: Hardware) -> Iterator[None]:
    """Two tuners on one device would time each other: the second is refused."""
    path = folder / f"{hardware.profile}.lock"
    with open(path, "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TuneError(f"another mhc-tune is measuring on {hardware.profile} ({path} is locked); wait for it or stop it") from None
        yield


def _state_folder() -> Path:
    try:
        STATE.mkdir(exist_ok=True)
        (STATE / ".gitignore").write_text("*\n")
    except OSError as e:
        raise TuneError(f"{STATE.resolve()}: cannot be written: {e.strerror or e}; start mhc-tune in a folder of yours") from None
    return STATE


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(request: Request) -> int:
    """Tune as requested; returns the exit code. Raises :class:`TuneError` for what the user can mend."""
    kernels = pick_kernels(split_names(request.kernels))
    try:
        known = load_workloads(request.workloads_file)
    except WorkloadError as e:
        raise TuneError(f"workloads: {e}") from None
    workloads = pick_workloads(split_names(request.workloads), known)
    tokens = parse_tokens(request.tokens)
    hardware = resolve(request.gpu)
    find_compiler(hardware)
    # everything below imports torch, Optuna or TileLang: seconds, which a typing error need not wait for
    from tuner.pipeline import Pipeline, Settings
    from tuner.search import open_storage
    from tuner.writer import ProfileWriter, check_writable

    writer = ProfileWriter(request.output or Path("configs") / f"{hardware.profile}.yaml", hardware)
    if request.raw is not None:
        check_writable(request.raw, "--raw")
    tasks = make_tasks(kernels, workloads, hardware, tokens)
    effort = effort_of(hardware.arch, request.effort)
    folder = _state_folder()
    log = folder / "workers.log"
    log.write_bytes(b"")
    url = request.storage or f"sqlite:///{folder / hardware.profile}.db"
    settings = Settings(
        hardware=hardware,
        effort=effort,
        trials=request.trials or effort.trials,
        time_limit=request.time_limit or effort.time_limit_s,
        seed=request.seed,
        # on a GPU one core stays with the process that launches what is timed
        jobs=request.jobs or max(1, cores() - (0 if hardware.is_cpu else 1)),
        command=request.command,
        log=log,
    )
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a log file or a pipe has no width to fit into
    with _alone(folder, hardware), Display(console) as display:
        display.note(_opening(settings.hardware, len(tasks), settings.trials, settings.time_limit, settings.jobs, writer.path))
        for note in writer.notes:
            display.note(note)
        try:
            storage = open_storage(url)
        except Exception as e:  # SQLAlchemy, its drivers and Optuna each have their own
            raise TuneError(f"--storage {url}: cannot be opened: {one_line(e)}") from None
        pipeline = Pipeline(settings, tasks, storage, writer, display)
        interrupted = False
        try:
            with _term_is_interrupt():
                pipeline.run()
        except KeyboardInterrupt:
            interrupted = True
        if request.raw is not None:
            request.raw.write_text(json.dumps(pipeline.raw(), indent=1) + "\n")
    if pipeline.entries:
        console.print(result_table(pipeline.entries, f"{hardware.name}: copy {pipeline.copy_gbps:.1f} GB/s"))
    for line in pipeline.unreached:
        console.print(f"not tuned: {line}", markup=False, soft_wrap=True)
    done, wanted = sum(s.state == "done" for s in pipeline.studies), len(tasks)
    where = f"{len(pipeline.entries)} entries of this run are in {writer.path}" if writer.written else "no profile was written"
    verb = "interrupted" if interrupted else "done"
    again = "; run the same command again to go on" if done < wanted else ""
    console.print(
        f"{verb}: {done} of {wanted} studies, {pipeline.measured} configurations measured in {duration(pipeline.seconds)}; {where}{again}",
        markup=False,
        soft_wrap=True,
    )
    if interrupted:
        return INTERRUPTED
    return 0 if pipeline.entries else 1


@contextlib.contextmanager
def _term_is_interrupt() -> Iterator[None]:
    """A polite kill keeps what is done, as Ctrl-C does."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _opening(hardware: Hardware, studies: int, trials: int, limit: float | None, jobs: int, output: Path) -> str:
    time = f", at most {duration(limit)}" if limit else ""
    return (
        f"mhc-tune: {hardware.name} ({hardware.arch}), {studies} studies of up to {trials} trials{time}, "
        f"{jobs} compile processes, profile {output}"
    )
