"""Which configuration a kernel runs with: found in a tuned profile, or the kernel's default, and never silently the wrong one.

A profile is looked for in this order, per device:

1. the one given to :func:`load_profile`;
2. the one named by the environment variable ``MHC_PROFILE`` (a path, a packaged name, or ``none`` for defaults only);
3. the packaged one named after the device (:func:`profile_name`);
4. where no packaged one is, that of another GPU with the same architecture (``sm_90a``): the nearest in multiprocessors.

What is not as it should be is said once, by a warning of the logger ``mhc``:

* tuned on another GPU: used only where the architecture is the same and either ``load_profile`` asked for it or no other source serves;
* tuned on another board of the same name (``H100 PCIe`` and ``H100 80GB HBM3``): used;
* tuned for another version of a kernel (``source_hash``): those entries are not used;
* tuned at other shapes: the nearest entry that is valid for this shape is used, else the kernel's default;
* no profile for this GPU: defaults.

Where a default would serve on the CPU, PyTorch does: 2.5 to 8 times faster there in float32 (results/notes.md, 2026-11-30).

A file asked for by name or path that is malformed raises :class:`ProfileError`; a malformed packaged one found by device name is reported,
and defaults serve. The CPU never gets an entry tuned on CUDA, nor the reverse.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import platform
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import ValidationError

from mhc.files import replace_file
from mhc.schema import Entry, Profile
from mhc.yamlfile import YAMLFileError, first_complaint, read_yaml
from tl_kernels import KERNELS
from tl_kernels.launch import device_arch, multiprocessors
from tl_kernels.spec import Kernel, Problem

log = logging.getLogger("mhc")

_HEADER = """\
# Tuned mHC kernel configurations, written by mhc-tune. Times in us, rates in GB/s, shares of copy bandwidth; fields: mhc/schema.py.
# A config edited by hand is used as it stands, but its times are then no longer true.
"""
WORKLOADS = "workloads"  # the one file in packaged_dir() that is no profile


class ProfileError(YAMLFileError):
    """What is wrong with a profile, on one line naming the file and the field."""


@dataclass(frozen=True)
class Choice:
    """What a kernel is to run with. ``config`` is valid for the problem, also where ``impl`` is ``"reference"``; do not change it: it is
    cached.

    ``origin``: ``"exact"`` (tuned at this n, C and dtype and within twice this T), ``"nearest"`` (tuned at another shape) or ``"default"``.
    """

    config: dict[str, Any]
    impl: Literal["tilelang", "reference"]
    origin: Literal["exact", "nearest", "default"]
    #: The entry it comes from.
    tuned: Entry | None = field(default=None, compare=False)

    def __str__(self) -> str:
        where = f" ({_shape(self.tuned)})" if self.tuned else ""
        return f"{self.impl}, {self.origin}{where}: {', '.join(f'{knob}={value}' for knob, value in self.config.items())}"


def _bucket(T: int) -> int:
    """The power of two nearest to T, in steps of equal ratio."""
    return 1 << ((T * T).bit_length() >> 1)


def choose(kernel: str, p: Problem, T: int, device: torch.device) -> Choice:
    """The configuration for one kernel, problem, token count and device; after the first time, one dictionary access.

    T counts as the nearest power of two, so that the cache stays small whatever token counts a run sees.
    Raises KeyError for an unknown kernel and :class:`ProfileError` for a malformed profile that was asked for.
    """
    if device.index is None and device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    key = (kernel, p, _bucket(T), device)
    found = _STATE.choices.get(key)
    if found is None:
        with _STATE.lock:
            # not under a stale dictionary: load_profile replaces it under the same lock
            found = _STATE.choices[key] = _choose(kernel, p, key[2], device)
    return found


def version() -> object:
    """What :func:`choose` said holds for as long as this is the same object."""
    return _STATE.choices


def load_profile(path_or_name: str | Path) -> Profile:
    """Read a profile (``"h100"``, ``"out/h100.yaml"``) and use it from now on, in this process, instead of any other.

    Raises :class:`ProfileError` on one line that names the file and the field.
    """
    path = _find(path_or_name)
    profile = _read(path)
    with _STATE.lock:
        _STATE.forget()
        _STATE.loaded = _Source(profile, str(path), "load_profile")
    return profile


def read_profile(path_or_name: str | Path) -> Profile:
    """As :func:`load_profile`, without using it."""
    return _read(_find(path_or_name))


def reset() -> None:
    """Forget the loaded profile, every choice made and every report given; ``MHC_PROFILE`` is read again."""
    with _STATE.lock:
        _STATE.forget()
        _STATE.loaded = None


def active_profile(device: torch.device) -> Profile | None:
    """The profile that serves ``device``, or None where defaults do."""
    with _STATE.lock:
        source = _source(device)
    return source.profile if source else None


def save_profile(profile: Profile, path: str | Path) -> None:
    """Write ``profile`` as YAML so that a reader sees either the old file or the whole new one. Raises :class:`ProfileError`."""
    # ASCII with escapes: of what allow_unicode would write as it is, YAML reads U+0085 back as a space
    text = _HEADER + yaml.safe_dump(profile.model_dump(mode="json", exclude_none=True), sort_keys=False, default_flow_style=None, width=140)
    try:
        replace_file(path, text)
    except OSError as e:
        raise ProfileError(path, f"cannot be written: {e.strerror or e}") from None


def packaged_dir() -> Path:
    """The folder of the packaged profiles and workloads: ``mhc/configs`` in a wheel, ``configs/`` in a source tree."""
    here = Path(__file__).resolve().parent
    installed = here / "configs"
    return installed if installed.is_dir() else here.parent / "configs"


def packaged_names() -> list[str]:
    """Names that :func:`load_profile` takes, sorted."""
    return sorted(p.stem for p in packaged_dir().glob("*.yaml") if p.stem != WORKLOADS)


# Words of a device name that say who made it or how it is mounted, not which chip it is.
_NOISE = re.compile(
    r"nvidia|geforce|tesla|quadro|graphics|gpu|generation|workstation|server|edition|\d+gb|hbm\w*|sxm\d*|pcie|nvl|mig|\d+g|ac"
)
_CPU = re.compile(
    r"\bcpu\b|xeon|epyc|ryzen|threadripper|\bcore\b|\(r\)|x86|amd64|i[3-6]86|aarch64|\barm|cortex|neoverse|graviton|apple|power\d"
)


def profile_name(device_name: str) -> str:
    """The name of the profile of a device: ``NVIDIA H100 80GB HBM3`` -> ``h100``, ``NVIDIA GeForce RTX 4090`` -> ``rtx-4090``; any CPU
    -> ``cpu``."""
    name = device_name.lower()
    if not name.strip() or _CPU.search(name):
        return "cpu"
    words = [w for w in re.split(r"[^a-z0-9]+", name) if w and not _NOISE.fullmatch(w)]
    return "-".join(words) or "unknown"


def device_name(device: torch.device) -> str:
    """The GPU's name as the driver gives it, or the CPU's model name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model()


