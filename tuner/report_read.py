"""What a report is made of: the JSON of ``results/<gpu>/`` and the profiles, read and checked. A file that is malformed is named with its
field; one that is not there is None. Names in them are text of unknown origin: whoever shows them escapes them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from mhc.files import read_text
from mhc.profile import WORKLOADS, ProfileError, read_profile
from mhc.schema import Dtype, Profile
from mhc.yamlfile import first_complaint
from tl_kernels.spec import MAX_N
from tuner.bench_case import PASSES
from tuner.errors import TuneError, one_line

MAX_BYTES = 256 << 20
#: Bounds of what a chart can show: nothing measured comes near them.
MOST = 1e15


def _passes(value: dict[str, float]) -> dict[str, float]:
    for name in PASSES:
        if name not in value:
            raise ValueError(f"{name}: missing, wanted one number for each of {', '.join(PASSES)}")
    return value


Above0 = Annotated[float, Field(gt=1e-9, le=MOST)]
From0 = Annotated[float, Field(ge=0, le=MOST)]
Count = Annotated[int, Field(ge=0, le=int(MOST))]
Size = Annotated[int, Field(ge=1, le=1 << 40)]
Streams = Annotated[int, Field(ge=1, le=MAX_N)]
ByPass = Annotated[dict[str, Above0], AfterValidator(_passes)]


class _Read(BaseModel):
    # later versions of the tools add fields; values are never converted
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class Hardware(_Read):
    name: str
    arch: str
    sm_count: int | None = None
    power_limit_w: float | None = None
    driver: str | None = None
    cuda: str | None = None


class Time(_Read):
    """Microseconds: median and its 95% interval; share of the floor's speed where there is a floor."""

    us: Above0
    lo: From0
    hi: From0
    share: From0 | None = None


class Row(_Read):
    """One implementation: a boundary alone, or in a stack of ``layers``."""

    rival: str
    label: str
    note: str = ""
    layers: Size = 1
    chained: bool = False
    agrees: bool
    # a rival may well answer NaN
    errors: dict[str, Annotated[float, Field(allow_inf_nan=True)]] = {}
    times: dict[str, Time]
    peak_mib: From0 | None = None
    failures: list[str] = []

    @property
    def name(self) -> str:
        return self.label if self.layers == 1 else f"{self.label}, {'chain' if self.chained else 'stack'} of {self.layers}"


class DecodeRow(Row):
    """Forward only, at a small ``T``."""

    T: Size
    host_us: dict[str, From0] | None = None


class KernelRow(_Read):
    """One program; the times are missing where it failed."""

    kernel: str
    program: str = "profile"
    config: dict[str, Any] | None = None
    bytes: Count
    failure: str | None = None
    us: Above0 | None = None
    lo: From0 | None = None
    hi: From0 | None = None
    gbps: From0 | None = None
    share: From0 | None = None
    registers: Count | None = None
    stack: Count | None = None
    shared: Count | None = None
    threads: Count | None = None
    blocks_per_sm: Count | None = None
    occupancy: From0 | None = None


class ShapeResult(_Read):
    """Everything measured at one shape in one run."""

    T: Size
    n: Streams
    C: Size
    dtype: Dtype = "bfloat16"
    copy_gbps: Above0
    floor_us: ByPass
    rows: list[Row]
    decode: list[DecodeRow] = []
    kernels: list[KernelRow] = []

    @field_validator("rows")
    @classmethod
    def _shared(cls, rows: list[Row]) -> list[Row]:
        for i, row in enumerate(rows):
            for name, time in row.times.items():
                if time.share is None:
                    raise ValueError(f"[{i}].times.{name}.share: missing, wanted the share of the floor's speed")
        return rows

    @property
    def shape(self) -> str:
        return f"{self.T} × {self.n} × {self.C}"


