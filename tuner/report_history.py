"""What earlier commits say of the boundary at the same shape: every committed version of a bench.json, by ``git log`` and ``git show``.

Only the results are read; nothing of an earlier commit is run.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.bench_case import PASSES
from tuner.errors import TuneError, one_line
from tuner.report_read import Bench, ShapeResult, parse

UNCOMMITTED = "not committed"
#: At most so many commits, the latest.
MOST_COMMITS = 200
TIMEOUT_S = 30
#: Where the first benchmark of this project stood before bench.json: one shape, called ``case``.
OLD_NAME = "boundary.json"
OURS, CHAINED, RIVAL, FLOOR = "ours, alone", "ours, chained", "best rival", "floor"
SERIES = (OURS, CHAINED, RIVAL, FLOOR)


@dataclass(frozen=True)
class Point:
    """One measurement: us a boundary by (pass, series), for what was measured. ``committed``: a date, empty where it is not."""

    commit: str
    committed: str
    measured: str
    subject: str
    copy_gbps: float
    times: dict[tuple[str, str], float]


@dataclass(frozen=True)
class History:
    """The points, the oldest first; ``why_not`` where there can be none; ``skipped``: versions that could not be read, and why."""

    points: tuple[Point, ...] = ()
    why_not: str = ""
    skipped: tuple[str, ...] = ()


def _git(folder: Path, *args: str) -> str:
    done = subprocess.run(
        ["git", "--no-optional-locks", *args], cwd=folder, capture_output=True, timeout=TIMEOUT_S, check=True, stdin=subprocess.DEVNULL
    )
    return done.stdout.decode("utf-8", "backslashreplace")


def changed_files(folder: Path) -> frozenset[Path]:
    """The files below a folder that are not as they were committed; none outside a checkout."""
    try:
        said = _git(folder, "status", "--porcelain", "-z", "--no-renames", "--untracked-files=no", "--", ".")
        top = _git(folder, "rev-parse", "--show-toplevel").rstrip("\n")
    except (OSError, subprocess.SubprocessError):
        return frozenset()
    return frozenset(Path(top, line[3:]) for line in said.split("\0") if line)


def last_commit(path: Path, changed: Container[Path]) -> str | None:
    """The short hash of the commit that last changed a file, with ``+`` where it is among the ``changed``; None outside a checkout."""
    try:
        commit = _git(path.parent, "log", "-1", "--format=%h", "--", f"./{path.name}").strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if path.resolve() in changed else "") if commit else None


def times_of(shape: ShapeResult, kind: str) -> dict[tuple[str, str], float]:
    """us a boundary: ours alone and in a chain, the fastest rival alone that agrees with float64, and the floor."""
    found: dict[tuple[str, str], float] = {(p, FLOOR): shape.floor_us[p] for p in PASSES}
    for row in shape.rows:
        ours = row.rival == "ours"
        series = OURS if ours and row.layers == 1 else CHAINED if ours and row.chained else RIVAL if not ours and row.layers == 1 else None
        if series is None or (series == RIVAL and not row.agrees):
            continue
        for p in PASSES:
            time = row.times.get(f"{p}_{kind}")
            if time is not None:
                found[p, series] = min(time.us, found.get((p, series), time.us))
    return found


def _as_bench(text: str) -> str:
    """The first layout of a result, as a bench.json; any other text as it is."""
    try:
        raw: Any = json.loads(text)
    except (ValueError, RecursionError):
        return text  # the reader of results says what is wrong
    if not isinstance(raw, dict) or not isinstance(raw.get("case"), dict):
        return text
    shape = {**raw["case"], "rows": [{"layers": 1, "chained": False, **row} for row in raw["rows"]], "copy_gbps": raw["copy_gbps"]}
    return json.dumps({**raw, "dtype": shape.get("dtype"), "shapes": [shape]})


def read_point(text: str, name: str, wanted: ShapeResult, commit: tuple[str, str, str]) -> Point | None:
    """The measurement of the ``wanted`` shape in the text of a result, None where it has none. Raises :class:`TuneError`."""
    try:
        text = _as_bench(text)
    except (KeyError, TypeError, ValueError) as e:
        raise TuneError(f"{name}: is no result of the first layout: {one_line(e)}") from None
    bench = parse(Bench, text, name).data
    for shape in bench.shapes:
        if (shape.T, shape.n, shape.C, shape.dtype) == (wanted.T, wanted.n, wanted.C, wanted.dtype):
            return Point(commit[0], commit[1], bench.date, commit[2], shape.copy_gbps, times_of(shape, bench.kind))
    return None


def history(path: Path, wanted: ShapeResult, now: Bench | None = None) -> History:
    """Of the result at ``path``, whose content, where it is not committed yet, is the last point: ``now``, which has the ``wanted`` shape.

    Never raises: a version that is malformed is named, no checkout is said.
    """
    commits: list[tuple[int, str, str, str, str]] = []
    try:
        for name in (path.name, OLD_NAME):
            log = _git(
                path.parent, "log", f"-{MOST_COMMITS}", "--format=%ct%x09%H%x09%h%x09%cI%x09%s", "--diff-filter=AM", "--", f"./{name}"
            )
            for line in reversed(log.splitlines()):  # of commits of one second, too, the oldest first
                seconds, sha, short, date, subject = line.split("\t", 4)
                commits.append((int(seconds), f"{sha}:./{name}", short, date, subject))
    except (OSError, ValueError, subprocess.SubprocessError):
        return History(why_not="not run inside a git checkout, or git is not installed")
    points: dict[str, Point] = {}
    skipped: list[str] = []
    for _, blob, short, date, subject in sorted(commits, key=lambda c: c[0]):  # dates of several time zones do not sort as text
        try:
            point = read_point(_git(path.parent, "show", blob), f"{short}:{blob.split('./', 1)[1]}", wanted, (short, date, subject))
        except (TuneError, OSError, subprocess.SubprocessError) as e:
            skipped.append(str(e) if isinstance(e, TuneError) else f"{short}: git show failed")
            continue
        if point is not None:
            points.setdefault(point.measured, point)  # the same measurement, committed again
    if now is not None and now.date not in points:
        points[now.date] = Point(UNCOMMITTED, "", now.date, "", wanted.copy_gbps, times_of(wanted, now.kind))
    why_not = "" if points else "no committed result of this shape"
    return History(tuple(points.values()), why_not, tuple(skipped))
