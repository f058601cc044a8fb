"""Baselines of the fixture ``mhc_latency``: every kernel's runs of its last updates, and the noise band they give. JSON, a file a device.

    {
      "schema_version": 1,
      "device": "NVIDIA H100 80GB HBM3",
      "kernels": {
        "tests/test_k.py::test_pre": {"band": 0.011, "runs_us": [[139.2, 139.4, ...], ...], "date": ..., "torch": ..., "clock_mhz": ...}
      }
    }

``runs_us``: medians of runs in microseconds, a list per update, the oldest first. ``band`` is a share and counts as it stands: it may be
widened by hand, until the next update.
"""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mhc.schema import Strict
from tuner.device_lock import hold
from tuner.errors import TuneError
from tuner.modelfile import read_model, write_model
from tuner.regression import Rule, judge, noise_band

#: Updates whose runs are kept: processes that the band is made of.
KEEP = 8
OPTION = "--mhc-latency-baseline"

Text = Annotated[str, Field(min_length=1)]
Time = Annotated[float, Field(gt=0)]


class Entry(Strict):
    """One kernel. ``date``, ``torch`` and ``clock_mhz`` (the SM clock, where it is known) are the last update's, for the reader."""

    band: Annotated[float, Field(ge=0)]
    runs_us: Annotated[list[Annotated[list[Time], Field(min_length=2)]], Field(min_length=1)]
    date: str
    torch: str
    clock_mhz: Time | None = None

    @property
    def runs(self) -> list[float]:
        """Of all updates, in microseconds."""
        return [run for runs in self.runs_us for run in runs]


class Baseline(Strict):
    schema_version: Literal[1]
    device: Text
    kernels: dict[Text, Entry]


def is_file(place: Path) -> bool:
    """Whether a place given for baselines is one file; otherwise it is a folder, there or not."""
    return not place.is_dir() and (place.suffix == ".json" or place.exists())


def path_of(place: Path, profile: str) -> Path:
    """The file of a device, whose profile name this is, in a place."""
    return place if is_file(place) else place / f"{profile}.json"


def read_all(place: Path) -> None:
    """Read whatever is there. Raises :class:`TuneError` for the first file that is malformed, on one line."""
    for path in [place] if is_file(place) else sorted(place.glob("*.json")):
        read_baseline(path)


def read_baseline(path: Path) -> Baseline | None:
    """None where there is no file. Raises :class:`TuneError` on one line that names the file and the field."""
    return read_model(Baseline, path, f"{OPTION} {path}", "--mhc-latency-update")


def refreshed(old: Entry | None, runs: list[float], rule: Rule, torch: str, clock_mhz: float | None) -> Entry:
    """The entry after one more update, with at least two runs in microseconds: beside the old runs where the time is what it was, instead
    of them where it is not.
    """
    short = [float(f"{run:.6g}") for run in runs]
    same = old is not None and judge(short, old.runs, old.band, rule).verdict in ("same", "noise")
    groups = [*old.runs_us, short][-KEEP:] if old is not None and same else [short]
    band = noise_band([run for group in groups for run in group])
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return Entry(band=float(f"{band:.3g}"), runs_us=groups, date=date, torch=torch, clock_mhz=clock_mhz)


def write_entries(path: Path, device: str, entries: dict[str, Entry]) -> None:
    """Put entries into the file; what else is there by now stays, whoever wrote it. Raises :class:`TuneError`, and the file is as it was,
    where it cannot be written, is malformed or of another device.
    """
    with hold("baselines"):
        old = read_baseline(path)
        if old is not None and old.device != device:
            raise other_device(path, old.device, device)
        kernels = {**(old.kernels if old is not None else {}), **entries}
        write_model(path, f"{OPTION} {path}", Baseline(schema_version=1, device=device, kernels=kernels), "kernels")


def other_device(path: Path, there: str, here: str) -> TuneError:
    return TuneError(f"{OPTION} {path}: its baselines are of {there!r}, this is {here!r}; wanted another file or folder for this device")
