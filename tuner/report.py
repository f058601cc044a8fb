"""``mhc-tune report``: what was measured, as one HTML page that needs nothing else, neither network nor script.

Read are results/<gpu>/ and the profiles (tuner/report_read.py) and, in a checkout, earlier commits' results (tuner/report_history.py).
Nothing is measured, and what was not measured is said, not filled in.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from mhc.files import replace_file
from mhc.profile import packaged_dir
from mhc.yamlfile import printable
from tl_kernels import KERNELS
from tuner import report_plots as plots
from tuner import report_tables as tables
from tuner.bench_case import PASSES
from tuner.bench_report import TITLES, by_name, readme_table
from tuner.errors import TuneError, writing
from tuner.report_flops import flops
from tuner.report_history import OURS, RIVAL, changed_files, history, last_commit, times_of
from tuner.report_read import Bench, Device, File, ShapeResult, read_devices
from tuner.report_svg import draw
from tuner.report_tables import Table
from tuner.startup_report import unfinished
from tuner.writer import check_writable, git_commit

if TYPE_CHECKING:
    from mhc.schema import Profile

TEMPLATE = "report.html.j2"
#: Characters of one text on the page; a command line is far shorter.
MOST_TEXT = 2000


@dataclass(frozen=True)
class ReportRequest:
    """The command line as typed. ``profiles``: None for the packaged ones."""

    results: Path
    profiles: Path | None
    out: Path
    readme: bool
    command: str


@dataclass(frozen=True)
class Chart:
    """A chart in two widths, SVG that may stand on the page as it is, and the line over it."""

    caption: str
    svg: dict[str, str]


@dataclass(frozen=True)
class Section:
    """``missing``: what could not be shown, and why. ``folded``: a table to be opened. ``brief``: what a link to the section says, if
    not its title.
    """

    anchor: str
    title: str
    intro: str = ""
    charts: tuple[Chart, ...] = ()
    tables: tuple[tuple[str, Table], ...] = ()
    folded: tuple[tuple[str, Table], ...] = ()
    missing: tuple[str, ...] = ()
    brief: str = ""


@dataclass(frozen=True)
class Source:
    """A file of the results: where it lies relative to the page, and what it says of its origin."""

    href: str
    name: str
    what: str
    date: str = ""
    commit: str = ""
    command: str = ""


def run_report(request: ReportRequest) -> int:
    """The command. Returns the exit code; raises :class:`TuneError` for what the user can mend."""
    for package in () if request.readme else ("jinja2", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise TuneError(f"report: wanted {package} for the page, not installed here; pip install {package}")
    profiles = packaged_dir() if request.profiles is None else request.profiles
    devices = read_devices(request.results, profiles)
    if request.readme:
        print(readme(devices), end="")
        return 0
    check_writable(request.out, "--output")
    page = render(devices, request)
    with writing(f"--output {request.out}"):
        replace_file(request.out, page)
    print(f"{request.out}: {len(page.encode()) / 1e3:.0f} kB, {', '.join(printable(d.name) for d in devices)}")
    return 0


def readme(devices: list[Device]) -> str:
    """Small tables for a README, Markdown: boundaries against rivals, and small token counts. Raises :class:`TuneError` where there are
    none.
    """
    parts = []
    for device in devices:
        if device.bench is not None:
            bench = device.bench.data
            rows = [row.model_copy(update={"label": tables.in_markdown(row.label).replace("\\|", "|")}) for row in bench.shapes[0].rows]
            first = bench.shapes[0].model_copy(update={"rows": rows})
            parts.append(readme_table(bench.model_copy(update={"shapes": [first]}).model_dump()))
        for entry, small in _decoded(device):
            table = tables.small_tokens(entry.decode, small.graph)
            how = "graph replay / eager" if small.graph else "wall clock"
            parts.append(f"Forward, us a boundary ({how}), n x C = {entry.n} x {entry.C}:\n\n{tables.markdown(table)}")
    if not parts:
        raise TuneError("--readme: no bench.json in the results, wanted one written by mhc-tune bench")
    return "\n".join(parts)


def render(devices: list[Device], request: ReportRequest) -> str:
    """The page."""
    import jinja2
    from markupsafe import Markup

    def shown(value: Any) -> Any:
        if isinstance(value, Markup) or not isinstance(value, str):
            return value
        text = printable(value)
        return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}…"

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup  # of our own making: tuner/report_svg.py
    # a word that can be an id, whatever a folder is called
    parts = [(f"d{i}", device, sections(f"d{i}", device)) for i, device in enumerate(devices)]
    # the newest of a GPU, if there is one
    said = [(d.bench.data.graph, d.bench.data.date, text) for d in devices if d.bench is not None and (text := summary(d))]
    lead = max(said)[-1] if said else None
    return environment.get_template(TEMPLATE).render(
        lead=lead,
        devices=[
            {"id": name, "name": d.name, "facts": tables.facts(d), "sections": found, "sources": sources(d, request.out)}
            for name, d, found in parts
        ],
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        commit=git_commit() or "not in a checkout",
        command=request.command,
    )


def summary(device: Device) -> str | None:
    """The first number of the page, and against what."""
    if device.bench is None:
        return None
    bench, entry = device.bench.data, device.bench.data.shapes[0]
    times = times_of(entry, bench.kind)
    parts = []
    for p in PASSES:
        ours, rival = times.get((p, OURS)), times.get((p, RIVAL))
        if ours is None:
            return None
        against = "no rival was timed beside it" if rival is None else f"the fastest rival of the same run {rival:.0f} us"
        parts.append(f"{TITLES[p]} {ours:.0f} us ({against}, floor {entry.floor_us[p]:.0f} us)")
    return f"One boundary at T × n × C = {entry.shape}, {bench.dtype}, on one {bench.hardware.name}: {'; '.join(parts)}."


#: A file of boundaries, and one shape of it.
Run = tuple[File[Bench], ShapeResult]
INTERRUPTED = "interrupted: not everything was measured"


# -- the sections of a device -----------------------------------------------------------------------------------------------------


def sections(name: str, device: Device) -> list[Section]:
    """All that is known of a device, in the order of the page; ``name``: a word to begin anchors with."""
    empty = tuple(f"{_name(path, device)} holds no shape: its run ended before anything was measured" for path in device.empty)
    found = [_boundaries(f"{name}-{i}-boundary", runs, device.bench) for i, runs in enumerate(_by_shape(device))]
    if not found:
        found = [Section(f"{name}-boundary", "Boundaries against rivals", missing=("no bench.json; measure with: mhc-tune bench",))]
    first, *others = found
    return [
        replace(first, missing=(*first.missing, *empty)),
        *others,
        _roofline(f"{name}-roofline", device),
        _tuned(f"{name}-tuned", device),
        _tokens(f"{name}-tokens", device),
        _commits(f"{name}-history", device),
        _kernels(f"{name}-kernels", device),
        _checks(f"{name}-check", device),
        _startup(f"{name}-startup", device),
        _searches(f"{name}-search", device),
    ]


def _shapes(file: File[Bench] | None) -> list[tuple[int, ShapeResult]]:
    return [] if file is None else list(enumerate(file.data.shapes))


def _by_shape(device: Device) -> list[list[Run]]:
    """The runs at each shape and dtype, that of bench.json first, then the newest; shapes of bench.json first."""
    others = sorted(device.more, key=lambda file: file.data.date, reverse=True)
    files = [file for file in (device.bench, *others) if file is not None]
    found: dict[tuple[str, str], list[Run]] = {}
    for file in files:
        for entry in file.data.shapes:
            found.setdefault((entry.shape, entry.dtype), []).append((file, entry))
    return list(found.values())


def _boundaries(name: str, runs: list[Run], main: File[Bench] | None) -> Section:
    """The first of the ``runs`` at a shape, the others' tables folded."""
    file, entry = runs[0]
    bench = file.data
    how = "CUDA-graph replay" if bench.graph else "wall clock"
    intro = (
        f"All rows are of one run ({bench.date}), same inputs, in interleaved rounds, each answer checked against float64 first; {how}, "
        "microseconds a boundary. A stack is several boundaries in a row; in a chain the end of one and the beginning of the next are one "
        "operator. The floor is the time of the bytes that must move at the copy bandwidth of the same run."
    )
    missing = [] if bench.complete else [f"this run was {INTERRUPTED}"]
    absent = ", ".join(map(str, bench.missing))
    missing += [f"not installed, so not measured: {absent}"] if absent else []
    untimed = [row.name for row in entry.rows if f"forward_{bench.kind}" not in row.times]
    missing += [f"no time: {', '.join(untimed)}"] if untimed else []
    charts: tuple[Chart, ...] = ()
    if any(f"{p}_{bench.kind}" in row.times for row in entry.rows for p in PASSES):
        texts = [f"{row.name} {', '.join(_pass_times(row.times, bench.kind))}" for row in entry.rows if row.times]
        floor = ", ".join(f"{TITLES[p]} {entry.floor_us[p]:.0f}" for p in PASSES)
        alt = f"Bars of microseconds a boundary. Floor: {floor}. {'; '.join(texts)}."
        svg = draw(name, "Boundaries against rivals", alt, lambda width: plots.boundaries(entry, bench.kind, width))
        charts = (Chart("Shorter is better. Blue: this project; grey: rivals; dashed: the floor.", svg),)
    table = tables.headline(entry, bench.kind)
    what = f"{entry.shape}, {entry.dtype}"
    title = f"Boundaries against rivals, {what}"
    brief = ""
    if file is not main:
        title, brief = f"{title}, run of {bench.date}", what
    older = tuple(
        (f"run of {was.data.date}" + ("" if was.data.complete else f", {INTERRUPTED}"), tables.headline(its, was.data.kind))
        for was, its in runs[1:]
    )
    return Section(name, title, intro, charts, (("", table),), older, tuple(missing), brief)


