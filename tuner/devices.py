"""The devices of this machine that one run measures on, each by the value of CUDA_VISIBLE_DEVICES that shows nothing else."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tuner.errors import TuneError
from tuner.hardware import CPU


@dataclass(frozen=True)
class Device:
    """``visible``: what its measuring process is to see, None for whatever this process sees. ``index``: among those of this process."""

    index: int
    visible: str | None
    profile: str
    name: str

    @property
    def env(self) -> dict[str, str]:
        return {} if self.visible is None else {"CUDA_VISIBLE_DEVICES": self.visible}


def visible_devices() -> list[Device]:
    """The CUDA devices this process sees, CUDA_VISIBLE_DEVICES respected; [] where there is none."""
    import torch

    if not torch.cuda.is_available():
        return []
    from mhc.profile import profile_name

    given = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    found = []
    for i in range(torch.cuda.device_count()):
        props = torch.cuda.get_device_properties(i)
        entry = given[i] if i < len(given) else None
        uuid = getattr(props, "uuid", None)
        # a UUID means the same device whatever order CUDA and NVML count in; a slice of one (MIG) has the name it was given by
        visible = entry if entry is not None and entry.startswith("MIG") else f"GPU-{uuid}" if uuid else entry or str(i)
        found.append(Device(i, visible, profile_name(props.name), props.name))
    return found


def aim(gpu: str) -> None:
    """Make the first device of the profile ``gpu`` the current one, on a machine with several kinds."""
    if gpu.strip().lower() in ("auto", CPU):
        return
    import torch

    for device in visible_devices():
        if device.profile == gpu.strip().lower():
            torch.cuda.set_device(device.index)
            return


def pick(wanted: str | None, name: str, found: list[Device]) -> list[Device]:
    """Those of ``found`` that ``--devices`` asks for: ``"0,1"``, or all (None, ``"all"``) that are called ``name``.

    Raises :class:`TuneError` for one that is not there, or is another kind than the one tuned for.
    """
    if wanted is None or wanted.strip().lower() == "all":
        same = [device for device in found if device.name == name]
        return same or [Device(0, None, "", name)]
    here = f"there are {', '.join(f'{d.index} ({d.name})' for d in found)}" if found else "there is no CUDA device"
    chosen: dict[int, Device] = {}
    for part in wanted.split(","):
        device = next((d for d in found if part.strip() == str(d.index)), None)
        if device is None:
            raise TuneError(f"--devices {wanted}: got {part.strip()!r}, wanted numbers such as 0,1 or all; {here}")
        if device.name != name:
            raise TuneError(f"--devices {wanted}: device {device.index} is {device.name!r}, wanted {name!r} only; {here}")
        chosen[device.index] = device
    return list(chosen.values())
