"""The other end of tuner/bench_worker.py: a rival in a process, and perhaps an environment, of its own."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tl_kernels.child_python import module_arguments
from tuner.bench_entrant import Spec, empty_row
from tuner.errors import TuneError

#: Seconds for a start, for compiling and checking one entrant, and for anything else.
START_S, OPEN_S, CALL_S = 120.0, 300.0, 120.0
PACKAGES = ("tuner", "tl_kernels")
HERE = Path(__file__).resolve().parents[1]
#: Of bash: this project's packages before what the script puts onto PYTHONPATH.
_PYTHON = """export PYTHONPATH="$1${PYTHONPATH:+:$PYTHONPATH}"; shift; exec "$(command -v python || command -v python3)" "$@" """


class WorkerGone(Exception):
    """The process died or gave no answer in time; the message is one line."""


def parse_envs(texts: list[str]) -> dict[str, Path]:
    """``NAME=PATH`` options. Raises :class:`TuneError`."""
    found = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise TuneError(f"--rival-env: got {text!r}, wanted NAME=PATH")
        if not os.path.exists(path):
            raise TuneError(f"--rival-env {text}: {path} does not exist")
        found[name.replace("-", "_")] = Path(path)
    return found


def find_env(name: str, given: Mapping[str, Path]) -> Path | None:
    """Where a rival lives: the option's, else the environment variable's ``MHC_RIVAL_<NAME>``, else ``.rivals/activate-<name>.sh`` here.

    None: it is tried in this environment.
    """
    if name in given:
        return given[name]
    variable = os.environ.get(f"MHC_RIVAL_{name.upper()}")
    if variable:
        return Path(variable)
    for spelled in (name, name.replace("_", "-")):
        script = Path(".rivals") / f"activate-{spelled}.sh"
        if script.is_file():
            return script
    return None


def python_command(env: Path | None, arguments: list[str], links: Path) -> tuple[list[str], dict[str, str]]:
    """Command and environment of ``python *arguments`` where a rival lives (None: here). An interpreter elsewhere sees only those packages
    of this project that it needs, through links in the folder ``links``.
    """
    variables = dict(os.environ)
    if env is None:
        variables["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
        return [sys.executable, *arguments], variables
    # TileLang tells its children where its files are: not to another version of it
    variables = {k: v for k, v in variables.items() if not k.startswith(("TL_", "TVM_", "TILELANG_"))}
    path = str(env.resolve())
    for package in PACKAGES:
        if not (links / package).exists():
            (links / package).symlink_to(HERE / package)
    if env.suffix == ".sh":
        return ["bash", "-c", f'source "$0" && {{ {_PYTHON}; }}', path, str(links), *arguments], variables
    if env.is_dir():
        variables["PYTHONPATH"] = os.pathsep.join([path, str(links)])
        return [sys.executable, *arguments], variables
    variables["PYTHONPATH"] = str(links)
    return [os.path.abspath(env), *arguments], variables  # not resolved: a venv's python is a link


class RivalWorker:
    """One worker process. ``call`` raises :class:`WorkerGone`, or RuntimeError with what the worker says."""

    def __init__(self, device: str, env: Path | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mhc-bench-")
        folder = Path(self._folder.name)
        self._log = folder / "stderr"
        command, variables = python_command(env, module_arguments("tuner.bench_worker", device), folder)
        self._ids = itertools.count()
        self._buffer = b""
        with open(self._log, "wb") as log:
            # a session of its own: Ctrl-C is for the one who writes the results
            self._popen = subprocess.Popen(
                command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
        self.versions: dict[str, Any] = {}

    def start(self) -> None:
        """Wait until it answers."""
        self.versions = self.call("hello", START_S)

    def call(self, do: str, timeout: float = CALL_S, **arguments: Any) -> Any:
        assert self._popen.stdin is not None
        try:
            self._popen.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._popen.stdin.flush()
        except OSError:
            raise self._gone("died") from None
        answer = json.loads(self._line(do, timeout))
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["ok"]

    def _line(self, do: str, timeout: float) -> bytes:
        assert self._popen.stdout is not None
        out = self._popen.stdout.fileno()
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([out], [], [], left)[0]:
                raise self._gone(f"gave no answer to {do!r} within {timeout:.0f} s")
            more = os.read(out, 1 << 16)
            if not more:
                raise self._gone("died")
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _gone(self, how: str) -> WorkerGone:
        self.kill()
        said = self._log.read_text(errors="replace").strip().splitlines() if self._log.exists() else []
        return WorkerGone(f"its process {how}" + (f": {said[-1].strip()[:300]}" if said else ""))

    def kill(self) -> None:
        """End the process; whoever waits for its answer gets a WorkerGone."""
        try:
            os.killpg(self._popen.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        self._popen.wait()

    def entrant(self, spec: Spec) -> RemoteEntrant:
        return RemoteEntrant(self, next(self._ids), spec)

    def warm(self, specs: list[Spec]) -> str | None:
        """Compile what these need. Returns why the rival cannot be imported, or None."""
        for spec in specs:  # one at a time: each has the limit to itself
            missing: str | None = self.call("warm", OPEN_S, specs=[asdict(spec)])
            if missing:
                return missing
        return None

    def retune(self, specs: list[Spec]) -> int:
        """Choose Triton configurations again, undisturbed; the caller sees to that."""
        return self.call("retune", OPEN_S * max(1, len(specs)), specs=[asdict(s) for s in specs])

    def close(self) -> None:
        self.kill()
        for stream in (self._popen.stdin, self._popen.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # what it did not read any more
                    stream.close()
        self._folder.cleanup()


class RemoteEntrant:
    """An :class:`tuner.bench_entrant.Entrant` in a worker. Never raises when opened: a dead worker is a failure in the row."""

    def __init__(self, worker: RivalWorker | None, id: int, spec: Spec) -> None:
        self.spec, self._worker, self._id = spec, worker, id
        self.keys: list[str] = []
        self.row = empty_row(spec)
        if worker is None:
            return
        try:
            opened = worker.call("open", OPEN_S, id=id, spec=asdict(spec))
            self.row, self.keys = opened["row"], opened["keys"]
        except (WorkerGone, RuntimeError) as error:
            self.row["failures"].append(str(error))

    @staticmethod
    def failed(spec: Spec, why: str | None = None) -> RemoteEntrant:
        """The entrant of a process that never worked."""
        entrant = RemoteEntrant(None, 0, spec)
        entrant.row["failures"] += [why] if why else []
        return entrant

    def _ask(self, do: str) -> dict[str, Any]:
        if self._worker is None:
            return {}
        try:
            return self._worker.call(do, id=self._id)
        except (WorkerGone, RuntimeError) as error:
            self.row["failures"].append(f"{do}: {error}")
            self.keys = []
            return {}

    def sample(self) -> dict[str, float]:
        return self._ask("sample") if self.keys else {}

    def host(self) -> dict[str, float]:
        return self._ask("host") if self.keys else {}

    def launches(self) -> dict[str, Any]:
        return self._ask("launches") if self.keys else {}

    def close(self) -> None:
        if self._worker is not None:
            with contextlib.suppress(WorkerGone, RuntimeError):  # what matters is in the row already
                self._worker.call("close", id=self._id)
        self.keys = []
