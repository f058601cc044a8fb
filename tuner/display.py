"""What the user sees: live progress on a terminal, plain lines elsewhere, and the table at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mhc.schema import Entry

REFRESH_S = 0.5


def duration(seconds: float) -> str:
    """``75`` -> ``1:15``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes}:{rest:02d}"


def microseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


class Display:
    """Progress of one run. ``console`` decides between a live line and plain lines."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._live: Live | None = None
        self._start = self._last = time.monotonic()

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._live = Live(Text(""), console=self.console, refresh_per_second=4, transient=True)
            self._live.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)
            self._live = None

    def note(self, message: str) -> None:
        self.console.print(escape(message), soft_wrap=True)

    def progress(
        self, label: str, trials: int, wanted: int, best_us: float | None, done: int, tasks: int, left_s: float | None, busy: str
    ) -> None:
        """One live line; nothing where there is no terminal, there :meth:`finished` speaks."""
        now = time.monotonic()
        if self._live is None or now - self._last < REFRESH_S:
            return
        self._last = now
        left = "" if left_s is None else f"  ~{duration(left_s)} left"
        best = f"best {microseconds(best_us)} us" if best_us is not None else "no time yet"
        self._live.update(
            Text(f"[{done}/{tasks}] {label}  trial {trials}/{wanted}  {best}  {busy}  {duration(now - self._start)}{left}", no_wrap=True)
        )

    def finished(self, label: str, entry: Entry, trials: int, new: int, done: int, tasks: int, left_s: float | None) -> None:
        """One line a study."""
        left = "" if left_s is None else f", ~{duration(left_s)} left"
        served = ", PyTorch serves" if entry.impl == "reference" else ""
        self.note(
            f"[{done}/{tasks}] {label}: {microseconds(entry.default_us)} -> {microseconds(entry.time_us)} us, {entry.gbps:.1f} GB/s"
            f" ({entry.copy_share:.0%} of copy), {entry.verdict}{served}; {trials} trials ({new} new){left}"
        )


def result_table(entries: Sequence[Entry], title: str) -> Table:
    """Kernel, shape, default and tuned time, rate, share of copy bandwidth, verdict."""
    table = Table(title=title, title_justify="left", pad_edge=False)
    table.add_column("kernel", no_wrap=True)
    for name in ("n", "C", "dtype", "T", "default us", "tuned us", "GB/s", "of copy"):
        table.add_column(name, justify="left" if name == "dtype" else "right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    rows: dict[tuple[object, ...], list[Entry]] = {}
    for e in entries:
        # one study may stand for every C: its entries differ in nothing else
        rows.setdefault((e.kernel, e.n, e.dtype, e.tokens, e.time_us, e.default_us), []).append(e)
    for same in rows.values():
        e = same[0]
        verdict = "reference" if e.impl == "reference" else e.verdict
        style = "green" if verdict == "win" else None
        table.add_row(
            e.kernel,
            str(e.n),
            str(e.C) if len(same) == 1 else "any",
            {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[e.dtype],
            str(e.tokens),
            microseconds(e.default_us),
            microseconds(e.time_us),
            f"{e.gbps:.1f}",
            f"{e.copy_share:.0%}",
            verdict,
            style=style,
        )
    return table
