"""The inside of a worker process: receive (function, arguments), send ("ok", result) or ("error" | "fatal" | "trouble", one line)."""

from __future__ import annotations

import os
import sys
from multiprocessing.connection import Connection

from tuner.errors import one_line
from tuner.orphan import end_with_parent
from tuner.trouble import trouble


class FatalError(Exception):
    """Raised by a job whose process must not be used again, e.g. after an illegal access on the GPU."""


def main(read_fd: int, write_fd: int) -> None:
    end_with_parent()
    jobs, results = Connection(read_fd, writable=False), Connection(write_fd, readable=False)
    results.send(("ready", None))
    while True:
        try:
            fn, args = jobs.recv()
        except EOFError:
            return
        except Exception as e:
            results.send(_failure(e))
            continue
        try:
            results.send(("ok", fn(*args)))
        except Exception as e:
            results.send(_failure(e))


def _failure(error: Exception) -> tuple[str, str]:
    # by name: run as __main__, this file's own class is not the one that jobs import
    if type(error).__name__ == "FatalError":
        return "fatal", one_line(error)
    said = trouble(error)
    return ("error", one_line(error)) if said is None else ("trouble", said)


if __name__ == "__main__":
    os.nice(int(sys.argv[3]))
    main(int(sys.argv[1]), int(sys.argv[2]))
