"""The charts of a report. Each takes what is to be drawn and a width in CSS pixels and returns a matplotlib figure; below ``NARROW_BELOW``
pixels names stand over their bars and panels below each other. Every name may be hostile: labels go through :func:`label`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tuner.bench_case import PASSES
from tuner.bench_report import TITLES
from tuner.report_history import CHAINED, FLOOR, OURS, RIVAL, Point
from tuner.report_read import Replay, ShapeResult
from tuner.report_svg import COLORS, FONT_PX, label, new_figure

NARROW_BELOW = 600
LINE_PX = 15
#: Axis labels, ticks and a title of a chart, in pixels.
FRAME_PX = 78


def number(value: float) -> str:
    """``0.05``, ``7.3``, ``139``, ``12 400``."""
    if value == 0:
        return "0"
    digits = max(0, (0 if abs(value) >= 99.5 else 1 if abs(value) >= 9.95 else 2) - (1 if abs(value) >= 9.95 else 0))
    if abs(value) < 0.1:
        return f"{value:.2g}"
    return f"{value:,.{digits}f}".replace(",", "\u202f")


def _plain(value: float, place: Any = None) -> str:
    """A tick of a logarithmic axis: a number, no power of ten in mathematical type."""
    return f"{value:g}" if value < 1e3 else number(value) if value < 1e9 else f"{value:.0e}"


def _logarithmic(axis: Any, low: float, high: float, most: int) -> None:
    """``axis`` (an XAxis or YAxis) from ``low`` to ``high`` with about ``most`` ticks at 1, 2 and 5."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
        if len(ticks) <= most:
            break
    ticks = ticks[:: math.ceil(len(ticks) / most)] if len(ticks) > most else ticks
    axis.set_major_locator(FixedLocator(ticks or [low, high]))
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_locator(NullLocator())


def _over(axis: Any, name: str, place: tuple[float, float], up: float) -> None:
    """A name over its bar, readable also where a line of the axis passes behind it."""
    behind = {"facecolor": COLORS["paper"], "edgecolor": "none", "pad": 0.5, "alpha": 0.85}
    axis.annotate(label(name), place, xytext=(1, up), textcoords="offset points", va="bottom", fontsize=FONT_PX - 2, bbox=behind)


# -- boundaries against rivals ----------------------------------------------------------------------------------------------------


def boundaries(entry: ShapeResult, kind: str, width: float) -> Any:
    """Bars of forward and forward + backward, an implementation each, the floor as a dashed line."""
    narrow = width < NARROW_BELOW
    panels = [(p, [(r, r.times[f"{p}_{kind}"]) for r in entry.rows if f"{p}_{kind}" in r.times]) for p in PASSES]
    bar = 34 if narrow else 24
    tall = max((len(rows) for _, rows in panels), default=1) * bar + FRAME_PX
    figure = new_figure(width, tall * (2 if narrow else 1))
    axes = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
    for place, (axis, (p, rows)) in enumerate(zip(axes, panels, strict=True)):
        for i, (row, time) in enumerate(rows):
            spread = [[max(0.0, time.us - time.lo)], [max(0.0, time.hi - time.us)]]
            at, height = (i + 0.18, 0.4) if narrow else (i, 0.64)
            color = COLORS["ours" if row.rival == "ours" else "rival"]
            axis.barh(at, time.us, height=height, xerr=spread, color=color, ecolor=COLORS["ink"], capsize=2)
            axis.annotate(number(time.us), (max(time.hi, time.us), at), xytext=(4, 0), textcoords="offset points", va="center")
            if narrow:
                _over(axis, row.name, (0, i - 0.06), 1)
        axis.axvline(entry.floor_us[p], color=COLORS["floor"], linestyle="--", linewidth=1.6)
        axis.set_title(f"{TITLES[p]}; floor {number(entry.floor_us[p])} us")
        axis.set_xlabel("us a boundary (median, 95% interval)")
        axis.set_xlim(0, max([entry.floor_us[p], *(t.hi for _, t in rows)]) * (1.2 if narrow else 1.14))
        axis.set_ylim(max(len(rows), 1) - 0.45, -0.75)
        names = [] if narrow or place else [label(row.name) for row, _ in rows]
        same = [r.name for r, _ in panels[0][1]] == [r.name for r, _ in panels[1][1]]
        if not narrow and place and not same:
            names = [label(row.name) for row, _ in rows]
        axis.set_yticks(range(len(names)), names)
        axis.tick_params(axis="y", length=0)
        axis.locator_params(axis="x", nbins=5)
    return figure


