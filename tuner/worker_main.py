"""The inside of a worker process: receive (function, arguments), send ("ok", result) or ("error" | "fatal", one line)."""

from __future__ import annotations

import os
import sys
from multiprocessing.connection import Connection

from tuner.errors import one_line
from tuner.orphan import end_with_parent


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
            results.send(("error", one_line(e)))
            continue
        try:
            results.send(("ok", fn(*args)))
        except Exception as e:
            # by name: run as __main__, this file's own class is not the one that jobs import
            results.send(("fatal" if type(e).__name__ == "FatalError" else "error", one_line(e)))


if __name__ == "__main__":
    os.nice(int(sys.argv[3]))
    main(int(sys.argv[1]), int(sys.argv[2]))
