"""tuner/device_lock.py: real processes, killed ones among them."""

import contextlib
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from tuner.device_lock import DeviceBusy, hold, lock_name, lock_path
from tuner.errors import TuneError

HOLDER = """
import sys, time
from tuner.device_lock import hold
with hold("dev", shared=sys.argv[1] == "shared"):
    print("held", flush=True)
    time.sleep(60)
"""
COUNTER = """
import sys, time
from tuner.device_lock import hold
for _ in range(20):
    with hold("dev"):
        with open(sys.argv[1]) as f: count = int(f.read())
        time.sleep(0.002)
        with open(sys.argv[1], "w") as f: f.write(str(count + 1))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p or os.getcwd() for p in sys.path))
    return tmp_path


@contextlib.contextmanager
def holder(how="alone"):
    with subprocess.Popen([sys.executable, "-c", HOLDER, how], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"held\n"
            yield process
        finally:
            process.kill()


def test_who_waits_in_vain_is_told_by_whom_in_one_line():
    with holder() as process:
        start = time.monotonic()
        with (
            pytest.raises(DeviceBusy, match=f"held by process {process.pid}, wanted it to time within 0.2 s") as caught,
            hold("dev", timeout_s=0.2),
        ):
            pytest.fail("two processes have it")
        assert 0.2 <= time.monotonic() - start < 5
        assert "\n" not in str(caught.value)
        with hold("another", timeout_s=0):
            pass


def test_a_killed_holder_leaves_it_free():
    with holder() as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with hold("dev", timeout_s=0):
            pass


def test_who_waits_gets_it_when_the_holder_is_killed():
    with holder() as process:
        threading.Timer(0.3, process.kill).start()
        start = time.monotonic()
        with hold("dev", timeout_s=30):
            assert time.monotonic() - start > 0.2


def test_gates_run_beside_each_other_but_not_beside_a_timing():
    with holder("shared") as process:
        with hold("dev", shared=True, timeout_s=0):
            pass
        with pytest.raises(DeviceBusy), hold("dev", timeout_s=0.05):
            pytest.fail("timed beside a gate")
        process.kill()
    with holder(), pytest.raises(DeviceBusy, match="to check numbers"), hold("dev", shared=True, timeout_s=0.05):
        pytest.fail("a gate beside a timing")


def test_no_update_is_lost_among_processes(folder):
    count = folder / "count"
    count.write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", COUNTER, str(count)]) for _ in range(3)]
    assert [p.wait(60) for p in processes] == [0, 0, 0]
    assert count.read_text() == "60"


def test_it_is_free_after_an_error_and_names_nobody():
    with pytest.raises(ZeroDivisionError), hold("dev"):
        raise ZeroDivisionError
    with hold("dev", timeout_s=0):
        assert lock_path("dev").read_text() == f"{os.getpid()}\n"
    assert lock_path("dev").read_text() == ""


def test_a_cleaned_folder_does_not_let_two_in():
    """Who waited for a file that is no longer there takes the one that later comers find."""
    got, done = threading.Event(), threading.Event()

    def wait():
        with hold("dev", timeout_s=30):
            got.set()
            done.wait(30)

    thread = threading.Thread(target=wait)
    with hold("dev"):
        thread.start()
        time.sleep(0.1)  # it has the old file open
        lock_path("dev").unlink()
    try:
        assert got.wait(30)
        with pytest.raises(DeviceBusy), hold("dev", timeout_s=0.05):
            pytest.fail("two have it")
    finally:
        done.set()
        thread.join()


def test_every_user_may_lock_it_whatever_the_umask():
    before = os.umask(0o077)
    try:
        with hold("dev"):
            assert stat.S_IMODE(lock_path("dev").stat().st_mode) == 0o666
    finally:
        os.umask(before)


def as_nobody(timeout_s, result):
    os.setgid(65534)
    os.setuid(65534)
    try:
        with hold("dev", timeout_s=timeout_s):
            result.put("held")
    except TuneError as e:
        result.put(str(e))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("mode", [0o666, 0o644])
def test_another_users_process_shares_the_lock(folder, monkeypatch, mode):
    with tempfile.TemporaryDirectory(dir="/tmp") as public:  # pytest's own folders are private
        os.chmod(public, 0o1777)
        monkeypatch.setattr(tempfile, "tempdir", public)
        fork = multiprocessing.get_context("fork")  # this interpreter may be out of another user's reach

        def ask():
            result = fork.SimpleQueue()
            process = fork.Process(target=as_nobody, args=(0.1, result))
            process.start()
            process.join()
            return result.get()

        with hold("dev"):
            os.chmod(lock_path("dev"), mode)
            assert f"held by process {os.getpid()}" in ask()
        assert ask() == "held"


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "nowhere"])
def test_what_is_no_file_is_refused_in_one_line(folder, monkeypatch, kind):
    path = lock_path("dev")
    if kind == "link":
        (folder / "precious").write_text("somebody's")
        path.symlink_to(folder / "precious")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(folder / "gone"))
    with pytest.raises(TuneError, match=r"^device lock .*: .*, wanted a file to lock; set TMPDIR") as caught, hold("dev", timeout_s=0):
        pytest.fail("locked it")
    assert "\n" not in str(caught.value)
    assert kind != "link" or (folder / "precious").read_text() == "somebody's"


def test_the_name_is_the_gpus_uuid_whatever_its_index(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="f0e1d2c3"))
    assert lock_name("cuda") == lock_name(torch.device("cuda", 3)) == "f0e1d2c3"
    assert lock_name("cpu") == "cpu"


@pytest.mark.gpu
def test_the_name_on_a_real_gpu():
    assert len(lock_name("cuda")) == 36
    with hold(lock_name("cuda"), timeout_s=5):
        pass
