"""One process at a time on a device while something is timed there: a lock per GPU, and one for the CPU of the machine.

The lock is ``flock`` on a file in the folder for temporary files, named by the GPU's UUID, so that it holds across processes, users and
whatever CUDA_VISIBLE_DEVICES each of them has. The kernel releases it with the process that holds it, however that one ends: there are no
stale locks. Processes with different folders (TMPDIR, containers) do not see each other's locks.

Timing takes it exclusively. Other work on the device, as the correctness gate's, takes it ``shared``: it runs beside its like, but not
beside a timing, which it would spoil as much as another timing would.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.errors import TuneError

if TYPE_CHECKING:
    import torch

#: Longer than any one timing takes, and half of it for the gate and half for the timing still end before the job's own limit.
LOCK_S = 45.0
POLL_S = 0.005


class DeviceBusy(TuneError):
    """Another process kept the device's lock for longer than was to be waited."""


def lock_name(device: str | torch.device) -> str:
    """``"cpu"``, or the UUID of a CUDA device (where torch does not tell it, its index)."""
    import torch

    device = torch.device(device)
    if device.type == "cpu":
        return "cpu"
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", f"cuda-{device.index or 0}"))


def lock_path(name: str) -> Path:
    return Path(tempfile.gettempdir()) / f"mhc-tune-{name}.lock"


@contextlib.contextmanager
def hold(name: str, shared: bool = False, timeout_s: float = LOCK_S) -> Iterator[None]:
    """Hold the lock called ``name``. Raises :class:`DeviceBusy` with the holder's process after ``timeout_s`` seconds of waiting, and
    :class:`TuneError` where the file cannot be used at all.
    """
    path = lock_path(name)
    file = _acquire(path, shared, time.monotonic() + timeout_s, timeout_s)
    try:
        # for the one who waits in vain; the lock does not depend on it (another user's file may be read-only, the disk full)
        with contextlib.suppress(OSError):
            os.ftruncate(file, 0)
            os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        if not shared:
            with contextlib.suppress(OSError):
                os.ftruncate(file, 0)
        os.close(file)


def _acquire(path: Path, shared: bool, deadline: float, timeout_s: float) -> int:
    """The open file that has the lock."""
    while True:
        try:
            file = _open(path)
        except OSError as e:
            raise TuneError(f"device lock {path}: {e.strerror}, wanted a file to lock; set TMPDIR to a folder of your own") from None
        try:
            while not _try(file, shared):
                if time.monotonic() >= deadline:
                    what = "to check numbers" if shared else "to time"
                    raise DeviceBusy(f"device lock {path}: held by {_holder(file)}, wanted it {what} within {timeout_s:g} s")
                time.sleep(POLL_S)
            if _is_at(file, path):
                return file
        except OSError as e:
            os.close(file)
            raise TuneError(f"device lock {path}: {e.strerror}, wanted to lock it; set TMPDIR to a local folder") from None
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # somebody cleaned the folder meanwhile: whoever comes next locks another file


def _open(path: Path) -> int:
    """Open the file, made for every user if it is not there. Raises OSError."""
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # no symbolic link, and no waiting for a planted pipe's other end
    for _ in range(100):
        # without O_CREAT first: in a sticky folder Linux refuses it for another user's file (fs.protected_regular)
        for access in (os.O_RDWR, os.O_RDONLY):
            try:
                file = os.open(path, access | flags)
            except FileNotFoundError:
                break
            except PermissionError:
                if access == os.O_RDONLY:
                    raise
            else:
                if not stat.S_ISREG(os.fstat(file).st_mode):
                    os.close(file)
                    raise OSError(errno.EINVAL, "not a regular file")
                return file
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | flags, 0o666)
        except FileExistsError:
            continue
        os.fchmod(file, 0o666)  # the umask took from it
        return file
    raise OSError(errno.EAGAIN, "it comes and goes")


def _try(file: int, shared: bool) -> bool:
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: int, path: Path) -> bool:
    try:
        at = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(file), at)


def _holder(file: int) -> str:
    said = os.pread(file, 32, 0).split(b"\n")[0].decode("ascii", "replace").strip()
    return f"process {said}" if said.isdigit() else "a process that left no name"