def related_profiles(arch: str, gpu: str, sm_count: int | None = None) -> list[Profile]:
    """The packaged profiles of other GPUs than ``gpu`` (as the driver names it) with the same architecture (``"sm_90a"``), that of the GPU
    with the most similar number of multiprocessors first. A malformed one is left out; whoever asks for it by name is told.
    """
    found = []
    for name in packaged_names():
        try:
            other = _read(packaged_dir() / f"{name}.yaml")
        except ProfileError:
            continue
        where = other.provenance
        if where.arch == arch and profile_name(where.gpu) != profile_name(gpu):
            far = abs((where.sm_count or 0) - sm_count) if sm_count else 0
            found.append((far, name, other))
    return [other for _, _, other in sorted(found, key=lambda item: item[:2])]


@functools.cache
def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
            for line in stream:
                if line.lower().startswith("model name") and ":" in line:
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "cpu"


@dataclass(frozen=True)
class _Source:
    profile: Profile
    path: str
    how: Literal["load_profile", "MHC_PROFILE", "packaged", "related"]


@dataclass
class _State:
    loaded: _Source | None = None
    choices: dict[tuple[str, Problem, int, torch.device], Choice] = field(default_factory=dict)
    sources: dict[torch.device, _Source | None] = field(default_factory=dict)
    fresh: dict[str, list[Entry]] = field(default_factory=dict)
    said: set[tuple[Any, ...]] = field(default_factory=set)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def forget(self) -> None:
        self.choices, self.sources, self.fresh, self.said = {}, {}, {}, set()


