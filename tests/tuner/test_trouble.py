"""tuner/trouble.py: a full disk, no memory, a device kept: told apart from what is wrong with a job."""

import errno
import os
import shutil
import tempfile
from types import SimpleNamespace

import pytest

from tuner.device_lock import DeviceBusy
from tuner.trouble import ROOM, trouble


@pytest.fixture
def free(monkeypatch):
    """``free(bytes)``: what is left on the disk of temporary files."""

    def leave(count):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=count))

    leave(ROOM)
    return leave


def raised(number):
    """An error of the system that somebody makes another of."""
    try:
        try:
            raise OSError(number, os.strerror(number))
        except OSError:
            raise RuntimeError("compilation failed") from None
    except RuntimeError as e:
        return e


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM])
def test_the_machines_trouble_is_found_behind_what_was_made_of_it(free, number):
    assert os.strerror(number) in trouble(raised(number))


def test_of_a_compilers_many_lines_the_one_that_says_it_is_kept(free):
    said = "x.cc:78:1: fatal error: error writing to /tmp/x.s: No space left on device"
    assert trouble(RuntimeError(f"nvcc failed\n{said}\n   78 | }}\ncompilation terminated.")) == said


def test_a_device_that_is_kept_and_a_lack_of_memory_are_of_the_machine(free):
    assert trouble(DeviceBusy("held by process 1")) == "held by process 1"
    assert trouble(MemoryError()) == "MemoryError"


@pytest.mark.parametrize("error", [raised(errno.ENOENT), RuntimeError("no layout found"), ValueError(), RuntimeError("CUDA out of memory")])
def test_anything_else_is_the_jobs(free, error):
    assert trouble(error) is None


def test_where_no_folder_takes_a_file_is_of_the_machine(free, monkeypatch):
    """One file system, and it is full: Python tries them all, the working folder last."""

    def nowhere():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    assert "No usable temporary directory" in trouble(RuntimeError("}"))


def test_where_the_compiler_had_no_room_whatever_it_said_is_of_the_machine(free):
    free(ROOM - 1)
    assert f"{ROOM - 1} bytes are free" in trouble(RuntimeError("}"))
