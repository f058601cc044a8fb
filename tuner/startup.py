"""``mhc-tune startup``: how long a training script takes from its start to the end of its first step, ours and rivals.

Each start is a process of its own (tuner/startup_worker.py): Python, torch, the implementation, one boundary around the identity layer,
forward + backward twice. Four ways to start:

* ``cold``: nothing was ever compiled here; every cache of TileLang, Triton, Inductor and CUDA is an empty folder;
* ``cached``: the same once more, with the caches that the cold start filled;
* ``warm_up`` (ours): as cold, with ``mhc.warm_up`` before the first step;
* ``bundle`` (ours, with ``--bundle``): empty caches again, programs from the bundle, and no compiler on PATH.

Starts of different implementations take turns. Writes startup.json and startup.md; ``complete`` says whether nothing interrupted it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mhc.files import replace_file
from tl_kernels.child_python import module_arguments
from tuner.bench_case import TOLERANCE, Shape
from tuner.bench_display import BenchDisplay
from tuner.bench_remote import find_env, parse_envs, python_command
from tuner.bench_rivals import check_rivals, rival, rival_names
from tuner.errors import INTERRUPTED, TuneError, one_line, unknown, writing
from tuner.hardware import Hardware, resolve
from tuner.plan import split_names
from tuner.startup_report import markdown

#: Seconds for one start: some rivals compile for minutes.
LIMIT_S = 600.0
#: What is timed where nothing is asked for.
SHAPES = {"cuda": "8192x4x2560", "cpu": "64x4x1280"}
#: Where compilers keep what they made: variable -> name of an empty folder.
CACHES = {
    "TILELANG_CACHE_DIR": "tilelang",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "CUDA_CACHE_PATH": "cuda",
    "DG_JIT_CACHE_DIR": "deep_gemm",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
}
COMPILERS = ("CUDA_HOME", "CUDA_PATH", "NVCC", "CXX", "CC")
#: Moments of a start, in their order.
MOMENTS = ("python", "torch", "ready", "first", "second")
#: The way to start that :mod:`tuner.startup_worker` is told of: as cold, but programs are compiled side by side before the first step.
WARM_UP = "warm_up"


@dataclass(frozen=True)
class StartupRequest:
    """The command line as typed; None means the default for the device."""

    command: str
    gpu: str = "auto"
    shape: str | None = None
    dtype: str = "bfloat16"
    rivals: str | None = None
    rival_envs: tuple[str, ...] = ()
    bundle: Path | None = None
    repeats: int = 3
    out: Path | None = None


@dataclass(frozen=True)
class Start:
    """One way to start one implementation."""

    rival: str
    setup: str


def run_startup(request: StartupRequest) -> int:
    """Measure, write and print. Returns the exit code: 0; 1 where ours did not start; 130 after Ctrl-C, with what was measured written.

    Raises :class:`TuneError` for what the user can mend.
    """
    hardware, shape, rivals, envs, out = _plan(request)
    result: dict[str, Any] = {
        "schema": 1,
        "complete": False,
        "hardware": asdict(hardware),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "command": request.command,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "T": shape.T,
        "n": shape.n,
        "C": shape.C,
        "dtype": request.dtype,
        "rows": [],
    }
    code = 0
    try:
        with BenchDisplay() as display:
            display.stage("starting", request.repeats * (2 * len(rivals) + ("ours" in rivals) + (request.bundle is not None)))
            for _ in range(request.repeats):
                for start, seconds, failure in _starts(rivals, request, hardware.device, shape, envs):
                    _store(result, start, seconds, failure)
                    display.tick(f"{start.rival}, {start.setup}")
        result["complete"] = True
    except KeyboardInterrupt:
        code = INTERRUPTED
    if not result["rows"]:
        print(f"mhc-tune startup: interrupted before anything was measured; {out} is as it was", file=sys.stderr)
        return code
    print(markdown(result), end="")  # first: the disk may be full
    _write(result, out)
    return code or (1 if any(row["rival"] == "ours" and row["failure"] for row in result["rows"]) else 0)


def _plan(request: StartupRequest) -> tuple[Hardware, Shape, list[str], dict[str, Path], Path]:
    known = rival_names()
    wanted = [name.replace("-", "_") for name in split_names(request.rivals) or ()]
    envs = parse_envs(list(request.rival_envs))
    check_rivals((*wanted, *envs), known)
    if request.dtype not in TOLERANCE:
        raise unknown("dtype", request.dtype, TOLERANCE)
    shape = None if request.shape is None else Shape.parse(request.shape, "--shape", narrow=False)
    if request.bundle is not None:
        from mhc.bundle import Bundle, BundleError

        try:
            Bundle(request.bundle)
        except BundleError as e:
            raise TuneError(f"--bundle: {e}") from None
    hardware = resolve(request.gpu)
    out = request.out or Path("results") / hardware.profile
    # installed or not: one that is not says so when it is started
    rivals = [name for name in known if name in wanted] if wanted else ["ours"]
    if request.bundle is not None and "ours" not in rivals:
        raise TuneError(f"--bundle: starts ours, which is not among --rivals {request.rivals}")
    return hardware, shape or Shape.parse(SHAPES[hardware.device]), rivals, envs, out


Outcome = tuple[Start, "dict[str, float] | None", "str | None"]


def _starts(rivals: list[str], request: StartupRequest, device: str, shape: Shape, envs: Mapping[str, Path]) -> Iterator[Outcome]:
    """One round: every implementation cold and then cached, and ours warmed up and from its bundle."""
    for name in rivals:
        arguments = [name, str(shape.T), str(shape.n), str(shape.C), request.dtype, device]
        with tempfile.TemporaryDirectory(prefix="mhc-startup-") as folder:
            for setup in ("cold", "cached"):
                yield (Start(name, setup), *_start(arguments, find_env(name, envs), Path(folder), {}))
        if name == "ours":
            with tempfile.TemporaryDirectory(prefix="mhc-startup-") as folder:
                yield (Start(name, WARM_UP), *_start([*arguments, WARM_UP], find_env(name, envs), Path(folder), {}))
        if name == "ours" and request.bundle is not None:
            with tempfile.TemporaryDirectory(prefix="mhc-startup-") as folder:
                variables = {"MHC_BUNDLE": str(request.bundle.absolute()), "PATH": ""}
                yield (Start(name, "bundle"), *_start(arguments, find_env(name, envs), Path(folder), variables))


def _start(arguments: list[str], env: Path | None, folder: Path, more: Mapping[str, str]) -> tuple[dict[str, float] | None, str | None]:
    """Seconds since the process was started, by moment; or why it did not come so far, on one line. ``more``: what a bundle needs, and then
    no variable tells where a compiler is.
    """
    links = folder / "links"
    links.mkdir(exist_ok=True)
    command, variables = python_command(env, module_arguments("tuner.startup_worker", *arguments), links)
    hidden = ("MHC_BUNDLE", *(COMPILERS if more else ()))
    variables = {k: v for k, v in variables.items() if k not in hidden}
    variables |= {variable: str(folder / name) for variable, name in CACHES.items()} | dict(more)
    if "cpu" in arguments:
        # on the CPU PyTorch may serve, and starts at once; of a bundle it is what the profile has that is started
        variables.setdefault("MHC_BACKEND", "auto" if more else "tilelang")
    begun = time.time()
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return None, f"took more than {LIMIT_S:.0f} s"
    except OSError as e:  # its environment's interpreter is none
        return None, one_line(e)
    try:
        said = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return None, f"exit code {done.returncode}" + _last_line(done.stderr)
    if "missing" in said:
        return None, f"not installed: {said['missing']}"
    if more and not said["bundled"]:  # on the CPU PyTorch served
        return None, "no program of the bundle serves this shape" + _last_line(done.stderr)
    return {moment: said[moment] - begun for moment in MOMENTS}, None


def _last_line(stderr: str) -> str:
    lines = stderr.strip().splitlines()
    return f": {lines[-1].strip()[:300]}" if lines else ""


def _store(result: dict[str, Any], start: Start, seconds: dict[str, float] | None, failure: str | None) -> None:
    row = next((row for row in result["rows"] if (row["rival"], row["setup"]) == (start.rival, start.setup)), None)
    if row is None:
        row = {"rival": start.rival, "label": rival(start.rival).label, "setup": start.setup, "samples": [], "failure": None}
        result["rows"].append(row)
    if seconds is None:
        row["failure"] = failure
    else:
        row["samples"].append({moment: round(value, 3) for moment, value in seconds.items()})


def _write(result: dict[str, Any], out: Path) -> None:
    with writing(f"--out {out}"):
        replace_file(out / "startup.json", json.dumps(result, indent=1) + "\n")
        replace_file(out / "startup.md", markdown(result))