def _pass_times(times: dict[str, Any], kind: str) -> list[str]:
    return [f"{TITLES[p]} {times[key].us:.0f}" for p in PASSES if (key := f"{p}_{kind}") in times]


def roof_points(shape: ShapeResult | None, profile: Profile | None) -> tuple[list[plots.RoofPoint], list[str]]:
    """Every kernel: as benchmarked at ``shape``, else from its entry with the most bytes; and the names of those with no count or time."""
    points: list[plots.RoofPoint] = []
    absent: list[str] = []
    seen: set[str] = set()

    def add(kernel: str, n: int, C: int, dtype: str, T: int, us: float, mark: str, named: bool) -> None:
        try:
            p = KERNELS[kernel].problem(n, C, dtype)
            work, moved = flops(kernel, p, T), KERNELS[kernel].bytes_moved(p, T)
        except (KeyError, ImportError):
            absent.append(f"{kernel} (not a kernel of this checkout)")
            return
        seen.add(kernel)
        if work > 0:
            points.append(plots.RoofPoint(kernel + mark, work / moved, work / us / 1e3, named))

    for k in shape.kernels if shape is not None else ():
        assert shape is not None
        if k.us is None:
            absent.append(f"{k.kernel}, {k.program} (no time)")
        else:
            add(k.kernel, shape.n, shape.C, shape.dtype, shape.T, k.us, "", k.kernel not in seen)
    best: dict[str, Any] = {}
    for e in profile.entries if profile is not None else ():
        if e.kernel not in seen and (e.kernel not in best or e.gbps * e.time_us > best[e.kernel].gbps * best[e.kernel].time_us):
            best[e.kernel] = e
    for e in best.values():
        mark = "" if shape is None else "*"
        add(e.kernel, e.n, e.C, e.dtype, e.tokens, e.time_us, mark, True)
    return points, list(dict.fromkeys(absent))


