"""The tables of a report, as text cells; the template escapes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from mhc.schema import Entry, Profile
from mhc.yamlfile import printable
from tl_kernels import KERNELS
from tuner import bench_report
from tuner.bench_case import PASSES
from tuner.bench_report import TITLES, by_name, remarks, share_text
from tuner.check_report import VERDICTS
from tuner.display import gain_text, microseconds, percent
from tuner.report_history import SERIES, History
from tuner.report_plots import Gain
from tuner.report_read import Bench, Check, DecodeRow, Device, KernelRow, Replay, ShapeResult, Startup, Time, Tune
from tuner.startup_report import FIGURES, cells

FRESH, STALE, UNKNOWN = "fresh", "stale", "not in this checkout"
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
NOTHING = "–"
#: Verdicts of a check that fail it (tuner/check_report.py).
BAD = tuple(verdict for verdict, (_, fails) in VERDICTS.items() if fails)


@dataclass(frozen=True)
class Cell:
    """``mark``: a class of the page, such as ``ours`` or ``stale``."""

    text: str
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """``words``: how many columns, from the left, hold words; the others hold numbers."""

    head: list[str]
    rows: list[list[Cell]]
    words: int = 1
    notes: list[str] = field(default_factory=list)


def _row(*texts: str, mark: str = "") -> list[Cell]:
    return [Cell(text, mark) for text in texts]


def interval(time: Time) -> str:
    return f"{time.us:.1f} ({time.lo:.1f} to {time.hi:.1f})"


def share(value: float | None) -> str:
    return NOTHING if value is None else share_text(value)


def source_state(kernel: str, source_hash: str) -> str:
    """Whether an entry was tuned for the kernel as it is in this checkout."""
    try:
        return FRESH if KERNELS[kernel].source_hash == source_hash else STALE
    except KeyError:
        return UNKNOWN
    except ImportError:
        return "unknown: TileLang is not installed"


def headline(entry: ShapeResult, kind: str) -> Table:
    """The implementations that were timed, and the floor."""
    head = ["implementation"]
    for p in PASSES:
        head += [f"{TITLES[p]}, us (95%)", "of the floor's speed"]
    floor = _row(
        f"floor, at a copy's {entry.copy_gbps:.0f} GB/s",
        *(c for p in PASSES for c in (f"{entry.floor_us[p]:.1f}", "100%")),
        "",
        "",
        mark="floor",
    )
    rows = [floor]
    for row in entry.rows:
        times = [row.times.get(f"{p}_{kind}") for p in PASSES]
        if any(times):
            cells = [c for t in times for c in ((interval(t), share(t.share)) if t else (NOTHING, NOTHING))]
            eager = " / ".join(f"{t.us:.0f}" if (t := row.times.get(f"{p}_eager")) else NOTHING for p in PASSES)
            peak = NOTHING if row.peak_mib is None else f"{row.peak_mib:.0f}"
            rows.append(_row(row.name, *cells, eager, peak, mark="ours" if row.rival == "ours" else ""))
    notes = [f"{row.name}: {text}" for row in entry.rows for text in [row.note, *remarks(row.model_dump(), only_bad=True)] if text]
    return Table([*head, "eager, us", "peak MiB"], rows, 1, notes)


def small_tokens(rows: Sequence[DecodeRow], graph: bool) -> Table:
    """us of a forward, by implementation and T."""
    found = [row.model_dump() for row in rows]
    ours = {name for name, mine in by_name(found).items() if mine[0]["rival"] == "ours"}
    head, lines, wrong = bench_report.small_tokens(found, graph, NOTHING)
    return Table(head, [_row(*line, mark="ours" if line[0] in ours else "") for line in lines], 1, wrong)


def entry_for(profile: Profile | None, kernel: str, shape: ShapeResult) -> Entry | None:
    """The entry tuned at this shape, at the nearest T."""
    entries = [
        e for e in (profile.entries if profile else ()) if e.kernel == kernel and (e.n, e.C, e.dtype) == (shape.n, shape.C, shape.dtype)
    ]
    return min(entries, key=lambda e: max(e.tokens / shape.T, shape.T / e.tokens), default=None)


def kernels(shape: ShapeResult, profile: Profile | None) -> Table:
    """Every program as benchmarked, with what the profile says of it, if it says it of this configuration."""
    head = ["kernel", "program", "us (95%)", "GB/s", "of copy", "verdict", "entry", "MB"]
    head += ["registers", "stack B", "shared KiB", "blocks/SM", "occupancy", "T × n × C"]
    rows = []
    for k in shape.kernels:
        entry = entry_for(profile, k.kernel, shape)
        if entry is not None and k.config is not None and k.config != entry.config:
            said = _row(NOTHING, "another configuration")
        else:
            state = "none" if entry is None else source_state(k.kernel, entry.source_hash)
            said = [Cell(NOTHING if entry is None else entry.verdict), Cell(state, "stale" if state in (STALE, UNKNOWN) else "")]
        known = _row(f"{k.bytes / 1e6:.2f}", *_taken(k), shape.shape)
        rows.append([*_row(k.kernel, k.program, *_measured(k)), *said, *known])
    return Table(head, rows, 2, [f"{k.kernel}, {k.program}: failed: {k.failure}" for k in shape.kernels if k.failure])


def _measured(k: KernelRow) -> list[str]:
    if k.us is None or k.lo is None or k.hi is None:
        return [NOTHING] * 3
    return [interval(Time(us=k.us, lo=k.lo, hi=k.hi)), NOTHING if k.gbps is None else f"{k.gbps:.0f}", share(k.share)]


def _taken(k: KernelRow) -> list[str]:
    numbers = [NOTHING if v is None else str(v) for v in (k.registers, k.stack)]
    numbers.append(NOTHING if k.shared is None else f"{k.shared / 1024:.3g}")
    return [*numbers, NOTHING if k.blocks_per_sm is None else str(k.blocks_per_sm), share(k.occupancy)]


def distinct(profile: Profile) -> list[tuple[Entry, int]]:
    """Entries, and for how many C each stands: a study of a kernel without channels is written once for every C."""
    found: dict[tuple[object, ...], list[Entry]] = {}
    for e in profile.entries:
        found.setdefault((e.kernel, e.n, e.dtype, e.tokens, e.time_us, e.default_us), []).append(e)
    return [(same[0], len(same)) for same in found.values()]


def entries(profile: Profile) -> Table:
    """Everything tuned."""
    head = ["kernel", "dtype", "T × n × C", "default us", "tuned us (95%)", "GB/s", "of copy", "registers", "shared KiB", "verdict"]
    rows = []
    for e, count in distinct(profile):
        state = source_state(e.kernel, e.source_hash)
        low, high = e.time_ci_us
        cells = _row(
            e.kernel,
            SHORT[e.dtype],
            f"{e.tokens} × {e.n} × {e.C if count == 1 else 'any'}",
            microseconds(e.default_us),
            f"{microseconds(e.time_us)} ({microseconds(low)} to {microseconds(high)})",
            f"{e.gbps:.0f}",
            share(e.copy_share),
            NOTHING if e.registers is None else str(e.registers),
            NOTHING if e.shared_bytes is None else f"{e.shared_bytes / 1024:.3g}",
            "PyTorch" if e.impl == "reference" else e.verdict,
            gain_text(e),
        )
        rows.append([*cells, Cell(state, "" if state == FRESH else "stale")])
    return Table([*head, "less time than default", "entry"], rows, 3)


def gain_rows(profile: Profile) -> list[Gain]:
    """Every entry whose default works against it, the largest gain first."""
    found = []
    for e, count in distinct(profile):
        if e.default_us is None:
            continue
        state = source_state(e.kernel, e.source_hash)
        name = f"{e.kernel} {e.tokens}×{e.n}×{e.C if count == 1 else 'any'}" + ("" if e.dtype == "bfloat16" else f" {SHORT[e.dtype]}")
        name += "" if state == FRESH else f" ({state})"
        paired = None if e.gain_ci is None else (1 - e.gain_ci[1], 1 - e.gain_ci[0])
        if e.verdict == "win" or e.impl == "reference":
            low, high = e.default_ci_us or (e.default_us, e.default_us)
            apart = (e.time_ci_us[0] / high, e.time_ci_us[1] / low) if low > 0 else None
            found.append(Gain(name, "win", e.time_us / e.default_us, paired if e.impl == "tilelang" and paired else apart))
        else:
            other = None if e.runner_up_us is None else e.runner_up_us / e.default_us
            found.append(Gain(name, e.verdict, 1.0, None, other, paired))
    return sorted(found, key=lambda g: (g.verdict != "win", g.share, g.other or 1.0, g.name))


def verdicts(profile: Profile) -> str:
    """``56 of 112 entries beat the default clearly, ...``."""
    count = Counter("alone" if e.default_us is None else "win" if e.impl == "reference" else e.verdict for e in profile.entries)
    states = Counter(source_state(e.kernel, e.source_hash) for e in profile.entries)
    text = (
        f"{count['win']} of {len(profile.entries)} entries are clearly faster than the default; in {count['tie']} another configuration "
        f"was faster, but not clear of the noise, and in {count['default']} nothing was: there the default ships."
    )
    text += f" In {count['alone']} the default does not work." if count["alone"] else ""
    old = len(profile.entries) - states[FRESH]
    return text + (f" {old} entries were tuned for other sources than this checkout's and are not used." if old else "")


def searches(tunes: Sequence[Tune]) -> Table:
    """A line a run of the tuner."""
    head = ["command", "kernels", "studies", "trials", "timed in full", "other ends", "seconds", "copy GB/s"]
    rows = []
    for tune in tunes:
        ends = Counter(trial.outcome for study in tune.studies for trial in study.trials)
        other = ", ".join(f"{count} {outcome}" for outcome, count in ends.most_common() if outcome != "ok")
        texts = [str(len({s.kernel for s in tune.studies})), str(len(tune.studies)), str(sum(ends.values())), str(ends["ok"])]
        seconds = NOTHING if tune.seconds is None else f"{tune.seconds:.0f}"
        rows.append(_row(tune.command, *texts, other or NOTHING, seconds, f"{tune.copy_gbps:.0f}"))
    return Table(head, rows, 1)


def commits(found: History) -> Table:
    """A line a committed measurement, the latest first."""
    head = ["commit", "committed", "measured", "what", "copy GB/s", *(f"{TITLES[p]}: {s}" for p in PASSES for s in SERIES)]
    rows = []
    for point in reversed(found.points):
        times = [point.times.get((p, s)) for p in PASSES for s in SERIES]
        texts = [NOTHING if t is None else f"{t:.0f}" for t in times]
        rows.append(
            _row(
                point.commit,
                point.committed[:16].replace("T", " ") or NOTHING,
                point.measured,
                point.subject,
                f"{point.copy_gbps:.0f}",
                *texts,
            )
        )
    return Table(head, rows, 4, list(found.skipped))


def replayed(replay: Replay) -> Table:
    """A line a study, start and sampler."""
    head = ["study", "start", "sampler", "measured", "near the best", "seeds there", "in a quarter", "median share", "90th percentile"]
    rows = []
    for study in replay.studies:
        for row in study.rows:
            shares = ["never" if v is None else percent(v) for v in (row.median_share, row.p90_share)]
            counts = [f"{row.reached}/{row.seeds}", f"{row.within_quarter}/{row.seeds}"]
            rows.append(_row(study.label, row.start, row.sampler, str(study.measured), str(study.near_best), *counts, *shares))
    return Table(head, rows, 3)


def started(startup: Startup) -> Table:
    """A line a way to start; what failed is said below."""
    rows = [
        _row(row.label, row.setup, *cells([sample.model_dump() for sample in row.samples]), str(len(row.samples))) for row in startup.rows
    ]
    notes = [f"{row.label}, {row.setup}: {row.failure}" for row in startup.rows if row.failure]
    return Table(["implementation", "start", *FIGURES, "starts"], rows, 2, notes)


def checked(check: Check) -> Table:
    """A line a program, or timed entry, that is not the same as before."""
    if check.mode != "static":
        return _timed(check)
    rows = [
        _row(p.program, p.kernel, p.verdict, "; ".join(p.findings), mark="floor" if p.verdict in BAD else "")
        for p in check.programs
        if p.verdict != "same"
    ]
    return Table(["program", "kernel", "verdict", "what changed"], rows, 4, list(check.notes))


def _timed(check: Check) -> Table:
    rows = [
        _row(
            p.program,
            p.verdict,
            "; ".join(p.causes or ([] if p.before_us else p.findings)) or NOTHING,
            microseconds(p.before_us),
            microseconds(p.now_us),
            NOTHING if p.ratio is None else f"{p.ratio - 1:+.1%}",
            NOTHING if p.band is None else f"{p.band:.1%}",
            mark="floor" if p.verdict in BAD else "",
        )
        for p in check.programs
        if p.verdict != "same"
    ]
    alarms = check.false_alarms
    notes = [note for note in check.notes if alarms is None or not note.startswith("false alarms:")]
    if alarms is not None:
        how = f"{alarms.regressed} of {alarms.judged} ({alarms.entries} entries, {alarms.runs} runs of identical code)"
        notes.insert(0, f"False alarms: {percent(alarms.rate)}, {how}; {alarms.runs_with_alarm} runs had one.")
    return Table(["entry", "verdict", "cause", "before us", "now us", "change", "noise"], rows, 3, notes)


def versions(bench: Bench) -> str:
    parts = [f"{name} {version}" for name, version in bench.versions.items() if version]
    for rival, found in bench.rival_versions.items():
        of = ", ".join(f"{name} {version}" for name, version in found.items() if version)
        parts.append(f"{rival} in an environment of its own ({of})")
    return ", ".join(parts) or "not recorded"


def facts(device: Device) -> list[tuple[str, str]]:
    """Provenance: (label, text)."""
    found: list[tuple[str, str]] = []
    bench = device.bench or device.decode
    if bench is not None:
        hardware = bench.data.hardware
        more = [hardware.arch, f"{hardware.sm_count} multiprocessors" if hardware.sm_count else ""]
        more += [f"{hardware.power_limit_w:.0f} W" if hardware.power_limit_w else ""]
        found.append(("device", ", ".join(filter(None, [hardware.name, *more]))))
        driver = f"driver {hardware.driver}" if hardware.driver else "driver not recorded"
        found.append(("driver", driver + (f", CUDA {hardware.cuda}" if hardware.cuda else "")))
        found.append(("versions", versions(bench.data)))
    if device.profile is not None:
        where = device.profile.provenance
        if bench is None:
            found.append(("device", f"{where.gpu}, {where.arch}"))
        found.append(
            (
                "profile",
                f"{len(device.profile.entries)} entries; last tuned {where.date}, commit {where.commit or 'not recorded'}, "
                f"torch {where.torch}, TileLang {where.tilelang}, copy {where.copy_gbps:.0f} GB/s; entries of earlier runs are kept in it",
            )
        )
    return found


def in_markdown(text: str) -> str:
    """A text of unknown origin in a cell: one line, no column more, no HTML."""
    return printable(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def markdown(table: Table) -> str:
    """The table for a README; ours in bold."""
    marks = [" --- "] * table.words + [" ---: "] * (len(table.head) - table.words)
    lines = [f"| {' | '.join(table.head)} |", f"|{'|'.join(marks)}|"]
    for row in table.rows:
        texts = [in_markdown(cell.text) for cell in row]
        lines.append("| " + " | ".join(f"**{t}**" if c.mark == "ours" and t else t for t, c in zip(texts, row, strict=True)) + " |")
    return "\n".join(lines) + "\n"