# -- roofline ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RoofPoint:
    """A program on the roofline: useful operations a byte, and a second. ``named``: it gets a label; the others are only dots."""

    name: str
    intensity: float
    gflops: float
    named: bool = True


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places in the order of ``wanted``, at least ``gap`` apart and within [low, high], each near what it wanted; closer together where
    they do not fit otherwise."""
    if not wanted:
        return []
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    # runs of labels that touch, each as (members, middle of what they wanted)
    runs: list[tuple[list[int], float]] = []
    for i in order:
        members, middle = [i], min(max(wanted[i], low), high)
        while runs:
            before, centre = runs[-1]
            if middle - gap * (len(members) - 1) / 2 - (centre + gap * (len(before) - 1) / 2) >= gap:
                break
            runs.pop()
            middle = (middle * len(members) + centre * len(before)) / (len(members) + len(before))
            members = [*before, *members]
            half = gap * (len(members) - 1) / 2
            middle = min(max(middle, low + half), high - half)
        runs.append((members, middle))
    places = [0.0] * len(wanted)
    for members, middle in runs:
        for k, i in enumerate(members):
            places[i] = middle + gap * (k - (len(members) - 1) / 2)
    return places


def roofline(points: Sequence[RoofPoint], copy_gbps: float, width: float) -> Any:
    """Useful Gflop/s over flop/byte, both logarithmic, under the copy bandwidth; names in a column, a thin line to each."""
    narrow = width < NARROW_BELOW
    named = [p for p in points if p.named]
    tall = max(320.0, LINE_PX * len(named) + FRAME_PX + 20)
    letters, size = (5.9, FONT_PX - 2) if narrow else (6.8, FONT_PX - 1)
    names = max((len(label(p.name)) for p in named), default=4) * letters + 12
    figure = new_figure(width, tall)
    figure.set_layout_engine("none")
    left, bottom, top = 74, 48, 30
    axis = figure.add_axes((left / width, bottom / tall, (width - left - names - 26) / width, (tall - bottom - top) / tall))
    xs, ys = [p.intensity for p in points], [p.gflops for p in points]
    x0, x1 = min(xs) / 1.6, max(xs) * 1.6
    y0, y1 = min(ys) / 1.8, max(max(ys) * 1.8, x1 * copy_gbps)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(x0, x1)
    axis.set_ylim(y0, y1)
    _logarithmic(axis.xaxis, x0, x1, 4 if narrow else 9)
    _logarithmic(axis.yaxis, y0, y1, 7)
    axis.grid(linewidth=0.6)
    axis.set_axisbelow(True)
    axis.plot([x0, x1], [x0 * copy_gbps, x1 * copy_gbps], color=COLORS["floor"], linewidth=1.8)
    axis.set_title(f"roof: copy bandwidth, {number(copy_gbps)} GB/s", color=COLORS["floor"])
    axis.set_xlabel("useful flop / byte that must move")
    axis.set_ylabel("useful Gflop/s")
    rest = [p for p in points if not p.named]
    axis.plot(
        [p.intensity for p in rest], [p.gflops for p in rest], "o", markerfacecolor="none", markeredgecolor=COLORS["muted"], markersize=6
    )
    axis.plot([p.intensity for p in named], [p.gflops for p in named], "o", color=COLORS["ours"], markersize=6)
    # fractions of the axis' height, so that a gap is one in pixels
    inside = tall - bottom - top
    at = [math.log(p.gflops / y0) / math.log(y1 / y0) for p in named]
    places = spread(at, LINE_PX / inside, 6 / inside, 1 - 6 / inside)
    for p, place in zip(named, places, strict=True):
        axis.annotate(
            label(p.name),
            (p.intensity, p.gflops),
            xytext=(1 + 24 / (width - left - names - 26), place),
            textcoords="axes fraction",
            va="center",
            fontsize=size,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": COLORS["rival"], "linewidth": 0.6, "relpos": (0, 0.5), "shrinkB": 3},
        )
    return figure


# -- tuned against default --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gain:
    """What ships at one shape, as a share of the default's time; ``other``: the best other one, where the default ships."""

    name: str
    verdict: str
    share: float
    interval: tuple[float, float] | None
    other: float | None = None
    other_interval: tuple[float, float] | None = None


