"""Trouble with the machine: told apart, in the process where it comes up, from what is wrong with the job."""

from __future__ import annotations

import errno
import os

from tuner.device_lock import DeviceBusy

#: What the system says of a disk that is full, and of memory, processes or files that are all in use; compilers repeat it.
_SAID = tuple(os.strerror(n) for n in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE))


def trouble(error: BaseException | None) -> str | None:
    """The line that says what is wrong with the machine, where that is why a job failed; None where the job may be to blame."""
    while error is not None:
        if isinstance(error, DeviceBusy):
            return str(error)
        if isinstance(error, MemoryError):
            return "MemoryError"
        for line in str(error).splitlines():
            if any(said in line for said in _SAID):
                return line.strip()[-400:]
        error = error.__cause__ or error.__context__
    return None
