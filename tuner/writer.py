"""Tuned entries into the profile file: checked before the run, merged with what is there, written after every finished study."""

from __future__ import annotations

import os
import subprocess
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mhc.profile import ProfileError, read_profile, save_profile
from mhc.schema import SCHEMA_VERSION, Entry, Profile, Provenance
from tl_kernels import KERNELS
from tuner.errors import TuneError
from tuner.hardware import Hardware


def check_writable(path: Path, option: str = "--output") -> None:
    """Raise :class:`TuneError` where ``path`` could not be replaced later."""
    if path.is_dir():
        raise TuneError(f"{option} {path}: is a folder, wanted a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".mhc-tune-"):
            pass
    except OSError as e:
        raise TuneError(f"{option} {path}: cannot be written: {e.strerror or e}") from None
    if path.exists() and not os.access(path, os.W_OK):
        raise TuneError(f"{option} {path}: is read-only")


class ProfileWriter:
    """The profile at ``path`` as it stands: kept entries plus those tuned in this run."""

    def __init__(self, path: Path, hardware: Hardware) -> None:
        self.path, self.hardware = path, hardware
        #: Why entries of the old file were left out, for the display.
        self.notes: list[str] = []
        self._entries: dict[tuple[Any, ...], Entry] = {}
        check_writable(path)
        if path.exists():
            self._keep(path)
        #: True once this run wrote the file.
        self.written = False

    def _keep(self, path: Path) -> None:
        try:
            old = read_profile(path)
        except ProfileError as e:
            raise TuneError(f"--output: {e}; mend it, remove it or name another file") from None
        if (old.provenance.arch, old.provenance.gpu) != (self.hardware.arch, self.hardware.name):
            self.notes.append(f"{path}: was tuned on {old.provenance.gpu}; its {len(old.entries)} entries are dropped")
            return
        stale = 0
        for entry in old.entries:
            fresh = entry.kernel in KERNELS and entry.source_hash == _hash(entry.kernel)
            stale += not fresh
            if fresh:
                self._entries[entry.key] = entry
        if stale:
            self.notes.append(f"{path}: {stale} entries dropped, their kernels have changed since")

    def add(self, entries: list[Entry], provenance: Provenance) -> None:
        """Merge ``entries`` and write the file. Raises :class:`TuneError` where it cannot be written."""
        for entry in entries:
            self._entries[entry.key] = entry
        order = {name: i for i, name in enumerate(KERNELS)}
        ordered = sorted(self._entries.values(), key=lambda e: (order[e.kernel], e.n, e.C, e.dtype, e.tokens))
        try:
            save_profile(Profile(schema_version=SCHEMA_VERSION, provenance=provenance, entries=ordered), self.path)
        except ProfileError as e:
            raise TuneError(f"--output: {e}") from None
        self.written = True

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


def git_commit() -> str | None:
    """The commit of the checkout the tuner runs from, with ``+`` where it has changes; None outside one."""
    folder = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
