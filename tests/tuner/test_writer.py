"""tuner/writer.py: entries merged with the file that is there, also where several write it, and where one is killed."""

import os
import random
import re
import signal
import subprocess
import time

import pytest

from mhc.profile import read_profile
from mhc.schema import Entry
from tests.tuner.conftest import HARDWARE
from tl_kernels import KERNELS
from tuner import writer
from tuner.errors import TuneError
from tuner.hardware import Hardware
from tuner.writer import ProfileWriter, check_writable, git_commit, lock, make_provenance


def entry(kernel="pre", C=1280, us=10.0, source_hash=None):
    return Entry(
        kernel=kernel, n=4, C=C, dtype="bfloat16", tokens=64, config={"block_C": 640, "threads": 80}, time_us=us, time_ci_us=(us, us),
        gbps=1.0, copy_share=0.1, default_us=us, verdict="default", error={"u": 1e-3},
        source_hash=source_hash or KERNELS[kernel].source_hash,
    )  # fmt: skip


def provenance(hardware=HARDWARE):
    return make_provenance(hardware, 10.0, 0, 3, "mhc-tune")


def test_what_was_not_retuned_is_kept_and_what_was_is_replaced(tmp_path):
    path = tmp_path / "cpu.yaml"
    ProfileWriter(path, HARDWARE).add([entry(C=1280), entry("post_res", C=1280)], provenance())
    ProfileWriter(path, HARDWARE).add([entry(C=1280, us=5.0), entry(C=2560)], provenance())
    found = {(e.kernel, e.C): e.time_us for e in read_profile(path).entries}
    assert found == {("pre", 1280): 5.0, ("pre", 2560): 10.0, ("post_res", 1280): 10.0}


def test_stale_entries_are_dropped_and_said_to_be(tmp_path):
    path = tmp_path / "cpu.yaml"
    ProfileWriter(path, HARDWARE).add([entry(source_hash="0" * 16), entry("post_res")], provenance())
    writer = ProfileWriter(path, HARDWARE)
    assert "1 entries dropped" in writer.notes[0]
    writer.add([entry(C=2560)], provenance())
    assert {(e.kernel, e.C) for e in read_profile(path).entries} == {("pre", 2560), ("post_res", 1280)}


def test_entries_of_another_device_are_dropped_and_said_to_be(tmp_path):
    path = tmp_path / "cpu.yaml"
    ProfileWriter(path, HARDWARE).add([entry()], provenance())
    writer = ProfileWriter(path, Hardware(profile="cpu", name="Another CPU", arch="cpu"))
    assert "was tuned on Test CPU" in writer.notes[0]
    assert writer.entries == []


def test_a_bad_file_is_refused_before_tuning(tmp_path):
    path = tmp_path / "cpu.yaml"
    path.write_text("entries: [")
    with pytest.raises(TuneError, match=r"cpu\.yaml"):
        ProfileWriter(path, HARDWARE)


def test_a_folder_that_cannot_be_made_is_refused_before_tuning(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TuneError, match="cannot be written"):
        ProfileWriter(tmp_path / "file" / "cpu.yaml", HARDWARE)


def test_checking_leaves_nothing(tmp_path):
    check_writable(tmp_path / "new" / "cpu.yaml")
    assert list((tmp_path / "new").iterdir()) == []


def test_the_commit_is_that_of_the_tuner_and_not_of_whoever_installed_it(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@x", *arguments], cwd=tmp_path, check=True, capture_output=True)

    file = tmp_path / ".venv" / "tuner" / "writer.py"
    file.parent.mkdir(parents=True)
    file.touch()
    monkeypatch.setattr(writer, "__file__", str(file))
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "mine")
    assert git_commit.__wrapped__() is None
    git("add", "-f", str(file))
    git("commit", "-q", "-m", "the tuner")
    assert re.fullmatch("[0-9a-f]{12}", git_commit.__wrapped__())


