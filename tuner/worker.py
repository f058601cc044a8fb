"""``mhc-tune worker``: join every open study of this device that stands in a storage, on any number of machines."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner.claims import CONFIG, Claims
from tuner.display import Display, make_console
from tuner.effort import effort_of
from tuner.errors import INTERRUPTED, TuneError
from tuner.hardware import Hardware
from tuner.pipeline import Pipeline
from tuner.plan import pick_kernels, split_names
from tuner.run import compile_jobs, find_hardware, term_is_interrupt, tune, worker_log
from tuner.settings import Settings
from tuner.storage import open_storage, redacted, sqlite_file
from tuner.store import Store
from tuner.task import Order
from tuner.warm import orders
from tuner.writer import ProfileWriter

#: Seconds between two looks for new studies.
LOOK_S = 5.0


@dataclass(frozen=True)
class WorkerRequest:
    """The command line as typed; None means the default."""

    storage: str
    gpu: str
    kernels: str | None
    devices: str | None
    jobs: int | None
    output: Path | None
    wait: bool
    command: str


def open_orders(store: Store, hardware: Hardware, kernels: Sequence[str]) -> tuple[list[Order], list[str]]:
    """What this device could work on, and the names of studies whose kernel differs from this checkout's."""
    found, stale = [], []
    for name, order in orders(store):
        task = order.task
        if (task.device, task.arch) != (hardware.name, hardware.arch) or task.kernel not in kernels:
            continue
        if task.key != name:  # the name ends in the hash of the kernel's source
            stale.append(name)
            continue
        claims = Claims(store, name)
        count = sum(row.result is not None and row.result.counts for row in claims.read() if row.kind == CONFIG)
        if claims.confirmation(count, order.effort.rounds) is None:
            found.append(order)
    return found, stale


def work(request: WorkerRequest) -> int:
    """Work until no study is open; returns the exit code. Raises :class:`TuneError` for what the user can mend."""
    kernels = pick_kernels(split_names(request.kernels))
    hardware, devices = find_hardware(request.gpu, request.devices)
    writer = None if request.output is None else ProfileWriter(request.output, hardware)
    effort = effort_of(hardware.arch, "quick")
    settings = Settings(
        hardware=hardware,
        effort=effort,  # each study brings its own, and its own number of trials
        trials=effort.trials,
        time_limit=None,
        seed=0,
        jobs=compile_jobs(request.jobs, hardware),
        command=request.command,
        log=worker_log(),
        search_seed=random.SystemRandom().randrange(2**31),
    )
    file = sqlite_file(request.storage)
    if file is not None and not request.wait and not file.exists():
        raise TuneError(f"--storage {redacted(request.storage)}: no such file, wanted what mhc-tune was given; --wait waits for it")
    console = make_console()
    # a study that came to nothing here is not begun again; somebody else may have more luck
    left_alone: set[str] = set()
    worked = False
    with contextlib.closing(Store(open_storage(request.storage), request.storage)) as store:
        said: set[str] = set()
        shown = redacted(request.storage)

        def where() -> str:
            return f"the results are in {shown}" + (f" and {writer.path}" if writer is not None and writer.written else "")

        console.print(f"mhc-tune worker: {hardware.name} ({hardware.arch}), storage {shown}", markup=False, soft_wrap=True)
        while True:
            todo, stale = open_orders(store, hardware, kernels)
            for name in stale:
                if name not in said:
                    console.print(f"left alone: {name}: its kernel's source is not this checkout's", markup=False, soft_wrap=True)
            said.update(stale)
            todo = [order for order in todo if order.task.key not in left_alone]
            if not todo and not request.wait:
                if not worked and not said:
                    console.print("no open study for this device", markup=False)
                return 0
            if not todo:
                try:
                    with term_is_interrupt():
                        time.sleep(LOOK_S)
                except KeyboardInterrupt:
                    if not worked:
                        raise
                    return INTERRUPTED
                continue
            worked = True
            pipeline = Pipeline(settings, todo, store, writer, Display(console), devices, announce=False)
            code = tune(pipeline, where, "")
            left_alone |= {study.task.key for study in pipeline.studies if study.state == "failed"}
            if code:
                return code


def required(storage: str | None) -> str:
    """The URL, which a worker cannot do without."""
    if not storage:
        raise TuneError("--storage: got nothing, wanted the URL that mhc-tune was given; sqlite:///... on one machine")
    return storage
