"""Trouble with the machine: told apart, in the process where it comes up, from what is wrong with the job."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile

from tuner.device_lock import DeviceBusy

#: What the system says of a disk that is full, and of memory, processes or files that are all in use; compilers repeat it.
_SAID = tuple(os.strerror(n) for n in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE))
#: Bytes beside which a failed job may have had too few: several times what g++ writes of a program.
ROOM = 8 << 20


def trouble(error: BaseException) -> str | None:
    """The line that says what is wrong with the machine, where that is why a job failed; None where the job may be to blame."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, DeviceBusy):
            return str(cause)
        if isinstance(cause, MemoryError):
            return "MemoryError"
        for line in str(cause).splitlines():
            if any(said in line for said in _SAID):
                return line.strip()[-400:]
        cause = cause.__cause__ or cause.__context__
    return _no_room()


def _no_room() -> str | None:
    """Whether compilers can write: TileLang sends what g++ says of it to the log, its error does not have it."""
    try:
        # both: with TMPDIR full, Python takes another folder, and compilers do not
        for folder in dict.fromkeys((os.environ.get("TMPDIR"), tempfile.gettempdir())):
            if folder and os.path.isdir(folder) and (free := shutil.disk_usage(folder).free) < ROOM:
                return f"{folder}: {free} bytes are free, wanted {ROOM} for temporary files"
    except OSError as e:  # no folder takes a file
        return e.strerror or str(e)
    return None