_STATE = _State()


def _new_lock() -> None:
    _STATE.lock = threading.RLock()


# A child forked while another thread held the lock would wait for ever.
os.register_at_fork(after_in_child=_new_lock)


def _say(level: int, *key: Any, message: str) -> None:
    if key not in _STATE.said:
        _STATE.said.add(key)
        log.log(level, "%s", message)


def _find(path_or_name: str | Path) -> Path:
    if isinstance(path_or_name, Path) or os.sep in path_or_name or path_or_name.endswith((".yaml", ".yml")):
        return Path(path_or_name)
    if path_or_name not in packaged_names():
        names = ", ".join(packaged_names()) or "none"
        raise ProfileError(path_or_name, f"no packaged profile has this name, wanted a path to a YAML file or one of: {names}")
    return packaged_dir() / f"{path_or_name}.yaml"


def _read(path: Path) -> Profile:
    try:
        data = read_yaml(path)
    except YAMLFileError as e:
        raise ProfileError(e.path, e.message) from None
    try:
        return Profile.model_validate(data)
    except ValidationError as e:
        raise ProfileError(path, first_complaint(e)) from None


def _source(device: torch.device) -> _Source | None:
    if device not in _STATE.sources:
        _STATE.sources[device] = _look_for_source(device)
    return _STATE.sources[device]


def _look_for_source(device: torch.device) -> _Source | None:
    if _STATE.loaded and _fits(_STATE.loaded, device):
        return _STATE.loaded
    wanted = os.environ.get("MHC_PROFILE", "")
    if wanted.lower() == "none":
        return None
    if wanted:
        try:
            path = _find(wanted)
            source = _Source(_read(path), str(path), "MHC_PROFILE")
        except ProfileError as e:
            raise ProfileError("MHC_PROFILE", str(e)) from None
        if _fits(source, device):
            return source
    gpu = device_name(device)
    name = "cpu" if device.type == "cpu" else profile_name(gpu)
    if name not in packaged_names():
        to_tune = f"to tune: mhc-tune --gpu {name}"
        if device.type == "cpu":
            _say(logging.INFO, "none", name, message=f"no tuned profile for {gpu}; PyTorch serves; {to_tune}")
            return None
        related = next(iter(related_profiles(device_arch(device), gpu, multiprocessors(device))), None)
        as_what = f"as tuned on {related.provenance.gpu}, which has the same architecture" if related else "with defaults"
        _say(logging.WARNING, "none", name, message=f"no tuned profile for {gpu}; kernels run {as_what}; {to_tune}")
        return _Source(related, f"{profile_name(related.provenance.gpu)}.yaml", "related") if related else None
    path = packaged_dir() / f"{name}.yaml"
    try:
        source = _Source(_read(path), str(path), "packaged")
    except ProfileError as e:
        _say(logging.WARNING, "malformed", path, message=f"{e}; {_without(device)}; to tune again: mhc-tune --gpu {name}")
        return None
    return source if _fits(source, device) else None


