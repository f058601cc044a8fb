"""Stand-ins for the compile and measure jobs, run in real worker processes: fast, deterministic, and faulty where a test says so."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from tuner.worker_main import FatalError


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


def measure_ok(
    name: str, p: Any, T: int, cfg: dict[str, Any], target: str, effort: Any, seed: int, best_us: float | None
) -> dict[str, Any]:
    us = measured_us(cfg)
    return {"outcome": "ok", "error": {"u": 1e-3}, "time_us": us, "time_ci_us": (us * 0.999, us * 1.001), "samples": 7}


def measure_slowly(*args: Any) -> dict[str, Any]:
    time.sleep(0.3)
    return measure_ok(*args)


def measure_dying(*args: Any) -> dict[str, Any]:
    """The fastest configuration takes the measuring process down."""
    if args[3]["block_C"] == 1280:
        os._exit(9)
    return measure_ok(*args)


def confirm_ok(
    name: str, p: Any, T: int, cfgs: list[dict[str, Any]], target: str, effort: Any, seed: int, with_reference: bool
) -> list[list[float]]:
    samples = [[measured_us(cfg) * (1 + 1e-4 * i) for i in range(9)] for cfg in cfgs]
    return samples + ([[1e6] * 9] if with_reference else [])


def poisoned_device() -> None:
    raise FatalError("CUDA error: an illegal memory access was encountered")


def copy_ok(target: str) -> float:
    return 10.0
