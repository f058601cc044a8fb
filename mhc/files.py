"""Whole files: read with a bound on what is read, and replaced so that no reader ever sees half of one."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path


def read_text(path: str | Path, max_bytes: int) -> str:
    """The content of a regular file, in UTF-8.

    Raises OSError also for a FIFO or a device (which may never end), for more than ``max_bytes`` and for a name that no file may have;
    UnicodeDecodeError where it is no UTF-8.
    """
    try:
        # not blocking: a FIFO that nobody writes to would never open
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except ValueError as e:  # a NUL in the name
        raise OSError(str(e)) from None
    try:
        with open(handle, "rb", closefd=False) as stream:  # which refuses a folder, and would not close it
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise OSError("is no regular file")
            content = stream.read(max_bytes + 1)
    finally:
        os.close(handle)
    if len(content) > max_bytes:
        raise OSError(f"more than {max_bytes >> 20} MiB")
    return content.decode("utf-8-sig")


def replace_file(path: str | Path, text: str) -> None:
    """Make ``text`` (UTF-8) the content of ``path``; links are followed, folders made.

    At whatever moment this process dies, a reader sees all of the old file or all of the new one. Raises OSError where it cannot be done,
    or where ``path`` is a folder or a device; the old file is whole then.
    """
    try:
        path = Path(os.path.realpath(path))
        # root may rename a file over /dev/null, and /dev/null is a file then
        if path.exists() and not path.is_file():
            raise OSError("is no regular file")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except ValueError as e:  # a NUL in the name
        raise OSError(str(e)) from None
    temporary = Path(name)
    try:
        with open(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync(folder: Path) -> None:
    """Have the new name on the disk too, so that a power cut does not bring the old file back; best effort, not every system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_left_over(path: str | Path) -> None:
    """Remove the temporary files of writers that were killed; only for who knows that nobody else writes ``path`` now."""
    path = Path(os.path.realpath(path))
    for left in path.parent.iterdir():
        if left.name.startswith(f".{path.name}.") and left.name.endswith(".tmp"):
            with contextlib.suppress(OSError):
                left.unlink()
