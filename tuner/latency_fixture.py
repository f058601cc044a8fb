"""The fixture ``mhc_latency`` (tuner/pytest_plugin.py): times a call as the tuner times its candidates, and judges it by its baseline."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mhc.profile import device_name, profile_name
from mhc.yamlfile import printable
from tuner.device_lock import hold, lock_name
from tuner.device_state import Watch
from tuner.latency_baseline import Baseline, Entry, other_device, path_of, read_baseline, refreshed, write_entries
from tuner.regression import Change, Rule, judge, noise_band
from tuner.timing import Clock, median, median_interval

#: Groups of samples, "runs"; samples of one, and milliseconds for them.
RUNS, SAMPLES, SAMPLE_MS = 5, 100, 60.0
#: Seconds of calls before the first run: caches, thread pools and clocks are then what they stay.
WARM_S = 0.1
#: Noise band of a measurement's own runs, as a share, from which they say nothing: as a baseline they would let everything pass.
UNSTEADY = 0.5


@dataclass(frozen=True)
class Latency:
    """What was measured, in microseconds: ``median_us`` of the runs ``runs_us``, and ``interval``, its confidence interval (of so few runs
    their range).

    ``gbps``: GB/s (1e9 bytes), ``copy_share``: share of the bandwidth of a copy on this device; both None without ``bytes_moved``, the
    latter also where there is no memory for a copy. ``change`` is None without a baseline. ``clock_mhz``: the SM clock, None where NVML
    does not tell; ``dirty``: why the device was not steady, or None.
    """

    name: str
    device: str
    median_us: float
    interval: tuple[float, float]
    runs_us: tuple[float, ...]
    gbps: float | None = None
    copy_share: float | None = None
    change: Change | None = None
    clock_mhz: float | None = None
    dirty: str | None = None


@dataclass(frozen=True)
class _Runs:
    medians: list[float]
    clock_mhz: float | None
    dirty: str | None


class _Device:
    """A device as this session uses it: its clock, its baselines."""

    def __init__(self, device: torch.device, place: Path) -> None:
        self.device, self.name, self.lock = device, device_name(device), lock_name(device)
        self.clock = Clock(device, Watch.of(device))
        self.path = path_of(place, "cpu" if device.type == "cpu" else profile_name(self.name))
        self.baseline: Baseline | None = read_baseline(self.path)
        self.fits = self.baseline is None or self.baseline.device == self.name
        self._copy_gbps: float | None = None

    def entry(self, name: str) -> Entry | None:
        return self.baseline.kernels.get(name) if self.baseline is not None and self.fits else None

    def measure(self, call: Callable[[], object]) -> _Runs:
        """The lock is given up between runs: who else waits for the device does so for one run only."""
        runs, clocks, dirty, watch = [], [], [], self.clock.watch
        with self._current():
            with hold(self.lock):
                until = time.perf_counter() + WARM_S
                self.clock.warm_up([call], 1)
                while time.perf_counter() < until:
                    self.clock.warm_up([call], 1)
            for _ in range(RUNS):
                with hold(self.lock):
                    watch.start()
                    runs.append(median(self.clock.measure(call, SAMPLES, SAMPLE_MS)[0]))
                about = watch.report()
                clocks += [about["clock_mhz"]] if about["clock_mhz"] is not None else []
                dirty += [about["dirty"]] if about["dirty"] is not None else []
        if not dirty and noise_band(runs) > UNSTEADY:
            dirty.append(f"runs from {_us(min(runs))} to {_us(max(runs))}")
        return _Runs(runs, median(clocks) if clocks else None, dirty[0] if dirty else None)

    def copy_gbps(self) -> float | None:
        """GB/s, measured once; None where there is no memory for it."""
        if self._copy_gbps is None:
            # once more where it is needed again: the next test may leave room
            with contextlib.suppress(torch.cuda.OutOfMemoryError), self._current(), hold(self.lock):
                self._copy_gbps = self.clock.copy_gbps()
        return self._copy_gbps

    @property
    def copy_text(self) -> str:
        return "" if self._copy_gbps is None else f", copy {self._copy_gbps:.4g} GB/s"

    def _current(self) -> contextlib.AbstractContextManager[object]:
        """Events are recorded on the current device's stream."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()


