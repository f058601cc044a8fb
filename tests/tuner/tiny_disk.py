"""The tuner on a disk that is full or read-only: ``python -m tests.tuner.tiny_disk FOLDER``, in a mount namespace of its own.

Started by tests/tuner/test_robust_writes.py; everything is real but the jobs, which are planted.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mhc.profile import ProfileError, read_profile, save_profile
from tests.tuner import planted
from tests.tuner.conftest import HARDWARE
from tests.tuner.test_robust_writes import NEW, OLD, names
from tests.tuner.test_writer import entry, provenance
from tuner import cli, hardware, store
from tuner import pipeline as pipeline_module
from tuner.errors import TuneError
from tuner.search import Search
from tuner.storage import open_storage
from tuner.writer import ProfileWriter

SIZE = 400 << 10


def mount(folder: Path, *options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join([f"size={SIZE}", *options]), "tiny", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Until not one byte more goes onto the disk."""
    with contextlib.suppress(OSError), open(folder / "filler", "ab", buffering=0) as stream:
        while True:
            stream.write(b"x" * 4096)


def free(folder: Path) -> None:
    (folder / "filler").unlink()


def tune(*args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``mhc-tune`` on one small study."""
    sys.argv = ["mhc-tune", "--gpu", "cpu", "--kernels", "pre_bwd", "--workloads", "mhc-3b", "--tokens", "64", "--trials", "4", *args]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as exit:
        cli.main()
    return exit.value.code, out.getvalue(), err.getvalue()


def check_refused(said: str, *args: str, code: int = 2) -> str:
    """The command ends with ``code`` and one line that says so; returns stdout."""
    got, out, err = tune(*args)
    assert got == code, (got, out, err)
    assert err.startswith("mhc-tune: "), err
    assert len(err.splitlines()) == 1, err
    assert said in err, err
    return out


def in_child(function: Callable[[], Any]) -> None:
    child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def full_disk(disk: Path, big: Path) -> None:
    path, small = big / "cpu.yaml", disk / "small.yaml"
    save_profile(OLD, small)
    fill(disk)
    with pytest.raises(ProfileError, match="cannot be written: No space left on device"):
        save_profile(NEW, small)
    with pytest.raises(TuneError, match=r"--output: .*cannot be written: No space left on device"):
        ProfileWriter(small, HARDWARE).add([entry()], provenance())
    assert read_profile(small) == OLD
    assert names(disk) == ["filler", "small.yaml"]
    with pytest.raises(TuneError, match=r"^--storage sqlite:.*cannot be opened: .*full"):
        open_storage(f"sqlite:///{disk}/x.db")
    check_refused("--storage sqlite:", "--output", str(path), "--storage", f"sqlite:///{disk}/y.db")
    assert not path.exists()

    # everything is tuned, and only then is there no room for --raw
    check_refused("--raw", "--output", str(path), "--raw", str(disk / "raw.json"), code=2)
    assert len(read_profile(path).entries) == 1
    assert "raw.json" not in names(disk)
    print("full disk: profile, --raw and a new SQLite file are refused in one line, the old file stays")
    for left in disk.iterdir():
        left.unlink()


def disk_that_fills_up(disk: Path, big: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PATIENCE_S", (0.01, 0.01))
    url, path = f"sqlite:///{disk}/study.db", big / "second.yaml"
    tell, told = Search.tell, []

    def tell_and_fill(self: Search, *args: Any) -> Any:
        told.append(tell(self, *args))
        if len(told) == 2:
            fill(disk)

    with monkeypatch.context() as patch:
        patch.setattr(Search, "tell", tell_and_fill)
        # in a process that is gone afterwards: what it held is free then
        in_child(lambda: check_refused("lost in mid-run", "--output", str(path), "--storage", url, code=3))
    assert not path.exists()
    free(disk)
    code, out, err = tune("--output", str(path), "--storage", url)
    assert (code, err) == (0, "")
    assert len(read_profile(path).entries) == 1
    print(f"disk full in mid-run: stopped after 2 trials; the same command then went on: {out.strip().splitlines()[-1]}")


def read_only_disk(disk: Path, big: Path) -> None:
    mount(disk)
    save_profile(OLD, disk / "old.yaml")
    mount(disk, "remount", "ro")
    for name in ("old.yaml", "new.yaml", "folder/new.yaml"):
        with pytest.raises(ProfileError, match="cannot be written: Read-only file system"):
            save_profile(NEW, disk / name)
        check_refused("Read-only file system", "--output", str(disk / name))
        check_refused("Read-only file system", "--output", str(big / "third.yaml"), "--raw", str(disk / name))
    check_refused("--storage", "--output", str(big / "third.yaml"), "--storage", f"sqlite:///{disk}/x.db")
    assert read_profile(disk / "old.yaml") == OLD
    assert not (big / "third.yaml").exists()
    os.chdir(disk)
    check_refused("cannot be written: Read-only file system", "--output", str(big / "fourth.yaml"))
    print("read-only disk: refused in one line before anything is tuned")


def main(folder: str) -> None:
    big, disk, other = (Path(folder) / name for name in ("big", "disk", "other"))
    for place in (big, disk, other):
        place.mkdir()
    os.chdir(big)
    mount(disk)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(hardware, "_gpu", lambda: None)
        jobs = {"compile_job": "compile_ok", "measure_job": "measure_ok", "confirm_job": "confirm_ok", "copy_job": "copy_ok"}
        for name, job in jobs.items():
            monkeypatch.setattr(pipeline_module, name, getattr(planted, job))
        full_disk(disk, big)
        disk_that_fills_up(disk, big, monkeypatch)
        read_only_disk(other, big)


if __name__ == "__main__":
    main(sys.argv[1])
