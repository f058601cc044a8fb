"""One run of ``mhc-tune``: check everything first, tune, report."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from mhc.files import replace_file
from tuner.devices import Device, aim, pick, visible_devices
from tuner.display import Display, duration, funnel_line, make_console, result_table
from tuner.effort import effort_of
from tuner.errors import INTERRUPTED, TuneError, printable
from tuner.hardware import Hardware, find_compiler, resolve
from tuner.plan import make_tasks, parse_tokens, pick_kernels, pick_workloads, split_names
from tuner.storage import open_storage, redacted
from tuner.workers import cores
from tuner.workloads import WorkloadError, load_workloads

if TYPE_CHECKING:
    from tuner.pipeline import Pipeline
    from tuner.settings import Settings

STATE = Path(".mhc-tune")
#: Workers' output beyond this is thrown away by the next run.
MAX_LOG_BYTES = 1 << 20

#: A year; what is meant to be longer has no limit.
MAX_TIME_LIMIT_S = 365 * 86_400

#: Exit codes beside 0, 2 (the user must change something: tuner/errors.py) and 130 (interrupted).
NOTHING_TUNED = 1
LOST = 3


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
    sampler: str | None = None
    devices: str | None = None


def _state_folder() -> Path:
    try:
        STATE.mkdir(exist_ok=True)
        (STATE / ".gitignore").write_text("*\n")
    except OSError as e:
        raise TuneError(f"{STATE.resolve()}: cannot be written: {e.strerror or e}; start mhc-tune in a folder of yours") from None
    return STATE


def storage_url(given: str | None, hardware: Hardware) -> str:
    """``--storage``, or the SQLite file that stands for it."""
    return given or f"sqlite:///{_state_folder() / hardware.profile}.db"


def worker_log() -> Path:
    """Where the output of compiling and measuring processes goes."""
    log = _state_folder() / "workers.log"
    if log.exists() and log.stat().st_size > MAX_LOG_BYTES:
        log.write_bytes(b"")
    return log


def compile_jobs(given: int | None, hardware: Hardware) -> int:
    """Compile processes; on a GPU one core stays with the process that launches what is timed."""
    return given or max(1, cores() - (0 if hardware.is_cpu else 1))


def find_hardware(gpu: str, devices: str | None) -> tuple[Hardware, list[Device]]:
    """What to tune for, and the devices of this machine that it is measured on. Raises :class:`TuneError`."""
    aim(gpu)
    hardware = resolve(gpu)
    find_compiler(hardware)
    if hardware.is_cpu and devices is not None:
        raise TuneError(f"--devices {devices}: there is one CPU, wanted a GPU to choose devices of")
    found = [] if hardware.is_cpu else visible_devices()
    return hardware, pick(devices, hardware.name, found)


def run(request: Request) -> int:
    """Tune as requested; returns the exit code. Raises :class:`TuneError` for what the user can mend."""
    kernels = pick_kernels(split_names(request.kernels))
    try:
        known = load_workloads(request.workloads_file)
    except WorkloadError as e:
        raise TuneError(f"workloads: {e}") from None
    workloads = pick_workloads(split_names(request.workloads), known)
    tokens = parse_tokens(request.tokens)
    if request.time_limit is not None and not 1 <= request.time_limit <= MAX_TIME_LIMIT_S:
        raise TuneError(f"--time-limit: got {request.time_limit:g}, wanted 1 to {MAX_TIME_LIMIT_S} seconds")
    hardware, devices = find_hardware(request.gpu, request.devices)
    # everything below imports torch, Optuna or TileLang: seconds, which a typing error need not wait for
    from tuner.pipeline import Pipeline
    from tuner.raw import raw
    from tuner.samplers import DEFAULT_SAMPLER, check_sampler
    from tuner.settings import Settings
    from tuner.store import Store
    from tuner.writer import ProfileWriter, check_writable

    sampler = check_sampler(request.sampler or DEFAULT_SAMPLER)
    writer = ProfileWriter(request.output or Path("configs") / f"{hardware.profile}.yaml", hardware)
    if request.raw is not None:
        check_writable(request.raw, "--raw")
    tasks = make_tasks(kernels, workloads, hardware, tokens)
    effort = effort_of(hardware.arch, request.effort)
    url = storage_url(request.storage, hardware)
    settings = Settings(
        hardware=hardware,
        effort=effort,
        trials=request.trials or effort.trials,
        time_limit=request.time_limit or effort.time_limit_s,
        seed=request.seed,
        jobs=compile_jobs(request.jobs, hardware),
        command=request.command,
        log=worker_log(),
        sampler=sampler,
    )
    console = make_console()
    with Display(console) as display:
        display.note(_opening(settings, len(devices), len(tasks), writer.path))
        if request.storage is not None:
            display.note(f"storage {redacted(url)}; mhc-tune worker joins in")
        for note in writer.notes:
            display.note(note)
        with contextlib.closing(Store(open_storage(url), url)) as store:
            pipeline = Pipeline(settings, [settings.order(task) for task in tasks], store, writer, display, devices)
            code = tune(pipeline)
    report(pipeline, console)
    where = f"{len(pipeline.entries)} entries of this run are in {writer.path}" if writer.written else "no profile was written"
    closing(pipeline, console, code, where, "; run the same command again to go on")
    if request.raw is not None:
        try:
            replace_file(request.raw, json.dumps(raw(pipeline), indent=1) + "\n")
        except OSError as e:
            raise TuneError(f"--raw {request.raw}: cannot be written: {e.strerror or e}") from None
    return code or (0 if pipeline.entries else NOTHING_TUNED)


def tune(pipeline: Pipeline) -> int:
    """Run it to its end, whatever ends it: 0, INTERRUPTED, or LOST with a line on stderr."""
    from tuner.pipeline import DeviceLost, MachineTrouble
    from tuner.store import StorageLost

    try:
        with term_is_interrupt():
            pipeline.run()
    except KeyboardInterrupt:
        return INTERRUPTED
    except (StorageLost, DeviceLost, MachineTrouble) as e:
        print(f"mhc-tune: {printable(str(e))}", file=sys.stderr)
        return LOST
    return 0


def report(pipeline: Pipeline, console: Console) -> None:
    """What was found, what was not, and where the time went."""
    if pipeline.entries:
        console.print(result_table(pipeline.entries, f"{pipeline.settings.hardware.name}: copy {pipeline.copy_gbps:.1f} GB/s"))
    for line in pipeline.unreached:
        console.print(f"not tuned: {line}", markup=False, soft_wrap=True)
    console.print(funnel_line(pipeline.funnel()), markup=False, soft_wrap=True)
    for line in pipeline.time_lines():
        console.print(line, markup=False, soft_wrap=True)


def closing(pipeline: Pipeline, console: Console, code: int, where: str, again: str) -> None:
    """The last line."""
    done, wanted = sum(s.state == "done" for s in pipeline.studies), len(pipeline.studies)
    verb = {INTERRUPTED: "interrupted", LOST: "stopped"}.get(code, "done")
    console.print(
        f"{verb}: {done} of {wanted} studies, {pipeline.measured} configurations measured in {duration(pipeline.deadline.seconds)}; {where}"
        f"{again if done < wanted else ''}",
        markup=False,
        soft_wrap=True,
    )


@contextlib.contextmanager
def term_is_interrupt() -> Iterator[None]:
    """A polite kill keeps what is done, as Ctrl-C does."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _opening(settings: Settings, devices: int, studies: int, output: Path) -> str:
    time = f", at most {duration(settings.time_limit)}" if settings.time_limit else ""
    several = f" x {devices}" if devices > 1 else ""
    return (
        f"mhc-tune: {settings.hardware.name} ({settings.hardware.arch}){several}, {studies} studies of up to {settings.trials} trials"
        f"{time}, {settings.jobs} compile processes, profile {output}"
    )
