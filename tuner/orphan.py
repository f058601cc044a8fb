"""Ending a worker process whose parent died without a word (SIGKILL), even while a job keeps it busy."""

from __future__ import annotations

import os
import threading
import time

POLL_S = 1.0


def end_with_parent() -> None:
    """From now on this process ends within about a second of its parent, unless a job holds the interpreter's lock.

    Not by the kernel's PR_SET_PDEATHSIG: that goes by the thread that started this process, which may well end before its process does.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