def _roofline(name: str, device: Device) -> Section:
    title = "Roofline"
    shape = next((s for _, s in _shapes(device.bench) if s.kernels), None)
    points, absent = roof_points(shape, device.profile)
    copy = shape.copy_gbps if shape is not None else device.profile.provenance.copy_gbps if device.profile is not None else None
    if not points or copy is None:
        return Section(name, title, missing=("no kernel was measured",))
    intro = (
        "A kernel on the line moves its bytes as fast as a copy does; no roof of compute is drawn, for none was measured. Operations are "
        "the useful ones, counted by hand from the definition (tuner/report_flops.py); bytes are every input read once and every result "
        "written once. "
    )
    if shape is not None:
        intro += f"Benchmarked at {shape.shape}; filled: what shipped then, hollow: the default, where that is another program."
        intro += " *: not in the benchmark, from its largest tuned entry." if any(p.name.endswith("*") for p in points) else ""
    else:
        intro += "From the profile, each kernel at its entry with the most bytes."
    shares = [f"{p.name} {p.intensity:.2g} flop/byte, {p.gflops / p.intensity / copy:.0%} of copy" for p in points if p.named]
    alt = f"Roofline: useful Gflop/s over flop/byte, copy bandwidth {copy:.0f} GB/s. {'; '.join(shares)}."
    svg = draw(name, title, alt, lambda width: plots.roofline(points, copy, width))
    missing = (f"not drawn: {', '.join(absent)}",) if absent else ()
    chart = Chart("The vertical distance to the line is what is left.", svg)
    return Section(name, title, intro, (chart,), missing=missing)