def _fits(source: _Source, device: torch.device) -> bool:
    """Whether the entries of a profile may serve a device; says so where they may not, or only just."""
    where, gpu, arch = source.profile.provenance, device_name(device), device_arch(device)
    if where.gpu == gpu and where.arch == arch:
        return True
    name = "cpu" if arch == "cpu" else profile_name(gpu)
    if arch == "cpu" == where.arch:
        _say(logging.INFO, source.path, gpu, message=f"{source.path} was tuned on {where.gpu}; this CPU is {gpu}")
        return True
    same_chip = where.arch == arch and profile_name(where.gpu) == name
    used = same_chip or (source.how == "load_profile" and where.arch == arch)
    verdict = "its entries are used all the same" if used else "it is not used"
    message = f"{source.path} was tuned on {where.gpu} ({where.arch}), this is {gpu} ({arch}); {verdict}; to tune: mhc-tune --gpu {name}"
    _say(logging.WARNING, source.path, gpu, message=message)
    return used


def _choose(kernel_name: str, p: Problem, T: int, device: torch.device) -> Choice:
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {device}, wanted cpu or cuda")
    kernel = KERNELS[kernel_name]
    source = _source(device)
    entries = _fresh_entries(source, kernel, device) if source else []
    if not source or not entries:
        return unmeasured(kernel, p, device_arch(device))
    choice, refused = _pick(kernel, p, T, entries, device_arch(device))
    log.debug("%s %s T~%d on %s: %s (%s, %s)", kernel.name, p, T, device, choice.config, choice.origin, choice.impl)
    if refused or choice.origin != "exact":
        _report_shape(source, kernel, p, T, device, choice, refused)
    return choice


def unmeasured(kernel: Kernel, p: Problem, arch: str) -> Choice:
    """What serves where no entry does: the default configuration, on the CPU PyTorch."""
    return Choice(dict(kernel.default(p)), "reference" if arch == "cpu" else "tilelang", "default")


def _without(device: torch.device) -> str:
    return "PyTorch serves" if device.type == "cpu" else "kernels run with defaults"


def choose_from(profile: Profile, kernel: str, p: Problem, T: int) -> tuple[Choice, str]:
    """What :func:`choose` says on the device that ``profile`` was tuned on, without that device; and why a nearer entry does not serve, or
    ``""``. Raises KeyError for an unknown kernel.
    """
    spec = KERNELS[kernel]
    entries = [e for e in profile.entries if e.kernel == kernel and e.source_hash == spec.source_hash]
    return _pick(spec, p, _bucket(T), entries, profile.provenance.arch)


def nearest_entry(profile: Profile, kernel: str, p: Problem, T: int) -> Entry | None:
    """The entry that :func:`choose_from` would look at first, were none of them stale. Raises KeyError for an unknown kernel."""
    entries = _by_distance(KERNELS[kernel], p, _bucket(T), [e for e in profile.entries if e.kernel == kernel])
    return entries[0][1] if entries else None


def _by_distance(kernel: Kernel, p: Problem, T: int, entries: list[Entry]) -> list[tuple[tuple[float, ...], Entry]]:
    """The entries that can serve the problem's dtype, each with how far it is in n, C, dtype and T; the nearest first."""
    has_C, has_dtype = kernel.has_channels, kernel.has_streams

    def distance(e: Entry) -> tuple[float, ...]:
        far_C = abs(math.log(e.C / p.C)) if has_C else 0.0
        far_T = abs(math.log(e.tokens / T)) if kernel.has_tokens else 0.0
        return (abs(e.n - p.n), far_C, has_dtype and e.dtype != p.dtype, far_T, -e.tokens)

    return sorted(((distance(e), e) for e in entries if not has_dtype or _wide(e.dtype) == _wide(p.dtype)), key=lambda item: item[0])


def _pick(kernel: Kernel, p: Problem, T: int, entries: list[Entry], arch: str) -> tuple[Choice, str]:
    """The nearest entry that is valid for the problem, else what serves without one; and why a nearer one is not."""
    default = unmeasured(kernel, p, arch)
    refused = ""
    for (off_n, off_C, off_dtype, off_T, _), e in _by_distance(kernel, p, T, entries):
        reason = reason_against(kernel, p, e.config, default.config)
        if reason and e.impl == "tilelang":
            refused = refused or f"{_shape(e)}: {reason}"
            continue
        origin: Literal["exact", "nearest"] = "nearest" if off_n or off_C or off_dtype or off_T > math.log(2.001) else "exact"
        # where the reference serves, the configuration is for who asks for TileLang all the same
        return Choice(default.config if reason else dict(e.config), e.impl, origin, e), refused
    return default, refused