@dataclass
class Session:
    """All that is measured in one pytest run. ``place``: file or folder of the baselines; ``update``, ``strict``: the options."""

    place: Path
    rule: Rule
    update: bool = False
    strict: bool = False
    _devices: dict[torch.device, _Device] = field(default_factory=dict)
    _owners: dict[tuple[str, str], str] = field(default_factory=dict)
    _measured: dict[tuple[str, str], Latency] = field(default_factory=dict)
    _written: dict[Path, set[str]] = field(default_factory=dict)

    def device(self, device: str | torch.device | None) -> _Device:
        """Raises ValueError for what is neither CUDA nor the CPU, and TuneError for a malformed baseline file."""
        found = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
        if found.type not in ("cpu", "cuda"):
            raise ValueError(f"device: got {found}, wanted cpu or cuda")
        if found.type == "cuda" and found.index is None:
            found = torch.device("cuda", torch.cuda.current_device())
        elif found.type == "cpu":
            found = torch.device("cpu")
        if found not in self._devices:
            self._devices[found] = _Device(found, self.place)
        return self._devices[found]

    def claim(self, device: _Device, name: str, owner: str) -> None:
        """Raises ValueError where another test measured something by this name. A test that is run again may."""
        if self._owners.setdefault((device.name, name), owner) != owner:
            raise ValueError(f"name: got {name!r}, which {self._owners[device.name, name]} has; wanted one of its own (add the parameters)")

    def add(self, latency: Latency) -> None:
        self._measured[latency.device, latency.name] = latency

    def write(self, device: _Device, entries: dict[str, Entry]) -> None:
        write_entries(device.path, device.name, entries)
        self._written.setdefault(device.path, set()).update(entries)

    def summary(self) -> list[tuple[str, str]]:
        """Lines for the terminal, each with its verdict or ``""``."""
        lines: list[tuple[str, str]] = []
        for device in {device.name: device for device in self._devices.values()}.values():
            measured = [latency for (name, _), latency in self._measured.items() if name == device.name]
            if not measured:
                continue
            lines.append((device.name + device.copy_text, ""))
            lines += [(f"  {_line(latency)}", latency.change.verdict if latency.change else "") for latency in measured]
            written = self._written.get(device.path, set())
            rest = sum(latency.name not in written for latency in measured)
            absent = sum(latency.change is None for latency in measured)
            if written:
                lines.append((f"{len(written)} written to {_short(device.path)}", ""))
            if self.update and rest:
                lines.append((f"{rest} not written: the test failed, or the device was not steady", ""))
            if absent and not self.update:
                lines.append((f"{absent} not compared: {_no_baseline(device)}", ""))
        return lines


class MHCLatency:
    """The fixture's value: ``mhc_latency(call, bytes_moved=None, name=None, device=None)`` returns a :class:`Latency`.

    ``call`` takes nothing; whatever it returns is dropped. It is called once (it may compile), for a tenth of a second to warm up, and then
    timed by :class:`tuner.timing.Clock` as the tuner times: on CUDA every sample begins with an L2 of other data and is taken by events, on
    the CPU with the host's clock and warm caches; alone on the device as far as tuner/device_lock.py reaches; samples during which the SM
    clock fell are taken again. What looks regressed, or was not steady, is measured a second time, and the better of the two counts.

    ``bytes_moved``: bytes that the call reads and writes, for ``gbps`` and ``copy_share``. ``name``: under which it is stored; default: the
    test's node id with its parameters. Give one where a test measures several things. ``device``: what the call runs on, where this is not
    CUDA's current device, or the CPU where there is no CUDA; there its current stream is timed. A call that takes Python longer to launch
    than the L2 to fill, a tenth of a millisecond or two, is timed with its gaps: to time the kernels alone, capture a CUDA graph and give
    its ``replay``.

    A run here is a group of samples in one process, not a process as in ``mhc-tune check``: buffers stay where they are, and what moving
    them changes, about a percent, is not in ``interval``, nor in the band of a baseline that was updated once. Updates in further processes
    add it.

    Raises AssertionError where it regressed, or, with ``--mhc-latency-strict``, has no baseline; ValueError for a wrong argument; TuneError
    for another device's baseline that was to be updated, and where another process keeps the device.
    """

    def __init__(self, session: Session, test: str, properties: list[tuple[str, object]]) -> None:
        self._session, self._test, self._properties = session, test, properties
        self._names: set[str] = set()
        self._pending: list[tuple[_Device, str, Entry]] = []

    def __call__(
        self,
        call: Callable[[], object],
        bytes_moved: int | None = None,
        name: str | None = None,
        device: str | torch.device | None = None,
    ) -> Latency:
        __tracebackhide__ = True
        if bytes_moved is not None and not 0 < bytes_moved < math.inf:
            raise ValueError(f"bytes_moved: got {bytes_moved}, wanted a number above 0, or None")
        name = self._test if name is None else name
        if not isinstance(name, str) or not name.strip() or name.encode("utf-8", "replace").decode() != name:
            raise ValueError(f"name: got {name!r}, wanted some text")  # a lone surrogate is none, and no JSON
        if name in self._names:
            raise ValueError(f"name: {name!r} is measured already in this test; wanted one of its own: mhc_latency(..., name=...)")
        session, where = self._session, self._session.device(device)
        session.claim(where, name, self._test)
        self._names.add(name)
        if session.update and not where.fits and where.baseline is not None:
            raise other_device(where.path, where.baseline.device, where.name)
        latency = self._measure(call, bytes_moved, name, where)
        session.add(latency)
        self._record(latency)
        if session.update:
            if latency.dirty is None:
                entry = refreshed(where.entry(name), list(latency.runs_us), session.rule, torch.__version__, latency.clock_mhz)
                self._pending.append((where, name, entry))
        elif latency.change is None and session.strict:
            raise AssertionError(f"{printable(name)}: {_us(latency.median_us)} on {where.name}, but {_no_baseline(where)}")
        elif latency.change is not None and latency.change.verdict == "regressed":
            raise AssertionError(_regression(latency, latency.change, session.rule, self._test))
        return latency

    @property
    def unused(self) -> bool:
        """Whether nothing was timed."""
        return not self._names

    def finish(self, failed: bool) -> None:
        """At the end of a test: with ``--mhc-latency-update`` write its baselines, unless it failed. Raises TuneError."""
        pending, self._pending = self._pending, []
        for device in {id(device): device for device, _, _ in pending}.values():
            if not failed:
                self._session.write(device, {name: entry for where, name, entry in pending if where is device})

    def _measure(self, call: Callable[[], object], bytes_moved: int | None, name: str, where: _Device) -> Latency:
        __tracebackhide__ = True
        call()  # without the lock: it may compile, for minutes
        entry, rule = where.entry(name), self._session.rule

        def judged(runs: _Runs) -> Change | None:
            # the runs at hand are of identical code too
            return None if entry is None else judge(runs.medians, entry.runs, max(entry.band, noise_band(runs.medians)), rule)

        runs = where.measure(call)
        change = judged(runs)
        if runs.dirty is not None or (change is not None and change.verdict == "regressed"):
            again = where.measure(call)
            runs = min(runs, again, key=lambda r: (r.dirty is not None, median(r.medians)))
            change = judged(runs)
        us = median(runs.medians)
        copy = where.copy_gbps() if bytes_moved is not None else None
        gbps = None if bytes_moved is None else bytes_moved / us / 1e3
        return Latency(
            name=name,
            device=where.name,
            median_us=us,
            interval=median_interval(runs.medians),
            runs_us=tuple(runs.medians),
            gbps=gbps,
            copy_share=None if gbps is None or copy is None else gbps / copy,
            change=change,
            clock_mhz=runs.clock_mhz,
            dirty=runs.dirty,
        )

    def _record(self, latency: Latency) -> None:
        """For ``--junitxml``: properties of the test, ``mhc_latency.<field>`` or, with a name, ``mhc_latency.<name>.<field>``; less what is
        not known.
        """
        values = {
            "median_us": latency.median_us,
            "low_us": latency.interval[0],
            "high_us": latency.interval[1],
            "gbps": latency.gbps,
            "copy_share": latency.copy_share,
            "device": latency.device,
            "clock_mhz": latency.clock_mhz,
            "dirty": latency.dirty,
        }
        if latency.change is not None:
            change = latency.change
            values |= {"before_us": change.before_us, "ratio": change.ratio, "band": change.band, "verdict": change.verdict}
        prefix = "mhc_latency" if latency.name == self._test else f"mhc_latency.{latency.name}"
        for key, value in values.items():
            if value is not None:
                self._properties.append((f"{prefix}.{key}", f"{value:.6g}" if isinstance(value, float) else value))


