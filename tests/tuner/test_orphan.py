"""tuner/orphan.py: nobody goes on working for a parent that was killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import python_path

PARENT = """
import os, sys, time
from tests.tuner.test_orphan import say_and_stay_busy
from tuner.workers import WorkerPool
WorkerPool(1).submit(say_and_stay_busy, timeout=300)
time.sleep(300)
"""


def say_and_stay_busy():
    os.write(1, f"{os.getpid()}\n".encode())
    while True:
        sum(range(1000))


def test_a_busy_worker_ends_with_its_parent(tmp_path):
    log = tmp_path / "log"
    root = Path(__file__).resolve().parents[2]
    code = PARENT.replace("WorkerPool(1)", f"WorkerPool(1, log=__import__('pathlib').Path({str(log)!r}))")
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONPATH": python_path(root)})
    try:
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_text().endswith("\n")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        worker = int(log.read_text())
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 20
    while _is_alive(worker):
        if time.monotonic() > deadline:
            os.kill(worker, signal.SIGKILL)
            raise AssertionError(f"process {worker} went on without its parent")
        time.sleep(0.1)


def _is_alive(pid):
    """A zombie, which an init that does not wait for it leaves, is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
