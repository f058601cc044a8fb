"""Progress of a benchmark on stderr: a bar on a terminal, one line a stage elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tuner.display import duration

#: Off a terminal, at most one line in so many seconds says what is waited for.
BUSY_S = 10.0
#: So many of what is waited for are named.
BUSY_NAMES = 3


class BenchDisplay:
    """``stage`` opens a part of the run with a known number of steps, ``tick`` is one of them."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._start = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"), TimeElapsedColumn())
        self._progress = Progress(*columns, console=self.console, transient=True) if self.console.is_terminal else None
        self._title = ""
        self._done, self._steps, self._said = 0, 0, 0.0
        self._task = self._progress.add_task("", total=1) if self._progress else None

    def __enter__(self) -> BenchDisplay:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._progress:
            self._progress.stop()

    def stage(self, title: str, steps: int) -> None:
        self._title = title
        self._done, self._steps, self._said = 0, steps, time.monotonic()
        if self._progress is not None and self._task is not None:
            self._progress.reset(self._task, total=max(1, steps), description=escape(title))
        else:
            self.console.print(escape(f"[{duration(time.monotonic() - self._start)}] {title}"), soft_wrap=True)

    def busy(self, names: Sequence[str]) -> None:
        """Say what is being waited for; the one that has taken longest first."""
        if not names:
            return
        rest = f" and {len(names) - BUSY_NAMES} more" if len(names) > BUSY_NAMES else ""
        text = f"{self._title}: {'; '.join(names[:BUSY_NAMES])}{rest}"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=escape(text))
        elif time.monotonic() - self._said >= BUSY_S:
            self._said = time.monotonic()
            at = f"[{duration(self._said - self._start)}] {self._done}/{self._steps} "
            self.console.print(escape(at + text), soft_wrap=True)

    def tick(self, what: str = "") -> None:
        self._done += 1
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=1, description=escape(f"{self._title}: {what}" if what else self._title))

    def note(self, text: str) -> None:
        (self._progress.console if self._progress else self.console).print(escape(text), soft_wrap=True)
