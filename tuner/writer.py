"""Tuned entries into the profile file: checked before the run, merged with what is there, written after every finished study.

Several tuners may write one profile at once: each write reads the file again and merges, under the profile's lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from mhc.files import remove_left_over
from mhc.profile import ProfileError, read_profile, save_profile
from mhc.schema import SCHEMA_VERSION, Entry, Profile, Provenance
from tl_kernels import KERNELS
from tuner.errors import TuneError, writing
from tuner.hardware import Hardware


def check_writable(path: Path, option: str = "--output") -> None:
    """Raise :class:`TuneError` where ``path`` could not be replaced later."""
    with writing(f"{option} {path}"):
        if path.is_dir():
            raise TuneError(f"{option} {path}: is a folder, wanted a file")
        if path.exists() and not path.is_file():
            raise TuneError(f"{option} {path}: is no regular file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):  # without a name: nothing is left of it, whatever becomes of this process
            pass
    if path.exists() and not os.access(path, os.W_OK):
        raise TuneError(f"{option} {path}: is read-only")


#: Seconds that a writer waits for the others; each takes milliseconds.
LOCK_TIMEOUT_S, LOCK_POLL_S = 60.0, 0.02


@contextlib.contextmanager
def lock(path: Path, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
    """Alone among the tuners that write ``path``. Raises :class:`TuneError` after ``timeout_s``, OSError where no file can stand beside it.

    Nothing is left of it, unless by SIGKILL, and then it does no harm.
    """
    path = Path(os.path.realpath(path))
    beside, until = path.with_name(f".{path.name}.lock"), time.monotonic() + timeout_s
    stream = _try_lock(beside)
    while stream is None:
        if time.monotonic() > until:
            raise TuneError(f"--output: {path}: another mhc-tune has been writing it for {timeout_s:.0f} s ({beside} is locked)")
        time.sleep(LOCK_POLL_S)
        stream = _try_lock(beside)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()
        stream.close()


def _try_lock(beside: Path) -> IO[str] | None:
    stream = open(beside, "a")  # noqa: SIM115  # the caller closes it, which ends the lock
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # whoever had it before removed the file: a lock on a file without a name locks nobody out
        if os.path.samestat(os.fstat(stream.fileno()), beside.stat()):
            return stream
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        stream.close()
        raise
    stream.close()
    return None


class ProfileWriter:
    """The profile at ``path`` as it stands: kept entries plus those tuned in this run."""

    def __init__(self, path: Path, hardware: Hardware) -> None:
        self.path, self.hardware = path, hardware
        #: Why entries of the old file were left out, for the display.
        self.notes: list[str] = []
        self._entries: dict[tuple[Any, ...], Entry] = {}
        self._tuned: dict[tuple[Any, ...], Entry] = {}
        check_writable(path)
        #: The device of the file that was there, where it is another one; its entries were dropped.
        self._dropped: tuple[str, str] | None = None
        if path.exists():
            self._entries = self._kept(first=True)
        #: True once this run wrote the file.
        self.written = False

    def _kept(self, first: bool = False) -> dict[tuple[Any, ...], Entry]:
        """The entries of the file that are still good; ``first``: with a note on the others."""
        try:
            old = read_profile(self.path)
        except ProfileError as e:
            raise TuneError(f"--output: {e}; mend it, remove it or name another file") from None
        device = (old.provenance.arch, old.provenance.gpu)
        if device != (self.hardware.arch, self.hardware.name):
            if first:
                self._dropped = device
                self.notes.append(f"{self.path}: was tuned on {old.provenance.gpu}; its {len(old.entries)} entries are dropped")
            elif device != self._dropped or self.written:
                raise TuneError(f"--output: {self.path}: another run wrote it meanwhile, on {old.provenance.gpu}; name another file")
            return {}
        fresh = {e.key: e for e in old.entries if e.kernel in KERNELS and e.source_hash == _hash(e.kernel)}
        if first and len(fresh) < len(old.entries):
            self.notes.append(f"{self.path}: {len(old.entries) - len(fresh)} entries dropped, their kernels have changed since")
        return fresh

    def add(self, entries: list[Entry], provenance: Provenance) -> None:
        """Merge ``entries`` with what stands in the file by now, and write it. Raises :class:`TuneError` where it cannot be written."""
        tuned = {**self._tuned, **{entry.key: entry for entry in entries}}
        order = {name: i for i, name in enumerate(KERNELS)}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with lock(self.path):
                kept = self._kept() if self.path.exists() else self._entries
                merged = {**kept, **tuned}
                ordered = sorted(merged.values(), key=lambda e: (order[e.kernel], e.n, e.C, e.dtype, e.tokens))
                remove_left_over(self.path)
                save_profile(Profile(schema_version=SCHEMA_VERSION, provenance=provenance, entries=ordered), self.path)
        except ProfileError as e:
            raise TuneError(f"--output: {e}") from None
        except OSError as e:
            raise TuneError(f"--output: {self.path}: cannot be written: {e.strerror or e}") from None
        self._entries, self._tuned, self.written = merged, tuned, True

    @property
    def entries(self) -> list[Entry]:
        return list(self._entries.values())


def _hash(kernel: str) -> str | None:
    try:
        return KERNELS[kernel].source_hash
    except ImportError:
        return None


def make_provenance(hardware: Hardware, copy_gbps: float, seed: int, trials: int, command: str) -> Provenance:
    """Where, with what and when."""
    import tilelang
    import torch

    return Provenance(
        gpu=hardware.name,
        arch=hardware.arch,
        sm_count=hardware.sm_count,
        power_limit_w=hardware.power_limit_w,
        driver=hardware.driver,
        cuda=hardware.cuda,
        torch=torch.__version__,
        tilelang=tilelang.__version__,
        copy_gbps=round(copy_gbps, 2),
        seed=seed,
        trials=trials,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=git_commit(),
        command=command,
    )


@functools.cache
def git_commit() -> str | None:
    """The commit of the checkout the tuner runs from, with ``+`` where it has changes; None outside one, as in an environment that lies in
    somebody's repository. Asked once: what a run writes is no change of what it runs.
    """
    file = Path(__file__).resolve()

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=file.parent, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "--", file.name)
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
