"""Which profile a check looks at, and which of its entries: what ``mhc-tune check`` and ``check --static`` share."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mhc.profile import ProfileError, packaged_dir, packaged_names, read_profile
from mhc.schema import Entry, Profile
from tl_kernels import KERNELS, NAMES
from tuner.errors import TuneError, unknown
from tuner.hardware import CPU
from tuner.plan import pick_kernels, pick_workloads, split_names
from tuner.shape import Shape, parse_shape
from tuner.workloads import Workload, WorkloadError, load_workloads


@dataclass(frozen=True)
class Selection:
    """The filters as typed; None keeps everything."""

    kernels: str | None = None
    workloads: str | None = None
    shapes: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether nothing of the profile is left out."""
        return self.kernels is None and self.workloads is None and self.shapes is None

    def names(self) -> list[str]:
        """The kernels, in boundary order. Raises :class:`TuneError`."""
        return pick_kernels(split_names(self.kernels))

    def models(self) -> list[Workload]:
        """The workloads, all of them without ``--workloads``. Raises :class:`TuneError`."""
        try:
            return pick_workloads(split_names(self.workloads), load_workloads())
        except WorkloadError as e:
            raise TuneError(f"--workloads: {e}") from None

    def keeps_shape(self) -> Callable[[Shape, str], bool]:
        """A function of a shape and a kernel's name: whether ``--shapes`` keeps it. Raises :class:`TuneError`."""
        wanted = None if self.shapes is None else [parse_shape(text, "--shapes") for text in self.shapes.split(",")]

        def keep(shape: Shape, kernel: str) -> bool:
            # a program without T in it has an entry at some T
            fits = ((s.n, s.C) == (shape.n, shape.C) and (s.T == shape.T or not KERNELS[kernel].has_tokens) for s in wanted or ())
            return wanted is None or any(fits)

        return keep

    def entries(self, profile: Profile) -> list[Entry]:
        """The entries that pass, in the profile's order. Raises :class:`TuneError`, also for an entry of a kernel that does not exist."""
        kernels, keeps_shape = self.names(), self.keeps_shape()
        # a program without C in it has an entry at every C
        models = None if self.workloads is None else {(w.n, w.C, w.dtype) for w in self.models()}
        for entry in profile.entries:
            if entry.kernel not in NAMES:
                raise TuneError(f"entry of {entry.kernel!r}: unknown kernel (there are {', '.join(NAMES)})")
        return [
            entry
            for entry in profile.entries
            if entry.kernel in kernels
            and (models is None or (entry.n, entry.C, entry.dtype) in models)
            and keeps_shape(Shape(entry.tokens, entry.n, entry.C), entry.kernel)
        ]


def nothing_passes() -> TuneError:
    """The error where no entry is left."""
    return TuneError("--kernels, --workloads, --shapes: got filters that no entry of the profile passes, wanted one that does")


def profile_path(profile: str) -> Path:
    """The file that ``--profile`` names: a path, or a packaged name."""
    return Path(profile) if os.sep in profile or profile.endswith((".yaml", ".yml")) else packaged_dir() / f"{profile}.yaml"


def find_profile(gpu: str, profile: str | None, cpu: bool = False) -> tuple[str, Path]:
    """The name and file of the GPU profile to check: the one named, this machine's GPU's, or the only one of a GPU that is packaged.
    ``cpu``: that of a CPU may be named too.
    """
    if profile is not None:
        check_one_profile(gpu, profile)
        return profile, profile_path(profile)
    names = [name for name in packaged_names() if cpu or name != CPU]
    wanted = gpu.strip().lower()
    if wanted == "auto":
        from tuner.hardware import resolve

        here = resolve("auto").profile
        if here not in names and len(names) != 1:
            raise TuneError(f"--gpu auto: got no GPU with a profile, wanted one of {', '.join(names) or 'none'}")
        wanted = here if here in names else names[0]
    if wanted not in names:
        raise unknown("--gpu", wanted, names)
    return wanted, packaged_dir() / f"{wanted}.yaml"


def check_one_profile(gpu: str, profile: str | None) -> None:
    """Raise :class:`TuneError` where both options name one."""
    if profile is not None and gpu != "auto":
        raise TuneError("--profile and --gpu: got both, wanted one of them")


def load(path: Path, option: str = "") -> Profile:
    """The profile at ``path``. Raises :class:`TuneError` on one line; ``option`` named it."""
    try:
        return read_profile(path)
    except ProfileError as e:
        raise TuneError(f"{option}: {e}" if option else str(e)) from None