def _us(us: float) -> str:
    """Four digits, and none below a nanosecond."""
    return f"{us:.{min(3, max(0, 3 - math.floor(math.log10(us))))}f} us" if us > 0 else "0 us"


def _change(change: Change) -> str:
    return f"{change.ratio - 1:+.1%} against {_us(change.before_us)}"


def _line(latency: Latency) -> str:
    low, high = latency.interval
    parts = [printable(latency.name), f"{_us(latency.median_us)} [{_us(low)[:-3]}, {_us(high)[:-3]}]"]
    parts += [f"{latency.gbps:.4g} GB/s"] if latency.gbps is not None else []
    parts += [f"{latency.copy_share:.0%} of copy"] if latency.copy_share is not None else []
    parts += [_change(latency.change), latency.change.verdict] if latency.change is not None else ["no baseline"]
    parts += [f"SM {latency.clock_mhz:.0f} MHz"] if latency.clock_mhz is not None else []
    parts += [f"not steady: {latency.dirty}"] if latency.dirty is not None else []
    return "  ".join(parts)


def _short(path: Path) -> str:
    """From here, where it lies below."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return os.fspath(path)


def _no_baseline(device: _Device) -> str:
    if device.baseline is not None and not device.fits:
        return f"{_short(device.path)} is of {device.baseline.device!r}, not of this device; name another file: --mhc-latency-baseline"
    return f"no baseline in {_short(device.path)}: --mhc-latency-update writes it"


def _regression(latency: Latency, change: Change, rule: Rule, test: str) -> str:
    unsteady = f" The device was not steady ({latency.dirty}): run it again." if latency.dirty is not None else ""
    return (
        f"{printable(latency.name)}: {_us(change.now_us)}, before {_us(change.before_us)}: ratio {change.ratio:.3f} on {latency.device} "
        f"(tolerance {rule.tolerance:.1%}, noise band {change.band:.1%}, floor {rule.floor_us:g} us).{unsteady} "
        f"To accept it: pytest --mhc-latency --mhc-latency-update '{printable(test)}'"
    )
