"""How much runs of identical code differ, entry by entry: the committed calibration, and how often it would have raised a false alarm.

``configs/h100.noise.json`` stands beside ``configs/h100.yaml``, an entry a line. Written by ``mhc-tune check --calibrate N``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mhc.schema import Date, Positive, Strict, Text
from tuner.modelfile import read_model, write_model
from tuner.regression import Rule, judge, noise_band
from tuner.timing import median

#: Runs after which a band is worth keeping: a check makes one of its own runs from as many.
ENOUGH_RUNS = 5


class Band(Strict):
    """Of one entry: the share by which a run may differ from the usual one, the runs it was made of and their median in microseconds."""

    band: Annotated[float, Field(ge=0)]
    runs: Annotated[int, Field(ge=2)]
    median_us: Positive


class Noise(Strict):
    """A file of them, by the entry's name (:func:`tuner.latency_case.label`), and where, with what and when they were measured."""

    schema_version: Literal[1] = 1
    gpu: Text
    torch: Text
    tilelang: Text
    driver: str | None = None
    cuda: str | None = None
    date: Date
    command: Text
    entries: dict[str, Band]


def noise_path(profile: Path) -> Path:
    """``configs/h100.yaml`` -> ``configs/h100.noise.json``."""
    return profile.with_suffix(".noise.json")


def read_noise(path: Path) -> Noise | None:
    """The file, or None where there is none. Raises :class:`TuneError` on one line that names the file and the field."""
    return read_model(Noise, path, str(path), "mhc-tune check --calibrate")


def write_noise(path: Path, noise: Noise) -> None:
    """One entry a line, sorted. Raises :class:`TuneError`."""
    write_model(path, f"--calibrate {path}", noise, "entries")


def bands(runs: Mapping[str, Sequence[float]]) -> dict[str, Band]:
    """The band of every entry with at least two runs, from the medians of its runs in microseconds."""
    return {
        name: Band(band=round(noise_band(us), 5), runs=len(us), median_us=round(median(us), 3)) for name, us in runs.items() if len(us) > 1
    }


@dataclass(frozen=True)
class FalseAlarms:
    """Leave-one-out over runs of identical code: every run of every entry against the median of the others, with a band made from the
    others alone. ``judged`` pairs of entry and run, of which ``regressed`` alarmed and ``improved`` would have been called gains;
    ``runs_with_alarm`` of ``runs`` held at least one alarm: a check of one run would have failed for nothing.
    """

    entries: int
    runs: int
    judged: int
    regressed: int
    improved: int
    runs_with_alarm: int

    @property
    def rate(self) -> float:
        """Share of what was judged that alarmed."""
        return self.regressed / self.judged if self.judged else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For the JSON: the fields and ``rate``."""
        return {**vars(self), "rate": self.rate}

    def __str__(self) -> str:
        return (
            f"false alarms: {self.regressed} of {self.judged} ({self.rate:.2%}; {self.entries} entries, {self.runs} runs each judged "
            f"against the others), in {self.runs_with_alarm} of {self.runs} runs; {self.improved} false gains"
        )


def false_alarms(runs: Mapping[str, Sequence[float]], rule: Rule) -> FalseAlarms:
    """How often the rule cries wolf over runs of identical code: per entry, the medians of its runs in microseconds, in their order.
    Entries with fewer than three runs are left out: of two the others are one, which makes no band.
    """
    judged = [(i, _left_out(us, i, rule)) for us in runs.values() if len(us) > 2 for i in range(len(us))]
    verdicts = [verdict for _, verdict in judged]
    return FalseAlarms(
        entries=sum(len(us) > 2 for us in runs.values()),
        runs=max((len(us) for us in runs.values() if len(us) > 2), default=0),
        judged=len(judged),
        regressed=verdicts.count("regressed"),
        improved=verdicts.count("improved"),
        runs_with_alarm=len({i for i, verdict in judged if verdict == "regressed"}),
    )


def _left_out(us: Sequence[float], i: int, rule: Rule) -> str:
    others = [*us[:i], *us[i + 1 :]]
    return judge([us[i]], others, noise_band(others), rule).verdict
