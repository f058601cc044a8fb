"""One run of ``mhc-tune``: check everything first, tune, report."""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from mhc.files import replace_file
from mhc.profile import packaged_dir
from tl_kernels.child_python import cores
from tuner.devices import Device, aim, pick, visible_devices
from tuner.display import Display, duration, funnel_line, make_console, result_table
from tuner.effort import effort_of
from tuner.errors import INTERRUPTED, LOST, TuneError, writing
from tuner.hardware import Hardware, find_compiler, resolve
from tuner.plan import make_tasks, nothing_runs, parse_tokens, pick_kernels, pick_workloads, shape_workloads, split_names
from tuner.storage import is_private, open_storage, redacted
from tuner.workloads import Workload, WorkloadError, load_workloads

if TYPE_CHECKING:
    from tuner.pipeline import Pipeline
    from tuner.settings import Settings
    from tuner.writer import ProfileWriter

STATE = Path(".mhc-tune")
#: Workers' output beyond this is thrown away by the next run.
MAX_LOG_BYTES = 1 << 20

#: A year; what is meant to be longer has no limit.
MAX_TIME_LIMIT_S = 365 * 86_400

#: Exit code beside 0 and those of tuner/errors.py.
NOTHING_TUNED = 1


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
    shapes: str | None = None
    dtype: str | None = None


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


def _workloads(request: Request) -> list[Workload]:
    """What ``--shapes`` spells out, else workloads by name."""
    if request.shapes is not None:
        for option in ("workloads", "workloads_file", "tokens"):
            if getattr(request, option) is not None:
                raise TuneError(f"--shapes, --{option.replace('_', '-')}: got both, wanted one; a shape says its n, C and tokens itself")
        return shape_workloads(request.shapes, "bfloat16" if request.dtype is None else request.dtype)
    if request.dtype is not None:
        raise TuneError("--dtype: wanted --shapes beside it; a workload has a dtype of its own")
    try:
        known = load_workloads(request.workloads_file)
    except WorkloadError as e:
        raise TuneError(f"workloads: {e}") from None
    return pick_workloads(split_names(request.workloads), known)


def run(request: Request) -> int:
    """Tune as requested; returns the exit code. Raises :class:`TuneError` for what the user can mend."""
    kernels = pick_kernels(split_names(request.kernels))
    workloads = _workloads(request)
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
    if not tasks:
        raise nothing_runs(kernels, workloads, hardware)
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
    display = Display(make_console())
    display.note(_opening(settings, len(devices), len(tasks), writer.path))
    for note in writer.notes:
        display.note(note)
    with contextlib.closing(Store(storage := open_storage(url), url)) as store:
        if request.storage is not None:
            joining = "nobody can join in, and it is gone with this run" if is_private(storage) else "mhc-tune worker joins in"
            display.note(f"storage {redacted(url)}; {joining}")
        pipeline = Pipeline(settings, [settings.order(task) for task in tasks], store, writer, display, devices)

        def where() -> str:
            return f"{len(pipeline.entries)} entries of this run are in {writer.path}" if writer.written else "no profile was written"

        try:
            code = tune(pipeline, where, "; run the same command again to go on")
        finally:
            if request.raw is not None:
                with writing(f"--raw {request.raw}"):
                    replace_file(request.raw, json.dumps(raw(pipeline), indent=1) + "\n")
    return code or (0 if pipeline.entries else NOTHING_TUNED)


def tune(pipeline: Pipeline, where: Callable[[], str], again: str) -> int:
    """Run it, and say what came of it, whatever ended it. Returns 0 or INTERRUPTED; raises what else ended it."""
    code = LOST
    try:
        with term_is_interrupt(), pipeline.display:
            pipeline.run()
        code = 0
    except KeyboardInterrupt:
        code = INTERRUPTED
    finally:
        report(pipeline, pipeline.display.console)
        closing(pipeline, pipeline.display.console, code, where(), again)
    return code


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
    """The last line, and one more where the profile is not where ``import mhc`` looks."""
    done, wanted = sum(s.state == "done" for s in pipeline.studies), len(pipeline.studies)
    verb = {INTERRUPTED: "interrupted", LOST: "stopped"}.get(code, "done")
    console.print(
        f"{verb}: {done} of {wanted} studies, {pipeline.measured} configurations measured in {duration(pipeline.deadline.seconds)}; {where}"
        f"{again if done < wanted else ''}",
        markup=False,
        soft_wrap=True,
    )
    if pipeline.writer is not None and pipeline.writer.written and not _found_by_mhc(pipeline.writer):
        path = str(pipeline.writer.path.absolute())
        console.print(
            f"`import mhc` does not look there; to use it: MHC_PROFILE={shlex.quote(path)}, or mhc.load_profile({path!r})",
            markup=False,
            soft_wrap=True,
        )


def _found_by_mhc(writer: ProfileWriter) -> bool:
    return writer.path.resolve() == (packaged_dir() / f"{writer.hardware.profile}.yaml").resolve()


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
