"""A profile is all of the old one or all of the new one, whenever its writer dies and wherever the disk ends.

``MHC_KILLS=500 pytest -s tests/tuner/test_robust_writes.py`` kills more writers.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mhc.files import remove_left_over, replace_file
from mhc.profile import ProfileError, read_profile, save_profile
from mhc.schema import SCHEMA_VERSION, Profile
from tests.tuner.conftest import HARDWARE
from tests.tuner.test_writer import entry, provenance
from tuner.errors import TuneError
from tuner.writer import ProfileWriter

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("MHC_KILLS", "30"))


def many(us: float, count: int = 20) -> list[Any]:
    return [entry(C=64 * (i + 1), us=us) for i in range(count)]


OLD, NEW = (Profile(schema_version=SCHEMA_VERSION, provenance=provenance(), entries=many(us, count)) for us, count in ((1.0, 1), (2.0, 20)))


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def kill_one(write: Callable[[int], None], read: Callable[[], None], moment: random.Random) -> None:
    """Start a process that writes without end, read beside it, and kill it."""
    child = os.fork()
    if child == 0:
        try:
            for k in itertools.count():
                write(k)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    try:
        until = time.monotonic() + moment.uniform(0, 0.05)
        while time.monotonic() < until:
            read()
        time.sleep(moment.uniform(0, 0.005))
    finally:
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status), "the writer ended by itself"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("whole", [False, True], ids=["replace_file", "ProfileWriter"])
def test_a_killed_writer_leaves_the_old_or_the_new_profile(tmp_path, whole):
    path, moment = tmp_path / "cpu.yaml", random.Random(0)
    texts = []
    for p in (OLD, NEW):
        save_profile(p, path)
        texts.append(path.read_text())
    sets = [many(1.0), many(2.0)]

    def write(k: int) -> None:
        if whole:
            ProfileWriter(path, HARDWARE).add(sets[k % 2], OLD.provenance)
        else:  # nothing but the writing, so that most kills hit it
            replace_file(path, texts[k % 2])

    def read() -> None:
        found = read_profile(path)
        if whole:
            assert [e.time_us for e in found.entries] in ([1.0] * 20, [2.0] * 20)
        else:
            assert found in (OLD, NEW)

    cut = most = 0
    for _ in range(KILLS):
        before = len(names(tmp_path))
        kill_one(write, read, moment)
        read()
        cut += len(names(tmp_path)) > before
        most = max(most, len(names(tmp_path)))
    print(f"\n{KILLS} writers killed ({'ProfileWriter' if whole else 'replace_file'}), {cut} in the middle of a file; {most} files at most")
    ProfileWriter(path, HARDWARE).add(sets[0], OLD.provenance)
    remove_left_over(path)
    assert names(tmp_path) == ["cpu.yaml"]


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    path = tmp_path / "cpu.yaml"
    for name in (".cpu.yaml.abc.tmp", ".cpu.yaml.x_1.tmp", ".h100.yaml.abc.tmp", ".cpu.yaml.lock", "cpu.yaml.tmp"):
        (tmp_path / name).write_text("")
    remove_left_over(path)
    assert names(tmp_path) == [".cpu.yaml.lock", ".h100.yaml.abc.tmp", "cpu.yaml.tmp"]


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file grows beyond ``size`` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("size", [0, 1, 700, 4096])
def test_where_no_room_is_left_the_old_profile_stays(tmp_path, size):
    path = tmp_path / "cpu.yaml"
    save_profile(OLD, path)
    before = path.read_bytes()
    with room_for(size), pytest.raises(ProfileError, match="cannot be written: File too large") as e:
        save_profile(NEW, path)
    assert str(e.value).isprintable()
    assert path.read_bytes() == before
    assert names(tmp_path) == ["cpu.yaml"]


def test_what_found_no_room_is_written_with_the_next_study(tmp_path):
    path = tmp_path / "cpu.yaml"
    writer = ProfileWriter(path, HARDWARE)
    writer.add([entry(C=64)], provenance())
    before = path.read_bytes()
    with room_for(len(before)), pytest.raises(TuneError, match=r"--output: .*cpu\.yaml: cannot be written: File too large"):
        writer.add([entry(C=128)], provenance())
    assert path.read_bytes() == before
    assert names(tmp_path) == ["cpu.yaml"]
    writer.add([entry(C=128)], provenance())
    assert [e.C for e in read_profile(path).entries] == [64, 128]


def test_full_and_read_only_disks(tmp_path):
    """In a mount namespace of their own: tests/tuner/tiny_disk.py."""
    enter = ["unshare", "--map-root-user", "--mount", "--"]
    try:
        subprocess.run([*enter, "sh", "-c", f"mount -t tmpfs -o size=64k tiny '{tmp_path}'"], check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as e:
        pytest.skip(f"no mount namespace here: {e}")
    command = [*enter, sys.executable, "-m", "tests.tuner.tiny_disk", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
