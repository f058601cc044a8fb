"""What ``mhc-tune check`` is to measure: the device at hand, the entries, and what they are compared with.

Everything that can be wrong with a command line or a file is found here, before anything is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from mhc.profile import packaged_dir, reason_against
from mhc.schema import Entry, Profile
from tl_kernels import KERNELS
from tuner.device_lock import lock_name
from tuner.devices import aim, pick, visible_devices
from tuner.errors import TuneError
from tuner.hardware import CPU, Hardware, find_compiler, resolve
from tuner.latency_case import Case, label
from tuner.noise import Noise, noise_path, read_noise
from tuner.plan import make_tasks
from tuner.regression import Rule
from tuner.selection import Selection, check_one_profile, load, nothing_passes, profile_path
from tuner.shape import Shape
from tuner.writer import check_writable

DEFAULT_RUNS = 3
#: A limit on the repetitions of a check: hours of them.
MOST_RUNS = 1000


@dataclass(frozen=True)
class LatencyRequest:
    """The command line as typed; None means the default. ``floor_us`` in microseconds, ``tolerance`` as a share."""

    gpu: str = "auto"
    profile: str | None = None
    selection: Selection = field(default_factory=Selection)
    baseline: Path | None = None
    against: str | None = None
    calibrate: int | None = None
    runs: int | None = None
    tolerance: float | None = None
    floor_us: float | None = None
    jobs: int | None = None
    strict: bool = False
    json: Path | None = None
    junit: Path | None = None
    summary: Path | None = None
    command: str = "mhc-tune check"

    @property
    def mode(self) -> str:
        return "calibrate" if self.calibrate is not None else "against" if self.against is not None else "baseline"

    def rule(self) -> Rule:
        """Raises :class:`TuneError` for what is no share or no time."""
        rule = Rule()
        for option, value, name in (("--tolerance", self.tolerance, "tolerance"), ("--floor-us", self.floor_us, "floor_us")):
            if value is None:
                continue
            if not 0 <= value < math.inf:
                wanted = "a share such as 0.05" if name == "tolerance" else "microseconds such as 0.5"
                raise TuneError(f"{option}: got {value:g}, wanted {wanted}")
            rule = replace(rule, **{name: value})
        return rule

    def count(self) -> int:
        """How many runs. Raises :class:`TuneError` where options contradict each other."""
        given = {"--baseline": self.baseline, "--against": self.against, "--calibrate": self.calibrate}
        modes = [option for option, value in given.items() if value is not None]
        if self.calibrate is not None and self.runs is not None:
            raise TuneError("--runs and --calibrate: got both, wanted one of them; --calibrate says how many runs")
        if len(modes) > 1:
            raise TuneError(f"{' and '.join(modes)}: got {len(modes)} of them, wanted one")
        runs = self.calibrate or self.runs or DEFAULT_RUNS
        if runs > MOST_RUNS:
            raise TuneError(f"{'--runs' if self.calibrate is None else '--calibrate'}: got {runs}, wanted at most {MOST_RUNS}")
        return runs


@dataclass(frozen=True)
class Plan:
    """Everything is by the names of :func:`tuner.latency_case.label`.

    ``entries``: of the profile; what it has not is measured with the kernel's default. ``cases``: what to time; ``refused``: why not.
    ``before``: the baseline's entries, ``where`` it was measured. ``noise``: the calibration, if it is this device's. ``env``: what shows a
    measuring process its device, whose lock is ``lock``.
    """

    request: LatencyRequest
    runs: int
    rule: Rule
    hardware: Hardware
    lock: str
    env: Mapping[str, str]
    path: Path
    entries: Mapping[str, Entry]
    cases: Mapping[str, Case]
    refused: Mapping[str, str]
    baseline: Profile | None
    before: Mapping[str, Entry]
    noise: Noise | None
    notes: tuple[str, ...]


def make_plan(request: LatencyRequest) -> Plan:
    """Raises :class:`TuneError` for what the user can mend."""
    runs, rule = request.count(), request.rule()
    for option, file in (("--json", request.json), ("--junit", request.junit), ("--summary", request.summary)):
        if file is not None:
            check_writable(file, option)
    hardware, path = _device_and_profile(request)
    # a device without a profile has its defaults, which can be compared with another revision's
    needed = request.mode == "baseline"
    if needed and request.profile is None and not path.exists():
        raise TuneError(
            f"--gpu {hardware.profile}: there is no profile {path}; tune first: mhc-tune --gpu {hardware.profile}; "
            "or compare with another revision: --against GIT_REV"
        )
    profile = load(path) if needed or request.profile is not None or path.exists() else None
    if profile is not None and profile.provenance.arch != hardware.arch:
        where = profile.provenance
        raise TuneError(f"{path}: got a profile of {where.gpu} ({where.arch}), wanted one of {hardware.name} ({hardware.arch})")
    notes: list[str] = []
    baseline = _baseline(request, path, profile, hardware, notes) if request.mode == "baseline" else None
    entries = {} if profile is None else by_name(request.selection.entries(profile))
    cases, refused = _cases(entries)
    if request.mode != "baseline":
        cases |= _defaults(request.selection, profile, hardware)
    if not cases and not refused:
        raise nothing_passes()
    noise = _noise(path, hardware, notes)
    if request.calibrate is not None:
        check_writable(noise_path(path), "--calibrate")
    stale = sum(entry.source_hash != KERNELS[entry.kernel].source_hash for entry in entries.values())
    if stale:
        notes.append(f"{stale} entries were tuned for another version of their kernel; `import mhc` does not use them until tuned again")
    find_compiler(hardware)
    device = None if hardware.is_cpu else pick(None, hardware.name, visible_devices())[0]
    return Plan(
        request=request,
        runs=runs,
        rule=rule,
        hardware=hardware,
        lock=lock_name(hardware.device),
        env={} if device is None else device.env,
        path=path,
        entries=entries,
        cases=cases,
        refused=refused,
        baseline=baseline,
        before={} if baseline is None else by_name(request.selection.entries(baseline)),
        noise=noise,
        notes=tuple(notes),
    )


def by_name(entries: list[Entry]) -> dict[str, Entry]:
    """Of entries that differ in nothing that their kernel has, the one that serves: the first, and of a second stage the largest T's."""
    found: dict[str, Entry] = {}
    for entry in entries:
        name = label(entry.kernel, entry.n, entry.C, entry.dtype, entry.tokens)
        if name not in found or (not KERNELS[entry.kernel].has_tokens and entry.tokens > found[name].tokens):
            found[name] = entry
    return found