def _tuned(name: str, device: Device) -> Section:
    title = "Tuned against default"
    if device.profile is None:
        return Section(name, title, missing=("no profile; tune with: mhc-tune",))
    rows = tables.gain_rows(device.profile)
    if not rows:
        return Section(name, title, missing=("the profile has no entries",))
    intro = tables.verdicts(device.profile)
    kept = sum(e.gain_ci is not None for e in device.profile.entries)
    if kept < len(device.profile.entries):
        intro += (
            f" {len(device.profile.entries) - kept} entries are of an older tuner, which kept no interval of the ratio: theirs is that of "
            "the tuned time alone, against the median of the default."
        )
    wins = [r for r in rows if r.verdict == "win"]
    alt = f"{len(wins)} wins of {len(rows)}. " + "; ".join(f"{r.name}: {r.share:.0%} of the default's time" for r in wins) + "."
    svg = draw(name, title, alt, lambda width: plots.gains(rows, width))
    caption = "100%: the default configuration, 95% intervals. Entries that differ only in a C that the kernel does not have are one."
    return Section(name, title, intro, (Chart(caption, svg),))


def _decoded(device: Device) -> list[tuple[ShapeResult, Bench]]:
    """Every run of small token counts, the newest first."""
    files = [f for f in (device.decode, device.bench, *device.more) if f is not None]
    files.sort(key=lambda file: file.data.date, reverse=True)
    return [(entry, f.data) for f in files for entry in f.data.shapes if entry.decode]


