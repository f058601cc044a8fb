"""``mhc-tune explain``: why a kernel runs with this configuration at this shape, how sure that is, and how stale.

What serves a shape is :func:`mhc.profile.choose_from`'s word, the very choice that the run time makes; no device is needed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mhc.plan import crowds_out, reserved_sms
from mhc.profile import Choice, ProfileError, choose_from, nearest_entry, packaged_names, profile_name, read_profile, unmeasured
from mhc.schema import Entry, Profile, Provenance
from tl_kernels import KERNELS, NAMES
from tl_kernels.spec import STREAM_DTYPES, Kernel, Problem
from tuner.display import make_console, microseconds
from tuner.errors import TuneError, unknown
from tuner.evidence import age, evidence
from tuner.hardware import resolve
from tuner.selection import check_one_profile
from tuner.shape import Shape, parse_shape

#: Columns of what goes into a pipe or a file, which have no width of their own.
PLAIN_WIDTH = 140
LABEL = 12


@dataclass(frozen=True)
class ExplainRequest:
    """The command line as typed; None means the default."""

    kernel: str
    shape: str
    dtype: str = "bfloat16"
    profile: str | None = None
    gpu: str | None = None
    unseen: str | None = None


def explain(request: ExplainRequest, console: Console | None = None) -> int:
    """Print it. Returns 0, or 1 where the entry that should serve is stale; raises :class:`TuneError` for what the user can mend."""
    if request.kernel not in NAMES:
        raise unknown("kernel", request.kernel, NAMES)
    shape = parse_shape(request.shape)
    if request.dtype not in STREAM_DTYPES:
        raise TuneError(f"--dtype: got {request.dtype!r}, wanted one of {', '.join(STREAM_DTYPES)}")
    others = None if request.unseen is None else [parse_shape(text, "--unseen") for text in request.unseen.split(",")]
    name, profile = _profile(request)
    # imports TileLang: seconds, which a typing error need not wait for
    kernel = KERNELS[request.kernel]
    arch = profile.provenance.arch if profile else "cpu"
    p = kernel.problem(shape.n, shape.C, request.dtype)
    why_not = kernel.unserved_on(p, arch) if profile else kernel.unserved(p)
    if why_not is not None:
        raise TuneError(f"{request.kernel} at {shape}: there is nothing to explain, no configuration serves it: {why_not}")
    try:
        reserved_sms()
    except ValueError as e:
        raise TuneError(str(e)) from None
    if console is None:
        console = make_console(PLAIN_WIDTH)
    page = _Page(console, kernel, p, shape.T, name, profile)
    page.print()
    page.print_unseen(neighbours(kernel, shape) if others is None else others)
    return 1 if page.stale else 0


def _profile(request: ExplainRequest) -> tuple[str, Profile | None]:
    """The profile asked for, else the one this machine would use, and its name; None where defaults serve."""
    check_one_profile(request.gpu or "auto", request.profile)
    option, wanted = "--profile", request.profile
    if request.gpu is not None:
        option, wanted = "--gpu", request.gpu.strip().lower()
        if wanted not in packaged_names():
            raise unknown("--gpu", wanted, packaged_names())
    elif wanted is None and os.environ.get("MHC_PROFILE"):
        option, wanted = "MHC_PROFILE", os.environ["MHC_PROFILE"]
        if wanted.lower() == "none":
            return "MHC_PROFILE=none", None
    elif wanted is None:
        option, wanted = "this machine", resolve("auto").profile
        if wanted not in packaged_names():
            return f"this machine ({wanted}) has none", None
    try:
        return wanted, read_profile(wanted)
    except ProfileError as e:
        raise TuneError(f"{option}: {e}") from None


def neighbours(kernel: Kernel, shape: Shape) -> list[Shape]:
    """A few shapes around one: other token counts, other channels, as far as the program has them."""
    T, n, C = shape.T, shape.n, shape.C
    found = [Shape(t, n, C) for t in (max(1, T // 8), T * 8)] if kernel.has_tokens else []
    if kernel.has_channels:
        found += [Shape(T, n, c) for c in (max(1, C // 2), C + C // 2)]
    return [other for other in dict.fromkeys(found) if other != shape]


class _Page:
    """What is to be said of one kernel at one shape. ``profile`` None: defaults serve everything."""

    def __init__(self, console: Console, kernel: Kernel, p: Problem, T: int, name: str, profile: Profile | None) -> None:
        self.console, self.kernel, self.p, self.T, self.name, self.profile = console, kernel, p, T, name, profile
        #: What serves, and why nothing nearer does.
        self.choice, self.refused = self._choose(p, T)
        nearest = nearest_entry(profile, kernel.name, p, T) if profile else None
        self.stale = nearest is not None and nearest.source_hash != kernel.source_hash
        #: The entry to speak of: the one that serves, or would.
        self.entry = nearest if self.stale else self.choice.tuned

    def _choose(self, p: Problem, T: int) -> tuple[Choice, str]:
        if self.profile is None:
            return unmeasured(self.kernel, p, resolve("auto").arch), ""
        return choose_from(self.profile, self.kernel.name, p, T)

    def _line(self, label: str, text: str) -> None:
        self.console.print(f"[bold]{label:<{LABEL}}[/bold]{escape(text)}", soft_wrap=True)

    def _table(self, *columns: str) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
        for column in columns:
            table.add_column(column, no_wrap=True)
        return table

    def print(self) -> None:
        kernel, entry, where = self.kernel, self.entry, self.profile.provenance if self.profile else None
        self.console.print(f"[bold]{kernel.name}[/bold] at {_of(kernel, self.p, self.T)}", soft_wrap=True)
        without = "PyTorch serves" if self.choice.impl == "reference" else "every kernel runs its default"
        tuned_on = f", tuned on {where.gpu} ({where.arch})" if where else f": {without}"
        self._line("profile", f"{self.name}{tuned_on}")
        self._line("runs with", self._found())
        if entry is not None and where is not None:
            if where.sm_count and (why := crowds_out(kernel, self.p, self.choice.config, where.sm_count)):
                self._line("boundary", f"none takes it, {why}")
            if self.stale:
                self._line("STALE", self._stale(entry, where))
        self.console.print()
        self.console.print(self._configs())
        if entry is None or where is None:
            return
        self.console.print()
        if _entry_shape(kernel, entry) != _of(kernel, self.p, self.T):
            self._line("measured", f"at the entry's shape, {_entry_shape(kernel, entry)}")
        self.console.print(self._times(entry))
        self.console.print()
        for label, text in evidence(entry):
            self._line(label, text)
        for label, text in age(entry, where, kernel):
            self._line(label, text)

    def _found(self) -> str:
        entry = self.choice.tuned
        why = f"; not by {self.refused}" if self.refused else ""
        if entry is None:
            what = "PyTorch" if self.choice.impl == "reference" else "the default configuration"
            if self.kernel.shortcut:
                what = f"{what} when called by itself; no boundary takes it"
            return f"{what}: the profile has no entry that is good for this{why}" if self.profile else what
        served = " (PyTorch serves, it was faster)" if self.choice.impl == "reference" else ""
        at = f"the entry tuned at {_entry_shape(self.kernel, entry)}{served}"
        return f"exact: {at}{why}" if self.choice.origin == "exact" else f"nearest: {at}; this shape was not tuned{why}"

    def _stale(self, entry: Entry, where: Provenance) -> str:
        run = f"mhc-tune --gpu {'cpu' if where.arch == 'cpu' else profile_name(where.gpu)} --kernels {entry.kernel}"
        return f"the entry at {_entry_shape(self.kernel, entry)} was tuned for another version of the kernel and is not used; run: {run}"

    def _configs(self) -> Table:
        default = dict(self.kernel.default(self.p))
        columns = {"runs with": dict(self.choice.config), "default": default}
        if self.entry is not None and (then := self._default_then(self.entry)) is not None:
            columns["default then"] = then
        if self.stale and self.entry is not None:
            columns["stale entry"] = dict(self.entry.config)
        table = self._table("knob", *columns)
        for knob in dict.fromkeys(k for config in columns.values() for k in config):
            cells = [str(config.get(knob, "-")) for config in columns.values()]
            table.add_row(knob, *map(escape, cells), style=None if len(set(cells)) == 1 else "bold")
        return table

    def _default_then(self, entry: Entry) -> dict[str, Any] | None:
        """The default an entry was compared with, where the kernel's at that shape is another one today."""
        today = dict(self.kernel.default(self.kernel.problem(entry.n, entry.C, entry.dtype)))
        return None if entry.default_config in (None, today) else entry.default_config

    def _times(self, entry: Entry) -> Table:
        table = self._table("", "us", "95% interval", "GB/s", "of copy")
        default = "default" if self._default_then(entry) is None else "default then"
        serves = "PyTorch" if entry.impl == "reference" else default if entry.verdict != "win" else "tuned"
        rows: list[tuple[str, float, tuple[float, float] | None]] = [(serves, entry.time_us, entry.time_ci_us)]
        if serves != default and entry.default_us is not None:
            rows.append((default, entry.default_us, entry.default_ci_us))
        if entry.runner_up_us is not None:
            rows.append(("runner-up", entry.runner_up_us, entry.runner_up_ci_us))
        for label, us, interval in rows:
            slower = entry.time_us / us
            between = "not kept" if interval is None else f"{microseconds(interval[0])} to {microseconds(interval[1])}"
            table.add_row(label, microseconds(us), between, f"{entry.gbps * slower:.1f}", f"{entry.copy_share * slower:.1%}")
        return table

    def print_unseen(self, shapes: list[Shape]) -> None:
        """What other shapes get."""
        if not shapes:
            return
        self.console.print()
        self.console.print("[bold]other shapes get[/bold]")
        table = self._table("TxnxC", "", "tuned at", "configuration")
        notes: list[str] = []
        for shape in shapes:
            p = self.kernel.problem(shape.n, shape.C, self.p.dtype)
            why_not = self.kernel.unserved(p)
            if why_not is not None:
                table.add_row(str(shape), "nothing", "", escape(why_not))
                continue
            choice, refused = self._choose(p, shape.T)
            entry = choice.tuned
            source = "-" if entry is None else _entry_shape(self.kernel, entry)
            mark = "" if not refused else f" [{len(notes) + 1}]"
            notes += [f"[{len(notes) + 1}] not by {refused}"] if refused else []
            what = "PyTorch" if choice.impl == "reference" else _config(choice.config)
            table.add_row(str(shape), choice.origin, source, escape(what + mark))
        self.console.print(table)
        for note in notes:
            self.console.print(escape(note), soft_wrap=True)


def _of(kernel: Kernel, p: Problem, T: int) -> str:
    """A shape in words, without what the program does not have."""
    parts = [f"T={T}"] if kernel.has_tokens else []
    parts += [f"n={p.n}"] + ([f"C={p.C}"] if kernel.has_channels else []) + ([p.dtype] if kernel.has_streams else [])
    return ", ".join(parts)


def _entry_shape(kernel: Kernel, entry: Entry) -> str:
    return _of(kernel, kernel.problem(entry.n, entry.C, entry.dtype), entry.tokens)


def _config(config: dict[str, Any]) -> str:
    return ", ".join(f"{knob}={value}" for knob, value in config.items())
