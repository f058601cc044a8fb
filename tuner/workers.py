"""Killable worker processes: a job that crashes or hangs takes its own process with it and nothing else.

Each worker is ``tuner.worker_main`` in a process group of its own (a Ctrl-C in the terminal does not reach it, and killing it
takes its nvcc along), driven by one thread of this process. Jobs are module-level functions with picklable arguments and results.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tl_kernels.child_python import module_arguments
from tuner.storage import STORAGE_VARIABLE

START_TIMEOUT_S = 180.0


#: Of a process that compiles: no device, one thread, nothing of this process's bundle or storage.
COMPILE_ENV = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "TILELANG_PRINT_ON_COMPILATION": "0",
    "MHC_BUNDLE": "",
    STORAGE_VARIABLE: "",
    "LC_ALL": "C.UTF-8",  # tuner/trouble.py reads what a compiler says of a full disk
}
#: Of a process that measures. OpenMP threads that spin lose their core on a busy machine, and then a 20 us cast takes a scheduler's quantum
#: of 8 ms.
MEASURE_ENV = {"TILELANG_PRINT_ON_COMPILATION": "0", "OMP_WAIT_POLICY": "passive", STORAGE_VARIABLE: "", "MHC_BUNDLE": ""}


class WorkerError(Exception):
    """The job raised: the message is one line."""


class WorkerCrash(WorkerError):
    """The worker process died during the job."""


class WorkerTimeout(WorkerError):
    """The job ran past its limit and its process was killed."""


class WorkerTrouble(WorkerError):
    """The machine's trouble, which says nothing of the job: no process could be had for it, no room on a disk (tuner/trouble.py)."""


class _Process:
    """One worker process and the pipe to it."""

    def __init__(self, env: Mapping[str, str], log: Path | None, nice: int, path: Sequence[str] | None) -> None:
        ours, theirs = os.pipe(), os.pipe()
        read_end, write_end = ours[0], theirs[1]
        # first: they close with this object, also where nothing starts
        self._in, self._out = Connection(read_end, writable=False), Connection(write_end, readable=False)
        folders = [*(path or ()), *(p or os.getcwd() for p in sys.path)]
        full = {**os.environ, **env, "PYTHONPATH": os.pathsep.join(folders)}
        command = [sys.executable, *module_arguments("tuner.worker_main", str(theirs[0]), str(ours[1]), str(nice))]
        stream = open(log if log is not None else os.devnull, "ab")  # noqa: SIM115  (handed to the child, closed below)
        try:
            self.popen = subprocess.Popen(
                command,
                env=full,
                pass_fds=(theirs[0], ours[1]),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        finally:
            os.close(theirs[0])
            os.close(ours[1])
            stream.close()

    def wait_ready(self) -> None:
        """Wait until it takes jobs; meanwhile it can be killed."""
        self._receive(START_TIMEOUT_S)

    def _receive(self, timeout: float) -> tuple[str, Any]:
        try:
            if not self._in.poll(timeout):
                self.kill()
                raise WorkerTimeout(f"no result within {timeout:.0f} s")
            return self._in.recv()
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(1)  # it closes the pipe before it says how it ended
            self.kill()
            code = self.popen.returncode
            try:
                how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
            except ValueError:
                how = f"exit code {code}"
            raise WorkerCrash(f"its process died ({how})") from None

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> Any:
        try:
            self._out.send((fn, args))
        except OSError:
            self.kill()
            raise WorkerTrouble("its process was gone before the job came") from None
        kind, value = self._receive(timeout)
        if kind == "ok":
            return value
        if kind == "fatal":
            self.kill()
            raise WorkerCrash(value)
        raise (WorkerTrouble if kind == "trouble" else WorkerError)(value)

    def kill(self) -> None:
        try:
            os.killpg(self.popen.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        self.popen.wait()

    def close(self) -> None:
        self.kill()
        self._in.close()
        self._out.close()


class WorkerPool:
    """``size`` worker processes, started on their first job. Lower ``priority`` runs first, then first come first served.

    ``env`` is added to this process's environment, ``log`` receives their output (else it is dropped), ``nice`` is their niceness.
    ``path``: folders that they import from before this process's own, ``tuner`` among what is there.
    """

    def __init__(
        self,
        size: int,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        nice: int = 0,
        path: Sequence[str] | None = None,
    ) -> None:
        self.size = size
        self._env, self._log, self._nice, self._path = dict(env or {}), log, nice, path
        self._jobs: queue.PriorityQueue[tuple[float, int, tuple[Any, ...] | None]] = queue.PriorityQueue()
        self._ticket = itertools.count()
        self._processes: dict[int, _Process] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._threads = [threading.Thread(target=self._drive, args=(i,), name=f"worker-{i}", daemon=True) for i in range(size)]
        for thread in self._threads:
            thread.start()

    def submit(self, fn: Callable[..., Any], *args: Any, timeout: float, priority: float = 0.0) -> Future[Any]:
        """Queue ``fn(*args)``. The future raises :class:`WorkerError` (or a subclass); cancelling works until the job starts."""
        future: Future[Any] = Future()
        self._jobs.put((priority, next(self._ticket), (future, fn, args, timeout)))
        return future

    def _drive(self, index: int) -> None:
        while True:
            _, _, job = self._jobs.get()
            if job is None or self._closed:
                return
            future, fn, args, timeout = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._process(index).call(fn, args, timeout))
            except (WorkerCrash, WorkerTimeout) as e:
                self._drop(index)
                future.set_exception(e)
            except BaseException as e:  # the pool outlives any one job, unpicklable ones included
                future.set_exception(e if isinstance(e, WorkerError) else WorkerError(f"{type(e).__name__}: {e}"))

    def _process(self, index: int) -> _Process:
        process = self._processes.get(index)
        if process is not None and process.popen.poll() is not None:
            self._drop(index)
            process = None
        if process is None:
            try:
                process = _Process(self._env, self._log, self._nice, self._path)
                with self._lock:
                    self._processes[index] = process
                    if self._closed:
                        process.kill()
                process.wait_ready()
            except (OSError, WorkerError) as e:
                self._drop(index)
                raise WorkerTrouble(f"a worker process did not start: {e}" + (f"; see {self._log}" if self._log else "")) from None
        return process

    def _drop(self, index: int) -> None:
        with self._lock:
            process = self._processes.pop(index, None)
        if process is not None:
            process.close()

    def close(self) -> None:
        """Kill every worker, whatever it is doing."""
        self._closed = True
        for _ in self._threads:
            self._jobs.put((float("-inf"), next(self._ticket), None))
        with self._lock:
            processes = list(self._processes.values())
        for process in processes:
            process.kill()
        deadline = time.monotonic() + 5
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