def gains(rows: Sequence[Gain], width: float) -> Any:
    """Where the tuned configuration ships, a line from the default (100%) to it; else one to the best other configuration."""
    narrow = width < NARROW_BELOW
    panels = [
        (title, mine)
        for title, mine in (
            ("tuned ships", [r for r in rows if r.verdict == "win"]),
            ("default ships; best other", [r for r in rows if r.verdict != "win"]),
        )
        if mine
    ]
    line = 26 if narrow else 16
    if narrow or len(panels) == 1:
        heights = [len(mine) * line + FRAME_PX for _, mine in panels]
        figure = new_figure(width, sum(heights))
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    else:
        figure = new_figure(width, max(len(mine) for _, mine in panels) * line + FRAME_PX)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
    lines = max(len(mine) for _, mine in panels)
    for axis, (title, mine) in zip(axes, panels, strict=True):
        _gain_panel(axis, mine, len(mine) if narrow else lines, narrow)
        axis.set_title(title)
    return figure


def _gain_panel(axis: Any, rows: Sequence[Gain], lines: int, narrow: bool) -> None:
    values = [1.0, *(v for r in rows for v in (r.share, r.other, *(r.interval or ()), *(r.other_interval or ())) if v is not None)]
    low, high = min(values), max(values)
    room = (high - low or 0.1) * 0.06
    axis.axvline(100, color=COLORS["muted"], linewidth=1)
    for i, r in enumerate(rows):
        at = i + (0.22 if narrow else 0)
        tuned = r.verdict == "win"
        value, between, color, mark = (r.share, r.interval, "ours", "o") if tuned else (r.other, r.other_interval, "rival", "s")
        if value is not None:
            axis.hlines(at, 100 * value, 100, color=COLORS[color], linewidth=1.4)
            axis.plot([100 * value], [at], mark, color=COLORS[color], markersize=5)
        if between is not None:
            axis.hlines(at, 100 * between[0], 100 * between[1], color=COLORS["ink"], linewidth=3, alpha=0.6)
        if narrow:
            where = (100 * (low - room), at)
            _over(axis, r.name, where, 5)
    axis.set_yticks([] if narrow else range(len(rows)), [] if narrow else [label(r.name) for r in rows])
    axis.tick_params(axis="y", length=0)
    axis.set_xlim(100 * (low - room), 100 * (high + room))
    axis.set_ylim(lines - 0.4, -0.7)
    axis.set_xlabel("time, % of the default's")
    axis.grid(axis="x", linewidth=0.6)
    axis.set_axisbelow(True)


# -- small token counts, history, replay ------------------------------------------------------------------------------------------

_MARKS = (("ours", "o"), ("good", "s"), ("floor", "^"), ("second", "D"), ("other", "v"), ("third", "P"), ("rival", "X"))


def tokens(rows: dict[str, list[dict[str, Any]]], kind: str, width: float) -> Any:
    """us of a forward over the number of tokens, both logarithmic, a line an implementation (:func:`tuner.bench_report.by_name`)."""
    figure = new_figure(width, 330 + (18 * len(rows) if width < NARROW_BELOW else 0))
    axis = figure.subplots()
    every = sorted({r["T"] for mine in rows.values() for r in mine})
    times = [r["times"][f"forward_{kind}"]["us"] for mine in rows.values() for r in mine if f"forward_{kind}" in r["times"]]
    for i, (name, mine) in enumerate(rows.items()):
        color, mark = _MARKS[i % len(_MARKS)]
        timed = sorted((r["T"], r["times"][f"forward_{kind}"]["us"]) for r in mine if f"forward_{kind}" in r["times"])
        if timed:
            axis.plot(*zip(*timed, strict=True), marker=mark, color=COLORS[color], label=label(name), markersize=6)
    axis.set_xscale("log")
    axis.set_yscale("log")
    low, high = min(times) / 1.5, max(times) * 1.5
    axis.set_ylim(low, high)
    _logarithmic(axis.yaxis, low, high, 6)
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.xaxis.set_major_locator(FixedLocator(every))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(every, [str(T) for T in every])
    axis.set_xlabel("T, tokens")
    axis.set_ylabel("us a boundary, forward")
    axis.grid(linewidth=0.6)
    _legend(figure, axis, width)
    return figure


