"""What the user sees: live progress on a terminal, plain lines elsewhere, and the table at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mhc.schema import Entry

REFRESH_S = 0.5

#: How a configuration may end, in the order of the ladder, in words that follow a number.
RUNGS = {
    "constraint": "ruled out by the kernel's constraints",
    "shared": "with too much shared memory",
    "launch": "that no multiprocessor can launch",
    "spills": "that spill too much",
    "roofline": "with too many bytes to beat the best",
    "compile_error": "not compiled",
    "timeout": "out of time",
    "crash": "crashed",
    "wrong": "with wrong numbers",
    "run_error": "failed to run",
    "slow": "cut short as slow",
    "ok": "timed in full",
}


#: Columns of what goes into a log file or a pipe, which have no width of their own.
PLAIN_WIDTH = 120


def make_console(plain_width: int = PLAIN_WIDTH) -> Console:
    """For stdout."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, plain_width)
    return console


def duration(seconds: float) -> str:
    """``75`` -> ``1:15``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes}:{rest:02d}"


def microseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def percent(share: float) -> str:
    """``0.0963`` -> ``9.6%``, ``-0.0004`` -> ``-0.04%``, ``0.00001`` -> ``0%``."""
    return f"{share:.1%}" if abs(share) >= 0.001 else f"{share:.2%}" if abs(share) >= 5e-5 else "0%"


def gain_text(entry: Entry) -> str:
    """How much less time than the default: ``9.6% (9.1% to 10.2%)``; where a tie or the default ships, the interval of the best other.

    ``-`` where there is nothing to compare: the default does not work, or was alone.
    """
    if entry.default_us is None:
        return "-"
    if entry.impl == "reference":
        return percent(1 - entry.time_us / entry.default_us)
    interval = "" if entry.gain_ci is None else f"{percent(entry.gain_ci[0])} to {percent(entry.gain_ci[1])}"
    if entry.verdict != "win":
        return interval or "-"
    return percent(1 - entry.time_us / entry.default_us) + (f" ({interval})" if interval else "")


def funnel_line(counts: Mapping[str, int]) -> str:
    """``432 configurations: 120 ruled out by the kernel's constraints, 3 with too much shared memory, 12 timed in full, 297 not tried``.

    ``counts``: rung -> configurations that ended there, and ``"space"``, all there are. Rungs of nobody are left out.
    """
    order = [*RUNGS, *(rung for rung in counts if rung not in RUNGS and rung != "space")]
    parts = [f"{counts[rung]} {RUNGS.get(rung, rung)}" for rung in order if counts.get(rung)]
    seen = sum(count for rung, count in counts.items() if rung != "space")
    whole = counts.get("space", seen)
    if whole > seen:
        parts.append(f"{whole - seen} not tried")
    return f"{whole} configurations: {', '.join(parts) or 'none tried'}"


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
        gain = f" by {gain_text(entry)}" if entry.verdict == "win" and entry.gain_ci is not None and not served else ""
        self.note(
            f"[{done}/{tasks}] {label}: {microseconds(entry.default_us)} -> {microseconds(entry.time_us)} us, {entry.gbps:.1f} GB/s"
            f" ({entry.copy_share:.0%} of copy), {entry.verdict}{gain}{served}; {trials} trials ({new} new){left}"
        )


def result_table(entries: Sequence[Entry], title: str) -> Table:
    """Kernel, shape, default and tuned time, rate, share of copy bandwidth, verdict with the gain over the default.

    Where there is little room, words are broken or wrapped, numbers never: 80 columns hold them all.
    """
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("kernel", overflow="fold")
    table.add_column("TxnxC", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name in ("default\nus", "tuned\nus", "GB/s", "of\ncopy"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict, less time\nthan the default")
    rows: dict[tuple[object, ...], list[Entry]] = {}
    for e in entries:
        # one study may stand for every C: its entries differ in nothing else
        rows.setdefault((e.kernel, e.n, e.dtype, e.tokens, e.time_us, e.default_us), []).append(e)
    for same in rows.values():
        e = same[0]
        verdict = "reference" if e.impl == "reference" else e.verdict
        gain = gain_text(e)
        table.add_row(
            e.kernel,
            f"{e.tokens}x{e.n}x{e.C if len(same) == 1 else 'any'}",
            {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[e.dtype],
            microseconds(e.default_us),
            microseconds(e.time_us),
            f"{e.gbps:.1f}",
            f"{e.copy_share:.0%}",
            verdict if gain == "-" else f"{verdict} {gain}",
            style="green" if verdict == "win" else None,
        )
    return table