def _device_and_profile(request: LatencyRequest) -> tuple[Hardware, Path]:
    """The device at hand and the file of its profile, which need not be there."""
    check_one_profile(request.gpu, request.profile)
    if request.profile is not None:
        path = profile_path(request.profile)
        arch = load(path).provenance.arch
        hardware = resolve(CPU if arch == CPU else "auto")
    else:
        aim(request.gpu)
        try:
            hardware = resolve(request.gpu)
        except TuneError as e:
            without = f"mhc-tune check --static --gpu {request.gpu.strip().lower()}"
            raise TuneError(f"{e}; to compile and compare without it: {without}") from None
        path = packaged_dir() / f"{hardware.profile}.yaml"
    if hardware.is_cpu and request.gpu.strip().lower() != CPU and (request.profile is None or arch != CPU):
        without = "mhc-tune check --static --gpu h100"
        raise TuneError(f"check: there is no GPU here; to compile and compare without one: {without} (or time: --gpu cpu)")
    return hardware, path


def _baseline(request: LatencyRequest, path: Path, profile: Profile | None, hardware: Hardware, notes: list[str]) -> Profile:
    """The profile whose times count; by default the one that is measured."""
    if request.baseline is not None:
        found, named = load(request.baseline, "--baseline"), f"--baseline {request.baseline}"
    else:
        assert profile is not None  # it was needed
        found, named = profile, str(path)
    where = found.provenance
    if (where.gpu, where.arch) == (hardware.name, hardware.arch):
        return found
    if request.baseline is None or not hardware.is_cpu or where.arch != CPU:
        raise TuneError(
            f"{named}: its times are of {where.gpu}, this is {hardware.name}: they cannot be compared; "
            "compare with another revision here: --against GIT_REV; see how much identical code differs here: --calibrate N"
        )
    notes.append(f"{named}: its times are of {where.gpu}, this is {hardware.name}; what moved may be the machine")
    return found


def _cases(entries: Mapping[str, Entry]) -> tuple[dict[str, Case], dict[str, str]]:
    cases, refused = {}, {}
    for name, entry in entries.items():
        kernel = KERNELS[entry.kernel]
        p = kernel.problem(entry.n, entry.C, entry.dtype)
        why_not = reason_against(kernel, p, entry.config, kernel.default(p)) if entry.impl == "tilelang" else None
        if why_not is None:
            cases[name] = Case(*entry.key, config=dict(entry.config), impl=entry.impl)
        else:
            refused[name] = why_not
    return cases, refused


def _defaults(selection: Selection, profile: Profile | None, hardware: Hardware) -> dict[str, Case]:
    """The default, at the workloads' token counts, of kernels that were asked for by name and have no entry; of all without a profile."""
    if profile is not None and selection.kernels is None:
        return {}
    tuned = set() if profile is None else {entry.kernel for entry in profile.entries}
    keep = selection.keeps_shape()
    found: dict[str, Case] = {}
    for task in make_tasks([name for name in selection.names() if name not in tuned], selection.models(), hardware, None):
        p = task.p
        if keep(Shape(task.T, p.n, p.C), task.kernel):
            name = label(task.kernel, p.n, p.C, p.dtype, task.T)
            found.setdefault(name, Case(task.kernel, p.n, p.C, p.dtype, task.T, dict(KERNELS[task.kernel].default(p))))
    return found


def _noise(path: Path, hardware: Hardware, notes: list[str]) -> Noise | None:
    noise = read_noise(noise_path(path))
    if noise is not None and noise.gpu != hardware.name:
        notes.append(f"{noise_path(path)}: its bands are of {noise.gpu}, this is {hardware.name}; they are not used")
        return None
    return noise
