"""Measurements that go wrong in every way a candidate can, by its block_C (at C = 3840); run in real worker processes."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from typing import Any

from tests.tuner import planted


def _hang() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    time.sleep(600)


def _killed_for_memory() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _write_out_of_bounds() -> None:
    ctypes.memset(64, 1, 4096)


def _leave() -> None:
    sys.exit("enough")


def _leave_a_child_that_holds_the_pipes() -> None:
    if os.fork() == 0:
        time.sleep(600)
    os._exit(7)


def _close_the_pipes() -> None:
    os.closerange(0, 256)


def _write_much() -> None:
    print("a line of a compiler\n" * 100_000, flush=True)


def _raise_many_lines() -> None:
    raise ValueError("TVM_FFI trace\n  0: tvm::f()\n\x1b[31mInternalError: Check failed\x1b[0m: nothing fits\n")


#: What each block_C does, and what must be stored of it; those that are not here are fine.
FAULTS = {
    512: (_hang, "timeout", "no result within"),
    640: (_killed_for_memory, "crash", "SIGKILL"),
    768: (_write_out_of_bounds, "crash", "SIGSEGV"),
    1280: (_leave, "crash", "its process died"),
    1920: (_leave_a_child_that_holds_the_pipes, "timeout", "no result within"),
    2048: (_close_the_pipes, "crash", "its process died"),
    3840: (_raise_many_lines, "run_error", "nothing fits"),
    4096: (_write_much, "ok", None),
}


def measure_faulty(*args: Any) -> dict[str, Any]:
    fault = FAULTS.get(args[3]["block_C"])
    if fault is not None:
        fault[0]()
    return planted.measure_ok(*args)


def confirm_hanging(*args: Any) -> Any:
    """The confirmation of the larger C never ends."""
    if args[1].C == 3840:
        time.sleep(600)
    return planted.confirm_ok(*args)
