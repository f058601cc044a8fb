"""Stand-ins for the compile and measure jobs, run in real worker processes: fast, deterministic, and faulty where a test says so."""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tl_kernels import KERNELS
from tuner.device_lock import DeviceBusy
from tuner.worker_main import FatalError

_asked = 0


def measured_us(cfg: dict[str, Any]) -> float:
    """Larger channel blocks are faster."""
    return 1e4 / cfg["block_C"]


def compile_ok(name: str, p: Any, cfg: dict[str, Any], target: str) -> dict[str, Any]:
    return {"seconds": 0.0, "shared_bytes": None, "infeasible": None}


def compile_faulty(name: str, p: Any, cfg: dict[str, Any], target: str) -> dict[str, Any]:
    """block_C 128 crashes the compiler, 320 hangs it, 512 raises, 640 needs too much shared memory."""
    if cfg["block_C"] == 128:
        signal.raise_signal(signal.SIGSEGV)
    if cfg["block_C"] == 320:
        time.sleep(60)
    if cfg["block_C"] == 512:
        raise RuntimeError("a long trace\n  of many lines\nno available layout found")
    infeasible = "999999 bytes of shared memory, a block has 232448" if cfg["block_C"] == 640 else None
    return {"seconds": 0.0, "shared_bytes": None, "infeasible": infeasible}


def compile_refusing(name: str, p: Any, cfg: dict[str, Any], target: str) -> dict[str, Any]:
    """block_C 512 does not compile, 640 needs too much shared memory."""
    if cfg["block_C"] == 512:
        raise RuntimeError("no available layout found")
    refused = {"infeasible": "999999 bytes of shared memory, a block has 232448", "rung": "shared"} if cfg["block_C"] == 640 else {}
    return {"seconds": 0.0, "shared_bytes": None, "infeasible": None, "rung": None, **refused}


def measure_ok(
    name: str, p: Any, T: int, cfg: dict[str, Any], target: str, effort: Any, seed: int, best_us: float | None
) -> dict[str, Any]:
    us = measured_us(cfg)
    return {"outcome": "ok", "error": {"u": 1e-3}, "time_us": us, "time_ci_us": (us * 0.999, us * 1.001), "samples": 7}


def _is_default(name: str, p: Any, cfg: dict[str, Any]) -> bool:
    return dict(cfg) == KERNELS[name].default(p)


def compile_without_end_for_the_default(name: str, p: Any, cfg: dict[str, Any], target: str) -> dict[str, Any]:
    if _is_default(name, p, cfg):
        time.sleep(600)
    return compile_ok(name, p, cfg, target)


def measure_all_but_the_default(*args: Any) -> dict[str, Any]:
    if _is_default(args[0], args[1], args[3]):
        raise RuntimeError("too many resources requested for launch")
    return measure_ok(*args)


def measure_slowly(*args: Any) -> dict[str, Any]:
    time.sleep(0.3)
    return measure_ok(*args)


def measure_a_while(*args: Any) -> dict[str, Any]:
    time.sleep(random.uniform(0.02, 0.3))
    return measure_ok(*args)


def measure_dying(*args: Any) -> dict[str, Any]:
    """The fastest configuration takes the measuring process down."""
    if args[3]["block_C"] == 1280:
        os._exit(9)
    return measure_ok(*args)


def confirm_ok(
    name: str, p: Any, T: int, cfgs: list[dict[str, Any]], target: str, effort: Any, seed: int, with_reference: bool
) -> dict[str, Any]:
    samples = [[measured_us(cfg) * (1 + 1e-4 * i) for i in range(9)] for cfg in cfgs]
    return {"samples": samples + ([[1e6] * 9] if with_reference else []), "clock_mhz": 1980.0, "dropped": 1, "dirty": None}


def measure_where(*args: Any) -> dict[str, Any]:
    """Says which device its process sees, as the samples' number."""
    time.sleep(0.1)
    return {**measure_ok(*args), "samples": int(os.environ["CUDA_VISIBLE_DEVICES"]), "gate_s": 0.04, "timing_s": 0.05}


def measure_on_one_of_two(*args: Any) -> dict[str, Any]:
    """Device 1 falls off the bus."""
    if os.environ["CUDA_VISIBLE_DEVICES"] == "1":
        raise FatalError("the GPU is gone: no CUDA-capable device is detected")
    return measure_ok(*args)


def measure_nowhere(*args: Any) -> dict[str, Any]:
    raise FatalError("the GPU is gone: no CUDA-capable device is detected")


def measure_when_free(*args: Any) -> dict[str, Any]:
    """Another process has the device's lock, the first two times that this process asks."""
    global _asked
    _asked += 1
    if _asked <= 2:
        raise DeviceBusy("device lock /tmp/x.lock: held by process 1")
    return measure_ok(*args)


def confirm_then_remove_the_storage(*args: Any) -> dict[str, Any]:
    """The first study's confirmation is the last thing that the storage sees."""
    path = Path(os.environ["PLANTED_STORAGE"])
    if path.with_suffix(".once").exists():
        time.sleep(1.5)  # the first one's is being stored meanwhile
        path.unlink(missing_ok=True)
    path.with_suffix(".once").touch()
    return confirm_ok(*args)


def compile_on_a_full_disk(name: str, p: Any, cfg: dict[str, Any], target: str) -> dict[str, Any]:
    """As g++ and TileLang say it: in the middle."""
    raise RuntimeError("g++ failed:\n/tmp/x.cc: fatal error: error writing to /tmp/x.s: No space left on device\ncompilation terminated.")


def compile_at_the_second_try(*args: Any) -> dict[str, Any]:
    """Each process finds no memory for its first job."""
    global _asked
    _asked += 1
    if _asked == 1:
        raise MemoryError
    return compile_ok(*args)


def compile_without_memory(name: str, p: Any, cfg: dict[str, Any], target: str) -> dict[str, Any]:
    """block_C 512 never finds enough, the others do."""
    if cfg["block_C"] == 512:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    return compile_ok(name, p, cfg, target)


def measure_never(*args: Any) -> dict[str, Any]:
    raise DeviceBusy("device lock /tmp/x.lock: held by process 1")


def measure_then_remove_storages(*args: Any) -> dict[str, Any]:
    """Whatever SQLite file stands in the folder."""
    for path in Path.cwd().glob("*.db"):
        path.unlink(missing_ok=True)
    return measure_ok(*args)


def copy_unless_url_is_known(target: str) -> float:
    """The environment and command line of a measuring process hold no storage URL."""
    known = f"{dict(os.environ)} {Path('/proc/self/cmdline').read_text()}"
    if "postgresql" in known:
        raise RuntimeError("the storage URL is known here")
    return 10.0


def import_path() -> list[str]:
    return sys.path


def poisoned_device() -> None:
    raise FatalError("CUDA error: an illegal memory access was encountered")


def copy_ok(target: str) -> float:
    return 10.0
