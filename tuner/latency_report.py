"""What a timed check found, made into the report: each entry compared, its noise and its cause; and what a calibration keeps.

The report's JSON is described in tuner/latency_check.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any

from mhc.schema import Entry
from tl_kernels import KERNELS
from tuner.against import Revision
from tuner.attribution import Origin, attribute
from tuner.check_report import Report, Row
from tuner.display import microseconds
from tuner.latency_case import Case
from tuner.latency_plan import Plan
from tuner.latency_runs import Measured, Runs
from tuner.noise import ENOUGH_RUNS, FalseAlarms, Noise, bands, false_alarms, noise_path
from tuner.regression import judge, noise_band, pooled_band
from tuner.timing import median

#: The side at hand.
HERE = "here"
#: Names that a note writes out.
SHOWN = 4


@dataclass(frozen=True)
class Other:
    """The other revision: ``cases`` by name, source ``hashes`` by kernel, and ``notes`` on what it has not."""

    revision: Revision
    cases: Mapping[str, Case]
    hashes: Mapping[str, str]
    notes: tuple[str, ...]


def some(names: Sequence[str]) -> str:
    """The first of them, and how many more."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def in_step(now: Sequence[float], before: Sequence[float]) -> list[float]:
    """What ``now``'s runs would have taken, had ``before``'s, timed in turns with them, each been at their median; in microseconds. A clock
    or a neighbour that slowed both by as much in some run is gone from them, and from what they differ by.
    """
    usual = median(before)
    return [a / b * usual for a, b in zip(now, before, strict=True)]