def _tokens(name: str, device: Device) -> Section:
    title = "Small token counts"
    found = _decoded(device)
    if not found:
        return Section(name, title, missing=("not measured; measure with: mhc-tune bench --tokens 1,16,64",))
    charts, shown = [], []
    for i, (entry, bench) in enumerate(found):
        rows = by_name(row.model_dump() for row in entry.decode)
        depth = max(row.layers for row in entry.decode)
        how = "graph replay / eager calls" if bench.graph else "wall clock"
        about = f"n × C = {entry.n} × {entry.C}, {entry.dtype}, stack of {depth}, run of {bench.date}"
        if any(f"forward_{bench.kind}" in row.times for row in entry.decode):
            lines = [
                f"{label}: "
                + ", ".join(f"T={r['T']} {r['times'][key]['us']:.1f}" for r in mine if (key := f"forward_{bench.kind}") in r["times"])
                for label, mine in rows.items()
            ]
            alt = f"Microseconds of a forward over tokens. {'; '.join(lines)}."
            svg = draw(f"{name}-{i}", title, alt, lambda width, rows=rows, kind=bench.kind: plots.tokens(rows, kind, width))  # type: ignore[misc]
            charts.append(Chart(f"{about}; {'CUDA-graph replay' if bench.graph else 'wall clock'}.", svg))
        host = "Host us: Python alone, forward without autograd / with / forward + backward."
        shown.append((f"{about}: us a boundary, {how}. {host}", tables.small_tokens(entry.decode, bench.graph)))
    return Section(name, title, charts=tuple(charts), tables=tuple(shown))


def _commits(name: str, device: Device) -> Section:
    title = "History over commits"
    if device.bench is None:
        return Section(name, title, missing=("no bench.json",))
    entry = device.bench.data.shapes[0]
    found = history(device.bench.path, entry, device.bench.data)
    if found.why_not:
        return Section(name, title, missing=(found.why_not, *found.skipped))
    intro = (
        f"Every committed measurement at {entry.shape}, each of a run of its own: compare the lines within a commit first. The best rival "
        "is the fastest that was installed for that run and agreed with float64."
    )
    lines = [
        f"{point.commit} of {(point.committed or point.measured)[:10]}: "
        + ", ".join(f"{TITLES[p]} {series} {us:.0f}" for (p, series), us in point.times.items())
        for point in found.points
    ]
    alt = f"Microseconds a boundary by commit. {'; '.join(lines)}."
    svg = draw(name, title, alt, lambda width: plots.over_commits(found.points, width))
    charts = (Chart("Lower is better. A gap: not measured in that run.", svg),)
    return Section(name, title, intro, charts, (("", tables.commits(found)),))


def _kernels(name: str, device: Device) -> Section:
    title = "Kernels"
    shown = [
        (f"Benchmarked at {entry.shape}, run of {device.bench.data.date}", tables.kernels(entry, device.profile))
        for _, entry in _shapes(device.bench)
        if entry.kernels and device.bench is not None
    ]
    folded = []
    if device.profile is not None and device.profile.entries:
        folded = [(f"All {len(device.profile.entries)} entries of the profile", tables.entries(device.profile))]
    missing = () if shown or folded else ("no kernel was measured",)
    intro = (
        "Verdict and entry are the profile's, at the nearest T: fresh entries were tuned for the sources of this checkout, stale ones for "
        "others and are not used. Another configuration: the entry's is not the one that was timed here, so nothing is said of it."
    )
    return Section(name, title, intro if shown or folded else "", tables=tuple(shown), folded=tuple(folded), missing=missing)


def _checks(name: str, device: Device) -> Section:
    title = "Checks for slower kernels"
    if not device.checks:
        return Section(name, title, missing=("no check*.json; write one with: mhc-tune check --json",))
    shown = []
    for file in device.checks:
        check = file.data
        counts = ", ".join(f"{count} {verdict}" for verdict, count in check.counts.items()) or "nothing to compare"
        what = "programs" if check.mode == "static" else f"entries, {check.runs} runs"
        about = f"{file.path.name}: {check.title}: {len(check.programs)} {what}, {counts}; exit code {check.exit_code}"
        shown.append((about, tables.checked(check)))
    return Section(name, title, "Only what is not the same as before has a line.", tables=tuple(shown))


