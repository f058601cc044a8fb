"""In workers, in place of the jobs of tuner/latency_job.py: times without a kernel, as the environment says."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from tuner.worker_main import FatalError

#: JSON. ``us``: kernel -> microseconds (100); ``other``: the same in the other revision; ``runs``: factors by which one run after another
#: differs, in turn; ``faults``: kernel -> what happens to its process; ``program``, ``other_program``: of every kernel; ``clock``,
#: ``dirty``, ``copy``: what is found with it; ``folder``: where runs are counted.
VARIABLE = "TEST_PLANTED_LATENCY"
#: Set where the fault is that of the second run.
SECOND = "second run: "

_run = None
_case = None


def spec():
    return json.loads(os.environ[VARIABLE])


def is_other():
    """Whether this process runs another revision: it imports from the folder that holds nothing but today's tuner."""
    return any(Path(folder).name == "tuner-only" for folder in sys.path)


def start_planted():
    global _run
    if _run is None:
        side = "other" if is_other() else "here"
        _run = len(list(Path(spec()["folder"]).glob(f"{side}*")))
        (Path(spec()["folder"]) / f"{side}{_run}").touch()


def surface_planted(profile, wanted, root):
    return {"profile": True, "cases": wanted, "untuned": 0, "kernels": [], "entries": [], "hashes": {}}


def copy_planted(target):
    return spec().get("copy", 30.0)


def build_planted(case, target):
    if spec().get("faults", {}).get(case.kernel) == "does not compile":
        raise RuntimeError("a long trace\nno layout found")
    return {"seconds": 0.0, "program": spec().get("other_program" if is_other() else "program", "0123")}


def prepare_planted(case, target, seed):
    global _case
    _case = case
    fault = spec().get("faults", {}).get(case.kernel, "")
    if fault.startswith(SECOND):
        fault = fault.removeprefix(SECOND) if _run else ""
    if fault == "crashes":
        signal.raise_signal(signal.SIGSEGV)
    if fault == "hangs":
        time.sleep(60)
    if fault == "raises":
        raise RuntimeError("too many resources\nrequested | for launch")
    if fault == "gone":
        raise FatalError("the GPU is gone: no CUDA-capable device is detected")
    if fault == "Ctrl-C":
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)


def batch_planted(target, rounds):
    us = spec().get("other" if is_other() else "us", {}).get(_case.kernel, 100.0)
    runs = spec().get("runs", [1.0])
    us *= runs[(_run or 0) % len(runs)]
    return {"samples": [us] * rounds, "clock_mhz": spec().get("clock"), "dropped": 0, "dirty": spec().get("dirty")}