def _legend(figure: Any, axis: Any, width: float) -> None:
    handles, names = axis.get_legend_handles_labels()
    if handles and width < NARROW_BELOW:
        figure.legend(handles, names, loc="outside lower left", ncols=1)
    elif handles:
        figure.legend(handles, names, loc="outside right upper")


_HISTORY = {OURS: ("ours", "o", "-"), CHAINED: ("good", "s", "-"), RIVAL: ("rival", "X", "-"), FLOOR: ("floor", "", "--")}


def over_commits(points: Sequence[Point], width: float) -> Any:
    """us a boundary by commit, forward and forward + backward; series that a commit did not measure have a gap."""
    narrow = width < NARROW_BELOW
    figure = new_figure(width, 640 if narrow else 340)
    panels = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
    for axis, p in zip(panels, PASSES, strict=True):
        for series, (color, mark, line) in _HISTORY.items():
            values = [point.times.get((p, series), math.nan) for point in points]
            if not all(map(math.isnan, values)):
                axis.plot(range(len(points)), values, marker=mark, color=COLORS[color], linestyle=line, label=series)
        step = max(1, math.ceil(len(points) / (3 if narrow else 6)))
        shown = range(0, len(points), step)
        axis.set_xticks(list(shown), [f"{label(points[i].commit)}\n{(points[i].committed or points[i].measured)[:10]}" for i in shown])
        axis.set_xlim(-0.3, len(points) - 0.7)
        axis.set_ylim(bottom=0)
        axis.set_title(TITLES[p])
        axis.set_xlabel("commit that holds the measurement")
        axis.set_ylabel("us a boundary")
        axis.grid(axis="y", linewidth=0.6)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2 if narrow else 4)
    return figure


def replays(replay: Replay, width: float) -> Any:
    """Median share of the space until one is near the best (a dot) and the 90th percentile (the end of its line); a quarter dashed."""
    narrow = width < NARROW_BELOW
    rows = [(study, row) for study in replay.studies for row in study.rows]
    line = 30 if narrow else 20
    figure = new_figure(width, len(rows) * line + FRAME_PX)
    axis = figure.subplots()
    for i, (study, row) in enumerate(rows):
        at = i + (0.2 if narrow else 0)
        middle, far = (None if v is None else 100 * v for v in (row.median_share, row.p90_share))
        if middle is not None:
            axis.hlines(at, middle, 100 if far is None else far, color=COLORS["ours"], linewidth=1.8, linestyle=":" if far is None else "-")
            axis.plot([middle], [at], "o", color=COLORS["ours"], markersize=6)
        else:
            axis.annotate("median: never", (100, at), ha="right", va="center", fontsize=FONT_PX - 1)
        if far is not None:
            axis.plot([far], [at], "|", color=COLORS["ours"], markersize=9)
        if narrow:
            _over(axis, f"{study.label}, {row.start}, {row.sampler}", (0, at), 5)
    axis.axvline(25, color=COLORS["floor"], linestyle="--", linewidth=1.4)
    axis.set_yticks([] if narrow else range(len(rows)), [] if narrow else [label(f"{s.label}, {r.start}, {r.sampler}") for s, r in rows])
    axis.tick_params(axis="y", length=0)
    axis.set_xlim(0, 101)
    axis.set_ylim(len(rows) - 0.4, -0.7)
    axis.set_xlabel("% of the space measured: median (dot) and 90th percentile (bar) of the seeds; dashed: a quarter")
    if narrow:
        axis.set_xlabel("% of the space: median (dot), 90th percentile (bar)")
    axis.grid(axis="x", linewidth=0.6)
    return figure