class Bench(_Read):
    """A bench.json."""

    complete: bool = True
    hardware: Hardware
    versions: dict[str, str | None] = {}
    rival_versions: dict[str, dict[str, str | None]] = {}
    command: str
    date: str
    method: str
    dtype: str
    missing: dict[str, Any] | list[Any] = {}
    shapes: list[ShapeResult]

    @property
    def graph(self) -> bool:
        return self.method == "cuda"

    @property
    def kind(self) -> str:
        """The way of timing that counts: graph replay, or wall clock on the CPU."""
        return "graph" if self.graph else "eager"


class Trial(_Read):
    outcome: str


class Study(_Read):
    kernel: str
    n: Streams
    dtype: str
    tokens: Size
    state: str | None = None
    trials: list[Trial]


class Tune(_Read):
    """One run of the tuner, as ``mhc-tune --raw`` writes it."""

    hardware: Hardware
    copy_gbps: Above0
    command: str
    seconds: From0 | None = None
    studies: list[Study]


class Tunes(_Read):
    """Several runs in one file."""

    runs: list[Tune]


class ReplayRow(_Read):
    start: str
    sampler: str
    seeds: Count
    reached: Count
    within_quarter: Count
    median_share: From0 | None
    p90_share: From0 | None


class ReplayStudy(_Read):
    label: str
    measured: Count
    near_best: Count
    rows: list[ReplayRow]


class Replay(_Read):
    """A replay.json."""

    command: str
    date: str
    ledger: str
    hardware: str
    within: From0
    batch: Count
    studies: list[ReplayStudy]


class Checked(_Read):
    kernel: str
    program: str
    verdict: str
    findings: list[str] = []
    # of a check that times: microseconds, and shares
    causes: list[str] = []
    before_us: Above0 | None = None
    now_us: Above0 | None = None
    ratio: Above0 | None = None
    band: From0 | None = None


class FalseAlarms(_Read):
    """Of a calibration, see tuner/noise.py."""

    entries: Count
    runs: Count
    judged: Count
    regressed: Count
    runs_with_alarm: Count
    rate: From0


class Check(_Read):
    """What mhc-tune check wrote with --json; what has a default is not of --static (tuner/latency_check.py)."""

    title: str
    mode: str = "static"
    date: str = "not recorded"
    command: str = "not recorded"
    runs: Count = 0
    false_alarms: FalseAlarms | None = None
    exit_code: int
    counts: dict[str, Count] = {}
    notes: list[str] = []
    programs: list[Checked]


class Moments(_Read):
    """Seconds since a process was started."""

    torch: Above0
    ready: Above0
    first: Above0
    second: Above0


class StartRow(_Read):
    rival: str = ""
    label: str
    setup: str
    samples: list[Moments]
    failure: str | None = None


class Startup(_Read):
    """A startup.json (tuner/startup.py); ``complete``: None in older files, which do not say."""

    complete: bool | None = None
    command: str
    date: str
    T: Count
    n: Count
    C: Count
    dtype: str
    rows: list[StartRow]


M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class File(Generic[M]):
    """A file that was read, and checked."""

    path: Path
    data: M