def test_two_writers_keep_each_others_entries(tmp_path):
    path = tmp_path / "cpu.yaml"
    ProfileWriter(path, HARDWARE).add([entry(C=64), entry(C=128)], provenance())
    first, second = ProfileWriter(path, HARDWARE), ProfileWriter(path, HARDWARE)
    first.add([entry(C=1280, us=1.0), entry(C=128, us=1.0)], provenance())
    second.add([entry(C=2560, us=2.0)], provenance())
    first.add([entry(C=4096, us=3.0)], provenance())
    found = {e.C: e.time_us for e in read_profile(path).entries}
    assert found == {64: 10.0, 128: 1.0, 1280: 1.0, 2560: 2.0, 4096: 3.0}
    assert [p.name for p in tmp_path.iterdir()] == ["cpu.yaml"]


def test_what_another_run_wrote_on_another_device_is_not_overwritten(tmp_path):
    path = tmp_path / "cpu.yaml"
    mine, other = ProfileWriter(path, HARDWARE), Hardware(profile="cpu", name="Another CPU", arch="cpu")
    ProfileWriter(path, other).add([entry(C=64)], provenance(other))
    with pytest.raises(TuneError, match="another run wrote it meanwhile, on Another CPU"):
        mine.add([entry()], provenance())
    assert [e.C for e in read_profile(path).entries] == [64]


def test_a_file_removed_in_mid_run_is_written_again_whole(tmp_path):
    path = tmp_path / "cpu.yaml"
    ProfileWriter(path, HARDWARE).add([entry(C=64)], provenance())
    writer = ProfileWriter(path, HARDWARE)
    path.unlink()
    writer.add([entry(C=128)], provenance())
    assert [e.C for e in read_profile(path).entries] == [64, 128]


def test_a_lock_that_stays_ends_in_one_line(tmp_path):
    path = tmp_path / "cpu.yaml"
    with (
        lock(path),
        pytest.raises(TuneError, match=r"another mhc-tune has been writing it .*\.cpu\.yaml\.lock is locked"),
        lock(path, 0.05),
    ):
        pass
    with lock(path):
        pass


def test_the_folder_is_synchronised_after_the_file_has_its_name(tmp_path, monkeypatch):
    path, synced, fsync = tmp_path / "cpu.yaml", [], os.fsync

    def watched(handle):
        name = os.readlink(f"/proc/self/fd/{handle}")
        synced.append((os.path.basename(name), path.exists()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    ProfileWriter(path, HARDWARE).add([entry()], provenance())
    (temporary, before), (folder, after) = synced
    assert (temporary.endswith(".tmp"), before) == (True, False)
    assert (folder, after) == (tmp_path.name, True)


def in_child(body):
    """The process id of a child that runs ``body``; it exits with 0 where that returns."""
    child = os.fork()
    if child == 0:
        try:
            body()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_writers_in_several_processes_lose_nothing(tmp_path):
    path, about = tmp_path / "cpu.yaml", provenance()

    def write(which):
        writer = ProfileWriter(path, HARDWARE)
        for k in range(6):
            writer.add([entry(C=8 + 100 * which + 8 * k)], about)

    children = [in_child(lambda which=which: write(which)) for which in range(4)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert len(read_profile(path).entries) == 24
    assert [p.name for p in tmp_path.iterdir()] == ["cpu.yaml"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_killed_writer_leaves_the_old_file_or_the_new_one_and_the_next_cleans_up(tmp_path):
    path, about, dice = tmp_path / "cpu.yaml", provenance(), random.Random(0)
    ProfileWriter(path, HARDWARE).add([entry(C=64)], about)

    def write():
        while True:
            ProfileWriter(path, HARDWARE).add([entry(C=128)], about)

    left = 0
    for _ in range(40):
        child = in_child(write)
        time.sleep(dice.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert {e.C for e in read_profile(path).entries} in ({64}, {64, 128})
        left += len(list(tmp_path.iterdir())) > 1
    assert left > 0, "no writer was killed at its work: the test proves nothing"
    ProfileWriter(path, HARDWARE).add([entry(C=256)], about)
    assert [p.name for p in tmp_path.iterdir()] == ["cpu.yaml"]
