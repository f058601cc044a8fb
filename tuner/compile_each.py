"""Compile many programs in processes that can be killed, with progress: a bar on a terminal, a line each in a CI log."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tl_kernels.child_python import cores
from tuner.display import duration
from tuner.waiting import as_they_end
from tuner.workers import COMPILE_ENV, WorkerError, WorkerPool


def progress_bar(console: Console) -> Progress:
    """A bar that disappears when it is done; nothing where there is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def compile_each(
    job: Callable[..., Any],
    args: Mapping[str, tuple[Any, ...]],
    jobs: int | None,
    console: Console,
    what: str = "compiling",
    path: Sequence[str] | None = None,
    timeout: float | None = None,
) -> dict[str, Any]:
    """Call ``job`` with each of ``args`` in ``jobs`` processes (default: every core) that see no GPU. Returns results by the same names, or
    the :class:`WorkerError` where there is none. ``path``: where the processes import from, see :class:`tuner.workers.WorkerPool`;
    ``timeout``: seconds for one.
    """
    from tuner.bench_compile import COMPILE_S

    timeout = timeout or COMPILE_S
    found: dict[str, Any] = {}
    start = time.monotonic()
    with (
        progress_bar(console) as progress,
        WorkerPool(max(1, min(jobs or cores(), len(args))), env=COMPILE_ENV, nice=10, path=path) as pool,
    ):
        bar = progress.add_task(what, total=len(args))
        futures = {pool.submit(job, *given, timeout=timeout): name for name, given in args.items()}
        for count, future in enumerate(as_they_end(futures), 1):
            name = futures[future]
            try:
                found[name] = future.result()
            except WorkerError as e:
                found[name] = e
            progress.advance(bar)
            if not console.is_terminal:  # a CI log: say that it lives
                took = time.monotonic() - start
                console.print(escape(f"[{count}/{len(args)}] {duration(took)} {name}"), soft_wrap=True)
    return found