def parse(model: type[M], text: str, path: str | Path) -> File[M]:
    """``text`` as JSON of this model. Raises :class:`TuneError`, one line: the file, the field, what was got and what was wanted."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise TuneError(f"{path}: is no JSON: {one_line(e)}") from None
    try:
        return File(Path(path), model.model_validate(raw))
    except ValidationError as e:
        raise TuneError(f"{path}: {first_complaint(e)}") from None


def read(model: type[M], path: Path) -> File[M] | None:
    """The file, or None where there is none. Raises :class:`TuneError` as :func:`parse`."""
    try:
        text = read_text(path, MAX_BYTES)
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as e:
        raise TuneError(f"{path}: is no JSON in UTF-8: {one_line(e)}") from None
    except OSError as e:
        raise TuneError(f"{path}: cannot be read: {e.strerror or e}") from None
    return parse(model, text, path)


def read_tunes(path: Path) -> list[Tune]:
    """The runs of a raw file, alone or several under ``runs``."""
    try:
        several = "runs" in json.loads(read_text(path, MAX_BYTES))
    except (OSError, ValueError, TypeError, RecursionError):
        several = False  # the reader below says what is wrong
    if several:
        many = read(Tunes, path)
        return [] if many is None else many.data.runs
    one = read(Tune, path)
    return [] if one is None else [one.data]


@dataclass(frozen=True)
class Device:
    """All that is known of one kind of device, by its profile name."""

    name: str
    #: The folder of its results, which need not exist.
    folder: Path
    bench: File[Bench] | None = None
    decode: File[Bench] | None = None
    #: Other runs of the benchmark, a folder each.
    more: tuple[File[Bench], ...] = ()
    tunes: dict[Path, list[Tune]] = field(default_factory=dict)
    replay: File[Replay] | None = None
    checks: tuple[File[Check], ...] = ()
    startup: File[Startup] | None = None
    #: Results of runs that ended before anything was measured.
    empty: tuple[Path, ...] = ()
    profile: Profile | None = None
    profile_path: Path | None = None
    #: Every file of the folder, for the links.
    files: tuple[Path, ...] = ()


def _folders(results: Path) -> list[Path]:
    try:
        return sorted(p for p in results.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as e:
        raise TuneError(f"--results {results}: cannot be read: {e.strerror or e}, wanted a folder with a folder a GPU") from None


def read_device(name: str, folder: Path, profile_path: Path | None) -> Device:
    """Everything of one device. Raises :class:`TuneError` for a file that is malformed."""
    profile = None
    if profile_path is not None:
        try:
            profile = read_profile(profile_path)
        except ProfileError as e:
            raise TuneError(f"--profiles: {e}") from None
    main, decode = folder / "bench.json", folder / "decode" / "bench.json"
    benches = {path: run for path in (main, *sorted(folder.glob("*/bench.json"))) if (run := read(Bench, path)) is not None}
    runs = {path: run for path, run in benches.items() if run.data.shapes}
    return Device(
        name=name,
        folder=folder,
        bench=runs.get(main),
        decode=runs.get(decode),
        more=tuple(run for path, run in runs.items() if path not in (main, decode)),
        empty=tuple(path for path in benches if path not in runs),
        tunes={path: read_tunes(path) for path in sorted(folder.glob("tune*.json"))},
        replay=read(Replay, folder / "replay.json"),
        checks=tuple(found for path in sorted(folder.glob("check*.json")) if (found := read(Check, path)) is not None),
        startup=read(Startup, folder / "startup.json"),
        profile=profile,
        profile_path=profile_path,
    )


def _with_files(device: Device) -> Device:
    """The device and the files of its folder; only now, since a folder that holds no results may be anything, and of any depth."""
    folder = device.folder
    found = (p for p in folder.rglob("*") if p.is_file() and not any(q.startswith(".") for q in p.relative_to(folder).parts))
    return replace(device, files=tuple(sorted(found)))


def read_devices(results: Path, profiles: Path) -> list[Device]:
    """Every device with results or a profile; those with a benchmark first. Raises :class:`TuneError`, also where there is nothing."""
    folders = {p.name: p for p in _folders(results)}
    if not profiles.is_dir():
        raise TuneError(f"--profiles {profiles}: is no folder, wanted one with a <gpu>.yaml a GPU")
    found = {p.stem: p for p in sorted(profiles.glob("*.yaml")) if p.stem != WORKLOADS}
    devices = [read_device(name, folders.get(name, results / name), found.get(name)) for name in sorted({*folders, *found})]
    devices = [d for d in devices if d.bench or d.decode or d.more or d.tunes or d.replay or d.checks or d.startup or d.empty or d.profile]
    if not devices:
        raise TuneError(f"--results {results}, --profiles {profiles}: nothing to report, wanted <gpu>/bench.json or <gpu>.yaml")
    return sorted(map(_with_files, devices), key=lambda d: (d.bench is None, d.decode is None, d.profile is None, d.name))
