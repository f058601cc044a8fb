"""Progress of a benchmark on stderr: a bar on a terminal, one line a stage elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tuner.display import duration


class BenchDisplay:
    """``stage`` opens a part of the run with a known number of steps, ``tick`` is one of them."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._start = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"), TimeElapsedColumn())
        self._progress = Progress(*columns, console=self.console, transient=True) if self.console.is_terminal else None
        self._title = ""
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
        if self._progress is not None and self._task is not None:
            self._progress.reset(self._task, total=max(1, steps), description=escape(title))
        else:
            self.console.print(escape(f"[{duration(time.monotonic() - self._start)}] {title}"), soft_wrap=True)

    def tick(self, what: str = "") -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=1, description=escape(f"{self._title}: {what}" if what else self._title))

    def note(self, text: str) -> None:
        (self._progress.console if self._progress else self.console).print(escape(text), soft_wrap=True)