def _fresh_entries(source: _Source, kernel: Kernel, device: torch.device) -> list[Entry]:
    """The entries of one kernel that were tuned for its present source."""
    key = f"{kernel.name}@{source.path}"
    if key not in _STATE.fresh:
        every = [e for e in source.profile.entries if e.kernel == kernel.name]
        fresh = [e for e in every if e.source_hash == kernel.source_hash]
        gpu = profile_name(device_name(device)) if device.type == "cuda" else "cpu"
        run = f"mhc-tune --gpu {gpu} --kernels {kernel.name}"
        if len(fresh) < len(every):
            count = "all" if not fresh else f"{len(every) - len(fresh)} of {len(every)}"
            message = f"{kernel.name}: {count} entries of {source.path} were tuned for another version of the kernel; not used; run: {run}"
            _say(logging.WARNING, "stale", key, message=message)
        elif not every and not kernel.shortcut:  # a shortcut that is not there is not taken
            serves = "PyTorch serves" if device.type == "cpu" else "it runs with defaults"
            _say(logging.WARNING, "absent", key, message=f"{kernel.name}: not in {source.path}; {serves}; run: {run}")
        _STATE.fresh[key] = fresh
    return _STATE.fresh[key]


def _report_shape(source: _Source, kernel: Kernel, p: Problem, T: int, device: torch.device, choice: Choice, refused: str) -> None:
    # Once per shape, not once per kernel and T: every kernel would say the same.
    shape = f"n={p.n}" + (f", C={p.C}" if kernel.has_channels else "") + (f", {p.dtype}" if kernel.has_streams else "")
    message = f"{source.path} was not tuned at {shape}, T~{T}: "
    if device.type == "cpu":  # where nobody's time depends on it: one line for all kernels
        if choice.origin == "exact":
            _say(
                logging.WARNING,
                "refused",
                source.path,
                kernel.name,
                shape,
                message=f"{source.path}: {kernel.name}: not served by {refused}",
            )
        elif kernel.has_channels and kernel.has_streams:
            dtype = "" if p.dtype == "bfloat16" else f" --dtype {p.dtype}"
            message += "entries of other shapes serve where they are valid, else PyTorch does (said once per shape); "
            message += f"to tune: mhc-tune --gpu cpu --shapes {T}x{p.n}x{p.C}{dtype}"
            _say(logging.WARNING, "shape", source.path, shape, message=message)
        return
    message += f"{kernel.name} is served by {_shape(choice.tuned) if choice.tuned else 'the default configuration'}"
    if refused:  # the kernel is named: another one may well accept the same entry
        _say(logging.WARNING, "refused", source.path, kernel.name, shape, message=f"{message}; not by {refused}")
    else:
        _say(logging.WARNING, "shape", source.path, shape, message=f"{message}, other kernels likewise (said once per shape)")


def reason_against(kernel: Kernel, p: Problem, config: dict[str, Any], default: dict[str, Any]) -> str | None:
    if set(config) != set(default):
        return f"its config has {', '.join(sorted(config)) or 'nothing'}, wanted {', '.join(sorted(default)) or 'nothing'}"
    try:
        return kernel.unserved(p) or kernel.invalid(p, config)
    except (TypeError, ValueError, ArithmeticError) as e:  # a knob of the wrong type or a zero, edited by hand
        return f"its config {config} is malformed: {e}"


def _wide(dtype: str) -> bool:
    return dtype == "float32"


def _shape(e: Entry) -> str:
    return f"the entry n={e.n}, C={e.C}, {e.dtype}, tokens={e.tokens}"
