"""Compiling ahead, beside each other, what a shape will time: each program in a process that can be killed, within a limit.

The processes fill TileLang's disk cache, from which this one loads in milliseconds. A program that fails or takes too long is refused to
whoever asks for it afterwards, so that this process never compiles it again: it becomes a failure in the row of who uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, NoReturn

from tl_kernels import KERNELS, launch
from tl_kernels.child_python import cores
from tl_kernels.spec import Config, Kernel, Problem
from tuner import bench_kernels
from tuner.workers import COMPILE_ENV, WorkerError, WorkerPool

Program = tuple[Kernel, Problem, Config]

#: Seconds for one program; the first of a process pays for its imports too. The slowest takes 45 s on one half of a busy core.
COMPILE_S = 120.0
#: How often whoever waits looks up, in seconds.
POLL_S = 1.0


class NotCompiled(RuntimeError):
    """A program was asked for that did not compile, or not in time."""


class Refused:
    """Stands where the launcher of a program would, and says why there is none."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __call__(self, *inputs: object) -> NoReturn:
        raise NotCompiled(self._why)

    def __getattr__(self, name: str) -> NoReturn:
        raise NotCompiled(self._why)


def describe(program: Program) -> str:
    """The program on one short line: ``pre_grad n=4 C=2560 bfloat16 (block_C=512, threads=64)``."""
    kernel, p, config = program
    size = f"n={p.n}" + (f" C={p.C}" if kernel.has_channels else "") + (f" {p.dtype}" if kernel.has_streams else "")
    return f"{kernel.name} {size} ({', '.join(f'{k}={v}' for k, v in config.items())})"


def program_key(program: Program, arch: str) -> tuple[Any, ...]:
    """What tl_kernels/launch.py knows a program by."""
    kernel, p, config = program
    return kernel, p, tuple(sorted(config.items())), arch


def compile_job(name: str, p: Problem, config: Config, arch: str, resources: bool) -> dict[str, Any]:
    """In a worker: compile one program, for the disk cache. Returns its resources, where wanted; see tuner/bench_kernels.py."""
    jit = launch.compile_kernel(KERNELS[name], p, config, arch)
    return {} if arch == "cpu" or not resources else bench_kernels.image_resources(jit, KERNELS[name], p, config, arch)


def refuse(program: Program, arch: str, why: str) -> None:
    """From now on nobody in this process compiles the program: asking for its launcher's use raises :class:`NotCompiled`."""
    launch._LAUNCHERS[program_key(program, arch)] = Refused(f"{program[0].name}: not compiled: {why}")  # type: ignore[assignment]


def compile_ahead(
    programs: Sequence[Program], arch: str, tick: Callable[[str], None], busy: Callable[[list[str]], None], resources: bool = True
) -> list[dict[str, Any]]:
    """Compile, and keep the ``resources`` where they are wanted. Returns {kernel, n, C, dtype, config, failure} of those that could not be.

    ``tick`` is called when one is done, ``busy`` about once a second with those being compiled. An exception, Ctrl-C among them, kills
    every compiler at once.
    """
    failures: list[dict[str, Any]] = []
    if not programs:
        return failures
    with WorkerPool(min(cores(), len(programs)), env=COMPILE_ENV) as pool:
        waiting: dict[Future[Any], Program] = {}
        for program in programs:
            kernel, p, config = program
            waiting[pool.submit(compile_job, kernel.name, p, config, arch, resources, timeout=COMPILE_S)] = program
        while waiting:
            done, _ = wait(waiting, timeout=POLL_S, return_when=FIRST_COMPLETED)
            for future in done:
                program = kernel, p, config = waiting.pop(future)
                try:
                    found = future.result()
                    if resources:
                        bench_kernels.keep_resources(kernel, p, config, arch, found)
                except WorkerError as error:
                    refuse(program, arch, str(error))
                    shape = {"kernel": kernel.name, "n": p.n, "C": p.C, "dtype": p.dtype}
                    failures.append(shape | {"config": dict(config), "failure": str(error)})
                tick(kernel.name)
            busy([describe(program) for future, program in waiting.items() if future.running()])
    return failures