@dataclass
class Found:
    """What was measured, made into a report."""

    plan: Plan
    other: Other | None
    runs: Runs
    interrupted: bool
    toolchain: dict[str, str | None] = field(default_factory=dict)
    #: What a calibration is to write.
    noise: Noise | None = None

    def report(self) -> Report:
        plan, request = self.plan, self.plan.request
        self.toolchain = _toolchain(plan)
        notes = [*plan.notes, *(self.other.notes if self.other else ())]
        if self.interrupted:
            notes.append(f"interrupted in run {self.runs.done + 1} of {plan.runs}; what has no time yet is left out")
        if self.runs.lost is not None:
            notes.append(f"stopped in run {self.runs.done + 1} of {plan.runs}: {self.runs.lost}")
        alarms = None
        if request.mode == "calibrate":
            alarms = self._calibrate(notes)
        rows = tuple(self._rows())
        before_gbps = plan.baseline.provenance.copy_gbps if plan.baseline else None
        now_gbps = median(self.runs.copy_gbps) if self.runs.copy_gbps else None
        if now_gbps is not None:
            notes.append(f"copy bandwidth {now_gbps:.1f} GB/s" + (f", in the baseline {before_gbps:.1f}" if before_gbps else ""))
        notes += self._about_bands(rows)
        against = self.other.revision if self.other else None
        baseline = (request.baseline or plan.path) if plan.baseline else None
        where = {"against": f"against {against.name}" if against else "", "baseline": f"against {baseline}", "calibrate": "calibration"}
        data = {
            "mode": request.mode,
            "date": _now(),
            "command": request.command,
            "gpu": plan.hardware.name,
            "arch": plan.hardware.arch,
            "versions": self.toolchain,
            "profile": str(plan.path),
            "against": {"rev": against.rev, "commit": against.commit} if against else None,
            "baseline": str(baseline) if baseline else None,
            "runs": self.runs.done,
            "rule": asdict(plan.rule),
            "copy_gbps": {"now": now_gbps, "before": before_gbps},
            "false_alarms": alarms.as_dict() if alarms else None,
        }
        return Report(f"{plan.path.stem}, {where[request.mode]}", rows, tuple(notes), "entry", data)

    # -- rows -----------------------------------------------------------------------------------------------------------------

    def _rows(self) -> Iterator[Row]:
        pooled: float | None = None
        for name in (*self.plan.cases, *self.plan.refused):
            now = self.runs.found[HERE].get(name)
            why_not = self.plan.refused.get(name) or self.runs.failed.get(name)
            if name in self.plan.cases and name not in self.runs.names:
                continue  # noted: the other revision has it not
            if why_not is None and now is None:
                if self.interrupted:
                    continue
                why_not = self.runs.lost or "not reached"
            if why_not is not None:
                yield self._row(name, "not measured", (why_not,), now, None)
                continue
            assert now is not None
            before = self._before(name)
            if before is None:
                text = f"{microseconds(median(now.runs))} us" + ("; not in the baseline" if self.plan.baseline else "")
                yield self._row(name, "noted" if self.plan.baseline else "same", (text,), now, None)
                continue
            if pooled is None:
                pooled = pooled_band([self._in_step(name) for name in self.runs.found[HERE]])
            yield self._compared(name, now, before, pooled)

    def _in_step(self, name: str) -> list[float]:
        """The runs of an entry, in microseconds; those of two revisions as :func:`in_step`."""
        now = self.runs.found[HERE][name].runs
        return now if self.other is None else in_step(now, self.runs.found[self.other.revision.name][name].runs)

    def _before(self, name: str) -> tuple[Measured, Origin] | None:
        """What the entry is compared with, as if it had been measured now; None where there is nothing."""
        if self.other is not None:
            case, measured = self.other.cases[name], self.runs.found[self.other.revision.name][name]
            program = self.runs.programs[self.other.revision.name].get(name)
            return measured, self._origin(case, measured, self.other.hashes.get(case.kernel), program, None)
        entry = self.plan.before.get(name)
        if entry is None or self.plan.baseline is None:
            return None
        return Measured([entry.time_us], [entry.clock_mhz], [entry.dirty]), self._recorded(entry)

    def _recorded(self, entry: Entry) -> Origin:
        assert self.plan.baseline is not None
        where = self.plan.baseline.provenance
        return Origin(
            source_hash=entry.source_hash,
            config={"impl": entry.impl, **entry.config},
            toolchain={
                "tilelang": entry.tilelang or where.tilelang,
                "torch": where.torch,
                "driver": entry.driver or where.driver,
                "cuda": where.cuda,
            },
            clock_mhz=entry.clock_mhz,
            copy_gbps=where.copy_gbps,
            dirty=entry.dirty,
        )

    def _origin(self, case: Case, measured: Measured, source_hash: str | None, program: str | None, copy_gbps: float | None) -> Origin:
        config = {"impl": case.impl, **case.config}
        return Origin(source_hash, program, config, self.toolchain, measured.clock_mhz, copy_gbps, measured.disturbed)

    def _compared(self, name: str, now: Measured, before: tuple[Measured, Origin], pooled: float) -> Row:
        was, its = before
        us = self._in_step(name)
        band, source = self._band(name, us, pooled)
        change = judge(us, was.runs, band, self.plan.rule)
        case = self.plan.cases[name]
        copy = median(self.runs.copy_gbps) if self.runs.copy_gbps and self.other is None else None
        mine = self._origin(case, now, KERNELS[case.kernel].source_hash, self.runs.programs[HERE].get(name), copy)
        found = attribute(change, its, mine, self.plan.rule, self.plan.request.strict)
        wide = f"band {band:.1%}, {source}" if source != "none" else "no band"
        text = f"{microseconds(change.before_us)} -> {microseconds(change.now_us)} us ({change.ratio - 1:+.1%}; {wide})"
        numbers = {"now_us": change.now_us, "before_us": change.before_us, "ratio": change.ratio, "band": band, "band_from": source}
        detail = {"runs": was.runs, "config": dict(its.config), "clock_mhz": its.clock_mhz, "dirty": its.dirty}
        return self._row(name, found.verdict, (text, *found.words), now, detail, found.causes, numbers)

    def _row(
        self,
        name: str,
        verdict: str,
        findings: tuple[str, ...],
        now: Measured | None,
        before: dict[str, Any] | None,
        causes: tuple[str, ...] = (),
        numbers: Mapping[str, Any] | None = None,
    ) -> Row:
        case, entry = self.plan.cases.get(name), self.plan.entries.get(name)
        what = case or entry
        assert what is not None
        config = {"impl": what.impl, **what.config}
        mine = None if now is None else {"runs": now.runs, "config": config, "clock_mhz": now.clock_mhz, "dirty": now.disturbed}
        data: dict[str, Any] = {
            "key": {"n": what.n, "C": what.C, "dtype": what.dtype, "tokens": what.tokens},
            "causes": list(causes),
            "now": mine,
            "before": before,
            **dict.fromkeys(("now_us", "before_us", "ratio", "band", "band_from")),
        }
        data |= {"now_us": median(now.runs)} if now is not None else {}
        return Row(what.kernel, name, verdict, findings, data | dict(numbers or {}), now.seconds if now is not None else 0.0)

    def _band(self, name: str, us: Sequence[float], pooled: float) -> tuple[float, str]:
        """The noise of an entry, and where it is known from."""
        if self.plan.noise is not None and name in self.plan.noise.entries:
            return self.plan.noise.entries[name].band, "calibration"
        if len(us) < 2:
            return 0.0, "none"
        own = noise_band(us)
        return (own, "own runs") if len(us) >= ENOUGH_RUNS else (max(own, pooled), "pooled")

    def _about_bands(self, rows: Sequence[Row]) -> Iterator[str]:
        """Which noise the entries were judged by."""
        counts = Counter(row.data["band_from"] for row in rows)
        if counts["calibration"] and self.plan.noise is not None:
            when = self.plan.noise.date
            yield f"noise: {counts['calibration']} entries by the calibration of {when}, {noise_path(self.plan.path)}"
        if counts["own runs"]:
            yield f"noise: {counts['own runs']} entries by what their own runs of this check differ by"
        if counts["pooled"]:
            yield f"noise: {counts['pooled']} entries by their own runs and by what those of all entries together differ by"
        if counts["none"]:
            yield f"noise: unknown for {counts['none']} entries, after one run without a calibration; only tolerance and floor count"
        only = self.plan.before.keys() - self.plan.cases.keys() - self.plan.refused.keys()
        if only:
            yield f"only in the baseline: {some(sorted(only))}"

    # -- calibration ----------------------------------------------------------------------------------------------------------

    def _calibrate(self, notes: list[str]) -> FalseAlarms:
        """Make the bands of what was measured; what was not looked at keeps its band."""
        plan = self.plan
        taken = {name: m.runs for name, m in self.runs.found[HERE].items() if name not in self.runs.failed}
        alarms = false_alarms(taken, plan.rule)
        fresh = bands(taken)
        if fresh:
            widest = max(fresh, key=lambda name: fresh[name].band)
            middle = median([band.band for band in fresh.values()])
            notes.append(f"bands: {middle:.1%} in the middle, at most {fresh[widest].band:.1%} ({widest})")
        notes.append(str(alarms))
        path, enough = noise_path(plan.path), min(ENOUGH_RUNS, plan.runs)
        if (self.interrupted or self.runs.lost is not None) and self.runs.done < enough:
            notes.append(f"{path} stays as it was: {self.runs.done} complete runs, wanted at least {enough}")
            return alarms
        kept = dict(plan.noise.entries) if plan.noise is not None else {}
        tools = {name: self.toolchain[name] for name in ("tilelang", "torch", "driver", "cuda")}
        self.noise = Noise(gpu=plan.hardware.name, date=_now(), command=plan.request.command, entries={**kept, **fresh}, **tools)  # type: ignore[arg-type]
        return alarms


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _toolchain(plan: Plan) -> dict[str, str | None]:
    import tilelang
    import torch

    hardware = plan.hardware
    return {"tilelang": tilelang.__version__, "torch": torch.__version__, "driver": hardware.driver, "cuda": hardware.cuda}
