"""What every process that measures does with its device: find it, time on it, and end where the device is beyond use.

It imports nothing of the kernels: ``mhc-tune check --against`` runs it beside those of another revision.
"""

from __future__ import annotations

import functools

import torch

from tuner.device_state import Watch
from tuner.errors import one_line
from tuner.timing import Clock
from tuner.worker_main import FatalError

#: How every error begins that nothing else on this machine would be spared.
GPU_GONE = "the GPU is gone"


def device_of(target: str) -> str:
    """``"cpu"`` or ``"cuda"``. Raises :class:`FatalError` where CUDA finds no device: a process started after the GPU was lost."""
    if target == "cpu":
        return "cpu"
    try:
        torch.cuda.init()
    except Exception as e:
        raise FatalError(f"{GPU_GONE}: {one_line(e)}") from None
    return "cuda"


@functools.cache
def clock_of(device: str) -> Clock:
    """The one clock of this process and device: its watch knows the highest clock seen."""
    return Clock(device, Watch.of(device))


def synchronize(device: str) -> None:
    """Before the lock is given up: what was enqueued must not run on into somebody's timing."""
    if device != "cpu":
        torch.cuda.synchronize()


def end_if_beyond_use(device: str, error: BaseException) -> None:
    """Raise :class:`FatalError` where ``error`` left the device so that nothing works any more: an illegal access, a launch failure."""
    if device != "cpu":
        try:
            torch.cuda.synchronize()
        except Exception:  # it stays with the context
            raise FatalError(one_line(error)) from error
