"""Who holds a trial: a name for people, and enough to tell on the same machine that the process is gone."""

from __future__ import annotations

import functools
import os
import socket
from pathlib import Path


@functools.cache
def _machine() -> str | None:
    """Equal for processes that can see each other's process ids: one boot of one machine, and one namespace of process ids."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process began, in clock ticks since boot: a process id is used again, with another start."""
    try:
        # the second field, the command in parentheses, may hold anything
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def this_process() -> dict[str, str | int | None]:
    """For a trial's user attribute ``worker``."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine(), "started": _started(os.getpid())}


def is_dead(worker: object) -> bool:
    """Whether the process of :func:`this_process` certainly ended. False where it cannot be known, as on another machine."""
    if not isinstance(worker, dict) or worker.get("machine") is None or worker["machine"] != _machine():
        return False
    pid = worker.get("pid")
    return isinstance(pid, int) and worker.get("started") is not None and _started(pid) != worker["started"]