def _startup(name: str, device: Device) -> Section:
    title = "Start of a script"
    if device.startup is None:
        return Section(name, title, missing=("no startup.json; measure with: mhc-tune startup --bundle",))
    found = device.startup.data
    intro = (
        f"Seconds from the start of a process to the end of its first forward + backward of one boundary, T × n × C = {found.T} × "
        f"{found.n} × {found.C}, {found.dtype} ({found.date}); medians. Cold: nothing was ever compiled here; cached: a second start; "
        "warm_up: cold, compiled by mhc.warm_up before the step; bundle: compiled elsewhere, no compiler on PATH."
    )
    lacks = unfinished(found.model_dump())
    return Section(name, title, intro, tables=(("", tables.started(found)),), missing=(lacks,) if lacks else ())


def _searches(name: str, device: Device) -> Section:
    title = "How it was searched"
    runs = [tune for found in device.tunes.values() for tune in found]
    missing = [] if runs else ["no tune*.json; write one with: mhc-tune --raw"]
    shown = [("Runs of the tuner", tables.searches(runs))] if runs else []
    charts: tuple[Chart, ...] = ()
    if device.replay is None:
        missing.append("no replay.json: how many trials a sampler needs was not measured; measure with: mhc-tune replay")
    else:
        replay = device.replay.data
        about = f"trials until one is within {replay.within:.0%} of the best of {replay.ledger}, {replay.batch} under way at a time"
        shown.append((f"Replays of {replay.date}: {about}", tables.replayed(replay)))
        rows = [
            f"{s.label} {r.start} {r.sampler} {'never' if r.median_share is None else f'{r.median_share:.0%}'}"
            for s in replay.studies
            for r in s.rows
        ]
        if rows:
            alt = f"Median share of the space measured until near the best: {'; '.join(rows)}."
            svg = draw(name, "Replays", alt, lambda width: plots.replays(replay, width))
            charts = (Chart("Replays of an exhaustive measurement: less is better.", svg),)
    return Section(name, title, "", charts, tuple(shown), missing=tuple(missing))


# -- files ------------------------------------------------------------------------------------------------------------------------


def relative_link(path: Path, page: Path) -> str:
    """A link from the page to a file, as a relative URL."""
    return quote(Path(os.path.relpath(path.resolve(), page.resolve().parent)).as_posix())


def sources(device: Device, page: Path) -> list[Source]:
    """The files that the page is made of, then the others of the folder."""
    found: dict[Path, Source] = {}
    changed = changed_files(device.folder)
    if device.profile_path is not None:
        changed |= changed_files(device.profile_path.parent)

    def add(path: Path, what: str, date: str, command: str) -> None:
        found[path] = Source(
            relative_link(path, page), _name(path, device), what, date, last_commit(path, changed) or "not committed", command
        )

    more = [(file, "boundaries of another run") for file in device.more]
    for file, what in ((device.bench, "boundaries, rivals, kernels"), (device.decode, "small token counts"), *more):
        if file is not None:
            add(file.path, what, file.data.date, file.data.command)
    if device.profile is not None and device.profile_path is not None:
        where = device.profile.provenance
        add(device.profile_path, "profile: what ships, and against the default", where.date, where.command)
    for path, runs in device.tunes.items():
        add(
            path,
            "every trial of the tuner",
            "not recorded",
            runs[0].command if len(runs) == 1 else f"{len(runs)} runs, their commands are above",
        )
    for check in device.checks:
        add(check.path, "check for slower kernels", check.data.date, check.data.command)
    if device.startup is not None:
        add(device.startup.path, "start of a script", device.startup.data.date, device.startup.data.command)
    if device.replay is not None:
        add(device.replay.path, "replays of the search", device.replay.data.date, device.replay.data.command)
    for path in device.files:
        if path not in found:
            found[path] = Source(relative_link(path, page), _name(path, device), "")
    return list(found.values())


def _name(path: Path, device: Device) -> str:
    return path.relative_to(device.folder).as_posix() if path.is_relative_to(device.folder) else path.name
