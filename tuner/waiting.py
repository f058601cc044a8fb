"""Waiting for futures so that Ctrl-C ends it at once.

A wait without a time limit comes back for a signal only where system calls are not restarted after it. Any library in the process may ask
for that (SA_RESTART): TileLang 0.1.15 does when it lowers a program for CUDA. A wait with a limit comes back anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TypeVar

#: Seconds until a Ctrl-C is seen, at most.
POLL_S = 0.2

T = TypeVar("T")


def answer(future: Future[T]) -> T:
    """As ``future.result()``."""
    while not wait([future], timeout=POLL_S).done:
        pass
    return future.result()


def as_they_end(futures: Iterable[Future[T]]) -> Iterator[Future[T]]:
    """As :func:`concurrent.futures.as_completed`."""
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=POLL_S, return_when=FIRST_COMPLETED)
        yield from done
